"""Files of half a gigabyte that nobody vouches for: every command refuses them by what is said of them, unread."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome
from stages.artefacts import tensor_files
from stages.exchange import bundles
from stages.files import reading
from stages.models import shapes
from stages.runtime.errors import Damaged
from stages.workspace.paths import Workspace

HUGE = 512 << 20
MOST_READ = 128 << 20
"""What a command may read beside, such as libraries."""
WEIGHTS, MANIFEST = "adapter_model.safetensors", "manifest.json"
EXCHANGE, SERVER = "exchange/round-0002", "private/server/round-0002"


def bytes_read() -> int:
    """What this process has read so far, whatever by."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["rchar"])


def inflate(path: Path) -> None:
    """What an outsider puts there: nothing but zeros, and a manifest to which they belong."""
    os.truncate(path, HUGE)
    manifest = path.with_name(MANIFEST)
    said = json.loads(manifest.read_text())
    said["files"][path.name] = {"sha256": "0" * 64, "size_bytes": HUGE}
    said["parameters"] = HUGE // 4
    manifest.write_text(json.dumps(said))


def give(fedcollm: Callable[..., Outcome], folder: Path, *words: object) -> Outcome:
    before = bytes_read()
    outcome = fedcollm(*words, "-w", folder)
    assert bytes_read() - before < MOST_READ, f"{words} read it"
    assert "Traceback" not in outcome.err
    return outcome


READS = {
    "client-train --client 1 --round 2": f"{EXCHANGE}/broadcast/{WEIGHTS}",
    "reveal --client 1 --round 2": f"{EXCHANGE}/broadcast/{WEIGHTS}",
    "reveal --client 2 --round 2": f"{EXCHANGE}/close/client-2.safetensors",
    "aggregate --round 2": f"{EXCHANGE}/broadcast/{WEIGHTS}",
    "aggregate --round 2 --overwrite": f"{EXCHANGE}/client-2/masked.safetensors",
    "pack --server --round 2": f"{EXCHANGE}/broadcast/{WEIGHTS}",
    "pack --client 1 --round 2": f"{EXCHANGE}/client-1/masked.safetensors",
    "co-distill --round 2": f"{SERVER}/aggregate/{WEIGHTS}",
    "broadcast --round 2 --overwrite": f"private/server/round-0001/slm/{WEIGHTS}",
    "evaluate --round 2": f"{SERVER}/slm/{WEIGHTS}",
    "evaluate --client 1 --round 2": f"private/client-1/round-0002/slm/{WEIGHTS}",
    "export --round 2": f"{SERVER}/slm/{WEIGHTS}",
    "verify": f"{EXCHANGE}/broadcast/{WEIGHTS}",
}


@pytest.mark.parametrize("words", READS)
def test_what_no_party_signed_is_not_read(words: str, summed: Path, fedcollm: Callable[..., Outcome]) -> None:
    inflate(summed / READS[words])
    outcome = give(fedcollm, summed, *words.split())
    assert outcome.code == 4
    assert "manifest.json is not what" in outcome.err


@pytest.mark.parametrize("words", ["audit", "status --verify"])
def test_whoever_only_looks_tells_it_and_goes_on(words: str, summed: Path, fedcollm: Callable[..., Outcome]) -> None:
    inflate(summed / EXCHANGE / "broadcast" / WEIGHTS)
    inflate(summed / EXCHANGE / "client-1/masked.safetensors")
    said = give(fedcollm, summed, *words.split()).out
    assert said.count("is not what server signed") >= 1
    assert said.count("is not what client-1 signed") >= 1


PLAIN = {
    "client-train --client 1 --round 2 --overwrite": f"{EXCHANGE}/broadcast/{WEIGHTS}",
    "aggregate --round 2": f"{EXCHANGE}/client-2/{WEIGHTS}",
    "aggregate --round 2 --keep-old": f"{EXCHANGE}/broadcast/{WEIGHTS}",
    "pack --client 1 --round 2": f"{EXCHANGE}/client-1/{WEIGHTS}",
    "co-distill --round 2 --overwrite": f"{SERVER}/aggregate/{WEIGHTS}",
    "evaluate --client 1 --round 2": f"{EXCHANGE}/client-1/{WEIGHTS}",
    "export --round 2": f"{SERVER}/slm/{WEIGHTS}",
    "verify": f"{EXCHANGE}/client-3/{WEIGHTS}",
}


