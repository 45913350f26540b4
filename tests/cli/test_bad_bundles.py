"""A bundle that is broken, forged or of elsewhere: unpack says so and puts nothing in its place."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import bundled, contents, drafts, edit, published, sign
from stages.exchange.bundles import bundle_bytes
from stages.exchange.unpack import Unpacked, unpack
from stages.runtime.errors import Problem
from stages.workspace.paths import Workspace

ROUND = "exchange/round-0001"
UPDATE = "round-0001/client-2"
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
Members = dict[str, bytes]


Change = Callable[[Members], Members]


def without(name: str) -> Change:
    return lambda found: {key: content for key, content in found.items() if not key.endswith(name)}


def moved(to: str) -> Change:
    return lambda found: {key.replace(UPDATE, to): content for key, content in found.items()}


def having(name: str, content: bytes = b"{}") -> Change:
    return lambda found: found | {name: content}


def claiming(**claims: object) -> Change:
    """Another manifest over the same files."""

    def change(found: Members) -> Members:
        name = f"{UPDATE}/{MANIFEST}"
        return found | {name: json.dumps(json.loads(found[name]) | claims).encode()}

    return change


def weights(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Other tensors, which the manifest vouches for."""

    def harm(found: Members) -> Members:
        tensors = safetensors.numpy.load(found[f"{UPDATE}/{WEIGHTS}"])
        changed = {name: change(tensor) for name, tensor in tensors.items()}
        content = safetensors.numpy.save(changed, metadata={"format": "pt"})
        manifest = json.loads(found[f"{UPDATE}/{MANIFEST}"])
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][WEIGHTS] = {"sha256": digest, "size_bytes": len(content)}
        return found | {f"{UPDATE}/{WEIGHTS}": content, f"{UPDATE}/{MANIFEST}": json.dumps(manifest).encode()}

    return harm


NOTHING = "is nothing that this federation exchanges: it has 2 rounds, clients 1 to 3"
OTHER = "0" * 64
UNSOUND: dict[str, tuple[Change, int, str]] = {
    "up and out of the exchange": (having("round-0001/../../evil.json"), 5, f"round-0001/../../evil.json {NOTHING}"),
    "up and in again": (moved("round-0001/client-1/../client-2"), 5, NOTHING),
    "doubled slash": (moved("round-0001//client-2"), 5, NOTHING),
    "into private": (having("private/server/held-out.jsonl"), 5, NOTHING),
    "the agreement": (having("fedcollm.toml"), 5, NOTHING),
    "a round that is not": (moved("round-0009/client-2"), 5, NOTHING),
    "round 0": (moved("round-0000/client-2"), 5, NOTHING),
    "a client that is not": (moved("round-0001/client-9"), 5, NOTHING),
    "client 0": (moved("round-0001/client-0"), 5, NOTHING),
    "a client in another spelling": (moved("round-0001/client-02"), 5, NOTHING),
    "a round in another spelling": (moved("round-00001/client-2"), 5, NOTHING),
    "a client without a number": (moved("round-0001/client"), 5, NOTHING),
    "a broadcast with a number": (moved("round-0001/broadcast-2"), 5, NOTHING),
    "a pickle": (having(f"{UPDATE}/adapter_model.bin"), 5, NOTHING),
    "a hidden file": (having(f"{UPDATE}/.bashrc"), 5, NOTHING),
    "keys of nobody": (having("keys/client-9.json"), 5, NOTHING),
    "another client's place": (moved("round-0001/client-3"), 5, "client-3 is of another client: 2, here it is 3"),
    "another round's place": (moved("round-0002/client-2"), 5, "client-2 is of another round: 1, here it is 2"),
    "the broadcast's place": (moved("round-0001/broadcast"), 5, "broadcast is of another stage: client-train"),
    "no manifest": (without(MANIFEST), 4, "client-2 has no manifest.json"),
    "no weights": (without(WEIGHTS), 4, f"{WEIGHTS} is missing"),
    "a masked update beside": (having(f"{UPDATE}/masked.safetensors"), 4, "masked.safetensors is not in the manifest"),
    "other weights": (having(f"{UPDATE}/{WEIGHTS}"), 4, f"{WEIGHTS} is not the file its manifest names: 2 bytes"),
    "a manifest that is no JSON": (having(f"{UPDATE}/{MANIFEST}", b"{'"), 4, f"{MANIFEST} is not valid JSON"),
    "a manifest that is none": (having(f"{UPDATE}/{MANIFEST}"), 4, "not a manifest: federation: Field required"),
    "a signature that is no JSON": (having(f"{UPDATE}/{MANIFEST}.sig", b"x"), 4, f"{MANIFEST}.sig is not valid JSON"),
    "another federation's manifest": (claiming(federation="other"), 5, "is of another federation: other, here it is"),
    "another agreement": (claiming(agreement_sha256=OTHER), 5, "is of another agreement: 0000"),
    "a list of other files": (claiming(files={}), 4, "the manifest lists [], which is not what client-2 has"),
    "half precision": (weights(lambda tensor: tensor.astype("f2")), 4, "as F16; adapters are exchanged as F32"),
    "no number": (weights(lambda tensor: tensor * np.float32(np.nan)), 6, "holds NaN or infinity"),
    "keys without a signature": (having("keys/client-2.json"), 4, "client-2.json.sig is missing"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_a_sound_bundle_of_unsound_files_is_refused_whole(
    kind: str, server: Path, pack: Callable[..., Path], refused: Callable[..., str]
) -> None:
    change, code, expected = UNSOUND[kind]
    bundle = pack("--client", 2, "--round", 1)
    bundle.write_bytes(bundle_bytes("tiny", change(bundled(bundle))))
    assert expected in refused(server, code, "unpack", bundle, "--overwrite")
    assert not (server / ROUND / "client-2").exists()


def test_nothing_is_put_in_place_if_the_second_folder_is_unsound(
    server: Path, revealed: Path, refused: Callable[..., str]
) -> None:
    sign(revealed / ROUND / "reveal-2", client=3)
    names = {f"round-0001/{name}": contents(revealed / ROUND / name) for name in ("client-2", "reveal-2")}
    path = server / "x.fedcollm"
    path.write_bytes(
        bundle_bytes("tiny", {f"{at}/{name}": c for at, found in names.items() for name, c in found.items()})
    )
    assert "reveal-2 is of another client: 3, here it is 2" in refused(server, 5, "unpack", path)
    assert not (server / ROUND / "client-2").exists()


def test_a_bundle_of_another_federation_is_refused_by_name(
    server: Path, pack: Callable[..., Path], refused: Callable[..., str]
) -> None:
    bundle = pack("--client", 2, "--round", 1)
    bundle.write_bytes(bundle_bytes("other", bundled(bundle)))
    assert "x.fedcollm is of another federation: other, here it is tiny" in refused(server, 5, "unpack", bundle)


def test_a_workspace_whose_agreement_was_edited_takes_nothing(
    server: Path, pack: Callable[..., Path], refused: Callable[..., str]
) -> None:
    bundle = pack("--client", 2, "--round", 1)
    edit(server / "fedcollm.toml", "rounds = 2", "rounds = 3")
    assert "client-2 is of another agreement" in refused(server, 5, "unpack", bundle)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "cut short": (lambda content: content[:-1000], 3, "still arriving, or cut short"),
    "followed by more": (lambda content: content + b"\n", 4, "its own list makes"),
    "text-mode transfer": (lambda content: content.replace(b"\n", b"\r\n"), 4, "line ends were changed on the way"),
    "empty": (lambda content: b"", 3, "has 0 bytes, not even its own list"),
    "a text": (lambda content: b"hello", 4, "is not a bundle"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_bundle_is_refused(
    kind: str, server: Path, pack: Callable[..., Path], refused: Callable[..., str]
) -> None:
    change, code, expected = BROKEN[kind]
    bundle = pack("--client", 2, "--round", 1)
    bundle.write_bytes(change(bundle.read_bytes()))
    assert expected in refused(server, code, "unpack", bundle)


def test_a_bomb_is_never_inflated(server: Path, pack: Callable[..., Path], refused: Callable[..., str]) -> None:
    bundle = pack("--client", 2, "--round", 1)
    inside, file = bundled(bundle), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", zipfile.ZipFile(bundle).read("bundle.json"), zipfile.ZIP_STORED)
        for name in inside:
            archive.writestr(name, bytes(50 << 20))
    bundle.write_bytes(file.getvalue())
    assert "its own list makes" in refused(server, 4, "unpack", bundle)


def test_a_bundle_that_is_not_there_or_is_a_link_is_refused(
    server: Path, pack: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert "nowhere.fedcollm is not there" in refused(server, 3, "unpack", server / "nowhere.fedcollm")
    (server / "link").symlink_to(pack("--client", 2, "--round", 1))
    assert "link is a symbolic link" in refused(server, 4, "unpack", server / "link")


def test_a_link_in_the_place_of_a_folder_is_not_followed(
    server: Path, answered: Path, pack: Callable[..., Path], refused: Callable[..., str]
) -> None:
    bundle = pack("--client", 2, "--round", 1)
    (server / ROUND / "client-2").symlink_to(answered / ROUND / "client-2")
    assert "is there already, and is not what" in refused(server, 5, "unpack", bundle)


NAMES = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9_./-]{0,30}", fullmatch=True),
    st.from_regex(
        r"(round-0{0,5}[0-3]|keys|a/\.\.)/(client|broadcast|close|reveal)(-[0-4])?(/[a-z_]{1,9}\.json)?", fullmatch=True
    ),
    st.sampled_from([f"{UPDATE}/{name}" for name in (WEIGHTS, CONFIG, MANIFEST, f"{MANIFEST}.sig")]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.dictionaries(NAMES, st.binary(max_size=40), max_size=3), gone=st.sets(st.sampled_from([WEIGHTS, CONFIG]))
)
def test_whatever_is_in_a_bundle_only_problems_are_raised_and_nothing_is_written(
    found: Members, gone: set[str], finished_once: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = {f"{UPDATE}/{name}": content for name, content in contents(finished_once / ROUND / "client-2").items()}
    inside = {name: content for name, content in whole.items() if name.rpartition("/")[2] not in gone} | found
    path, before = tmp_path_factory.getbasetemp() / "fuzz.fedcollm", published(finished_once)
    path.write_bytes(bundle_bytes("tiny", inside))
    try:
        done = unpack(Workspace(finished_once), path)
    except Problem as problem:
        assert problem.mend  # noqa: PT017
    else:
        assert inside == whole
        assert done == Unpacked(unpacked=[], already=[f"{ROUND}/client-2"])
    assert published(finished_once) == before
    assert drafts(finished_once) == []