@pytest.mark.parametrize("words", PLAIN)
def test_without_keys_the_base_model_says_how_large_an_adapter_can_be(
    words: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    if words == "aggregate --round 2":
        shutil.rmtree(finished / SERVER)
    inflate(finished / PLAIN[words])
    outcome = give(fedcollm, finished, *words.split())
    assert outcome.code == 4
    assert f"its manifest says that {WEIGHTS} has {HUGE} bytes, here it can have " in outcome.err


@pytest.mark.parametrize("words", ["audit", "status --verify"])
def test_without_keys_too_whoever_only_looks_goes_on(
    words: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    inflate(finished / EXCHANGE / "client-2" / WEIGHTS)
    outcome = give(fedcollm, finished, *words.split())
    assert f"its manifest says that {WEIGHTS} has {HUGE} bytes" in outcome.out


def test_zeros_of_unknown_origin_are_no_adapter(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    sound, zeros = finished / EXCHANGE / "client-1", shutil.copytree(finished / EXCHANGE / "client-2", finished / "x")
    os.truncate(zeros / WEIGHTS, HUGE)
    for words in (("diff", sound, zeros), ("audit", zeros)):
        before = bytes_read()
        outcome = fedcollm(*words)
        assert bytes_read() - before < MOST_READ
        assert outcome.code != 0
        assert WEIGHTS in outcome.out + outcome.err


def test_a_stray_file_is_told_of_and_not_searched(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    stray = finished / EXCHANGE / "stray.json"
    stray.touch()
    os.truncate(stray, HUGE)
    outcome = give(fedcollm, finished, "audit", "--canary", "anything")
    assert f"has {HUGE} bytes that no manifest names, and is not searched" in outcome.out


def bundle_of(path: Path, workspace: Path, round: str, folder: str, *, named: dict[str, int]) -> None:
    """A bundle of a folder, some of whose files are that large, of zeros."""
    here = workspace / "exchange" / round / folder
    sizes = {f"{round}/{folder}/{one.name}": named.get(one.name, one.stat().st_size) for one in here.iterdir()}
    small = {name: (workspace / "exchange" / name).read_bytes() for name in sizes if Path(name).name not in named}
    listing = bundles.Listing(
        federation="tiny",
        members=[
            bundles.Member(name=name, size_bytes=size, sha256=reading.sha256(small.get(name, b"")))
            for name, size in sorted(sizes.items())
        ],
    )
    head = reading.json_bytes(listing.model_dump())
    with path.open("wb") as file:
        file.write(b"".join(list(bundles._archive({bundles.LISTING: head}))[:2]))
        for name, size in sorted(sizes.items()):
            file.write(next(iter(bundles._archive({name: b""}))))
            file.write(small.get(name, b""))
            file.seek(size - len(small.get(name, b"")), os.SEEK_CUR)
        end = struct.calcsize(bundles.LOCAL_FORM) + len(bundles.LISTING) + len(head) + listing.size_bytes
        file.truncate(end + bundles.END_BYTES)


@pytest.mark.parametrize(
    ("federation", "found"),
    [
        ("summed", "manifest.json is not what server signed"),
        ("finished", f"its manifest says that {WEIGHTS} has {HUGE} bytes, here it can have "),
    ],
)
def test_a_bundle_is_judged_by_its_list_its_manifests_and_their_signatures(
    federation: str, found: str, request: pytest.FixtureRequest, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder: Path = request.getfixturevalue(federation)
    manifest = folder / EXCHANGE / "broadcast" / MANIFEST
    said = json.loads(manifest.read_text())
    said["files"][WEIGHTS]["size_bytes"], said["parameters"] = HUGE, HUGE // 4
    manifest.write_text(json.dumps(said))
    bundle_of(tmp_path / "x.fedcollm", folder, "round-0002", "broadcast", named={WEIGHTS: HUGE})
    shutil.rmtree(folder / EXCHANGE / "broadcast")
    outcome = give(fedcollm, folder, "unpack", tmp_path / "x.fedcollm")
    assert outcome.code == 4
    assert found in outcome.err
    assert not (folder / EXCHANGE / "broadcast").exists()


def test_a_bundle_that_a_party_did_not_sign_is_refused(
    summed: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    manifest = summed / EXCHANGE / "broadcast" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"attempt": 0', '"attempt": 1'))
    bundle_of(tmp_path / "x.fedcollm", summed, "round-0002", "broadcast", named={})
    outcome = give(fedcollm, summed, "unpack", tmp_path / "x.fedcollm")
    assert outcome.code == 4
    assert "manifest.json is not what server signed" in outcome.err


def test_zeros_are_no_bundle(finished: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]) -> None:
    (tmp_path / "x.fedcollm").touch()
    os.truncate(tmp_path / "x.fedcollm", HUGE)
    assert "is not a bundle" in give(fedcollm, finished, "unpack", tmp_path / "x.fedcollm").err


# --- how large an adapter can be


def test_no_adapter_of_the_agreement_is_larger_than_is_expected(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    for role in ("slm", "llm"):
        most, real = tensor_files.most_numbers(workspace, role), shapes.of_workspace(workspace, role)
        assert most is not None
        assert real.adapter_parameters < most < 1000 * real.adapter_parameters


def test_without_the_base_model_nothing_is_known(workspace_folder: Path) -> None:
    (workspace_folder / "models").unlink()
    assert tensor_files.most_numbers(Workspace(workspace_folder), "slm") is None


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ({"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4]}}, "its header makes"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "in an unknown way"),
        ({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, "in an unknown way"),
    ],
)
def test_a_header_has_to_make_the_file_that_it_heads(header: dict[str, object], found: str, tmp_path: Path) -> None:
    content = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    os.truncate(path, HUGE)
    before = bytes_read()
    with pytest.raises(Damaged, match=found):
        reading.read(path, limit_bytes=reading.LARGEST_ADAPTER_BYTES, look=tensor_files.check_head)
    assert bytes_read() - before < 2 * tensor_files.LARGEST_HEADER_BYTES
