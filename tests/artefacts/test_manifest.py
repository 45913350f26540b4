"""manifest: what a folder says of itself, checked byte by byte before anything in it is used."""

from __future__ import annotations

import getpass
import hashlib
import json
import shutil
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from builders import AGREEMENT, edit, random_adapter
from stages.artefacts.adapter_files import config_bytes, weights_bytes
from stages.artefacts.draft import Draft
from stages.artefacts.lineage import check_belongs, parent_place
from stages.artefacts.manifest import BaseIdentity, Manifest
from stages.artefacts.publishing import already_made, publish
from stages.artefacts.reading import read_artefact, read_manifest
from stages.files import writing
from stages.parties.party import Onlooker, Party
from stages.runtime.errors import Damaged, NotReady, Problem, Refused
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST
from stages.workspace.paths import Workspace

PARENTS = {"broadcast": "a" * 64}
BASE = BaseIdentity(architecture="gpt2", weights_sha256="1" * 64, tokenizer_sha256="2" * 64)
ADAPTER = random_adapter({"h.0.lora_A.weight": (4, 8), "h.0.lora_B.weight": (6, 4)}, seed=1)


def make_workspace(folder: Path) -> Workspace:
    folder.mkdir()
    (folder / "fedcollm.toml").write_text(AGREEMENT)
    return Workspace(folder)


def published_in(workspace: Workspace, **changed: Any) -> Path:
    """Client 2's update of round 1, or what changed makes of it."""
    given: dict[str, Any] = {
        "stage": "client-train",
        "round": 1,
        "seed": 5,
        "steps": 6,
        "metrics": {"x": 0.5},
    }
    settings = workspace.agreement.slm
    contents = {
        ADAPTER_WEIGHTS: weights_bytes(ADAPTER),
        ADAPTER_CONFIG: config_bytes(settings.lora, target_modules=["c_attn"], fan_in_fan_out=True),
    }
    folder = workspace.client_update(1, 2)
    publish(
        folder,
        contents,
        Draft(
            parents=PARENTS,
            base=BASE,
            parameters=56,
            **given | changed,
        ),
        by=Party.client(workspace, 2),
    )
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "study")


@pytest.fixture
def update(workspace: Workspace) -> Path:
    return published_in(workspace)


def test_a_published_folder_is_read_back_with_every_byte(workspace: Workspace, update: Path) -> None:
    artefact = read_artefact(update)
    assert artefact.contents == {name: (update / name).read_bytes() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}
    assert artefact.sha256 == hashlib.sha256((update / MANIFEST).read_bytes()).hexdigest()
    assert (artefact.manifest.stage, artefact.manifest.round, artefact.manifest.client) == ("client-train", 1, 2)
    for name, entry in artefact.manifest.files.items():
        content = (update / name).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    agreement = (workspace.root / "fedcollm.toml").read_bytes()
    assert artefact.manifest.agreement_sha256 == hashlib.sha256(agreement).hexdigest()


def test_equal_runs_give_equal_manifest_bytes_wherever_they_ran(tmp_path: Path) -> None:
    one, other = (published_in(make_workspace(tmp_path / name)) for name in ("here", "there"))
    assert (one / MANIFEST).read_bytes() == (other / MANIFEST).read_bytes()


def values(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    else:
        yield node


def test_a_manifest_names_no_path_no_host_and_nobody(update: Path, tmp_path: Path) -> None:
    text = (update / MANIFEST).read_text() + (update / ADAPTER_CONFIG).read_text()
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    told = [value for value in values(json.loads((update / MANIFEST).read_text())) if isinstance(value, str)]
    assert [value for value in told if "/" in value] == ["fedcollm/1"]
    assert not {socket.gethostname(), getpass.getuser()} & set(told)


def test_an_auditor_finds_every_answer(update: Path) -> None:
    manifest = json.loads((update / MANIFEST).read_text())
    assert manifest["parents"] == PARENTS
    assert manifest["base"] == {"architecture": "gpt2", "weights_sha256": "1" * 64, "tokenizer_sha256": "2" * 64}
    assert manifest["lora"] == {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": []}
    assert manifest["parameters"] == 4 * 8 + 6 * 4
    assert {"seed", "steps", "examples", "tokens", "metrics", "federation"} <= manifest.keys()
    assert {"python", "fedcollm", "torch", "transformers", "peft", "safetensors", "numpy"} == manifest[
        "versions"
    ].keys()


# --- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.parents[2] / path.name)
    path.symlink_to(path.parents[2] / path.name)


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "{name} is missing"),
        (cut, "{name} has {fewer} bytes of {size}"),
        (flip, "{name} is not the file its manifest names"),
        (link, "{name} is a symbolic link"),
    ],
    ids=["missing", "cut short", "one bit changed", "a link"],
)
def test_a_damaged_file_is_named(update: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    size = (update / name).stat().st_size
    damage(update / name)
    expected = NotReady if damage in (Path.unlink, cut) else Damaged
    with pytest.raises(expected, match=message.format(name=name, size=size, fewer=size - 1)) as caught:
        read_artefact(update)
    assert caught.value.mend


@pytest.mark.parametrize("name", ["adapter_model.bin", "README.md", "checkpoint/"])
def test_a_file_too_many_is_named_and_never_opened(update: Path, name: str) -> None:
    (update / name).mkdir() if name.endswith("/") else (update / name).write_bytes(b"\x80\x04.")
    with pytest.raises(Damaged, match=f"{name.rstrip('/')} does not belong in an adapter folder") as caught:
        read_artefact(update)
    assert "remove it" in str(caught.value.mend)


def test_hidden_files_such_as_a_copy_in_progress_leaves_are_passed_over(update: Path) -> None:
    (update / ".adapter_model.safetensors.Xa91").write_bytes(b"half")
    assert read_artefact(update).contents.keys() == {ADAPTER_WEIGHTS, ADAPTER_CONFIG}


def test_a_folder_that_is_absent_is_not_ready(workspace: Workspace) -> None:
    with pytest.raises(NotReady):
        read_artefact(workspace.client_update(1, 3))


def test_a_folder_without_its_manifest_has_not_arrived(update: Path) -> None:
    (update / MANIFEST).unlink()
    with pytest.raises(NotReady, match=r"client-2 has no manifest\.json") as caught:
        read_manifest(update)
    assert "--overwrite" in str(caught.value.mend)


def test_a_link_to_a_folder_is_never_followed(update: Path) -> None:
    link(update)
    with pytest.raises(Damaged, match="client-2 is a symbolic link"):
        read_artefact(update)


def test_nothing_is_published_or_written_beyond_a_link_in_the_exchange(workspace: Workspace, update: Path) -> None:
    mine = workspace.client_data(2)
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    shutil.rmtree(update.parent)
    update.parent.symlink_to(Path("..", "private"))
    with pytest.raises(Damaged, match="round-0001 is a symbolic link") as caught:
        published_in(workspace)
    assert "remove the link" in str(caught.value.mend)
    keys = workspace.public_keys(2)
    keys.parent.symlink_to(mine.parent)
    with pytest.raises(Damaged, match="keys is a symbolic link"):
        writing.write(keys, b"public")
    assert [path.name for path in mine.parent.iterdir()] == ["train.jsonl"]
    assert mine.read_bytes() == b"mine"


def test_a_round_that_becomes_a_link_during_the_publication_is_not_followed(workspace: Workspace, update: Path) -> None:
    mine = workspace.client_data(2)
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")

    def swapped() -> None:
        with writing.publishing(update, levels=2) as draft:
            (draft / "a").write_bytes(b"")
            update.parent.rename(update.parent.with_name("moved"))
            update.parent.symlink_to(workspace.private)

    with pytest.raises(Damaged, match="round-0001 is a symbolic link"):
        swapped()
    assert mine.read_bytes() == b"mine"


def test_the_exchange_itself_may_be_a_link(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    workspace.exchange.symlink_to(tmp_path / "shared")
    read_artefact(published_in(workspace))
    writing.write(workspace.public_keys(2), b"public")


@pytest.mark.parametrize("name", ["train.jsonl", "round-0001/slm", ".fedcollm-secrets"])
def test_a_folder_that_holds_anything_else_is_not_replaced(workspace: Workspace, update: Path, name: str) -> None:
    stranger = update / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"mine")
    with pytest.raises(Damaged, match="which is not replaced"):
        published_in(workspace, steps=7)
    assert stranger.read_bytes() == b"mine"
    assert (update / MANIFEST).exists()


def test_a_file_in_the_place_of_a_folder_is_damaged(update: Path) -> None:
    shutil.rmtree(update)
    update.write_bytes(b"")
    with pytest.raises(Damaged, match="client-2"):
        read_artefact(update)


def test_a_link_in_the_place_of_a_manifest_is_never_followed(update: Path) -> None:
    link(update / MANIFEST)
    with pytest.raises(Damaged, match="symbolic link"):
        read_manifest(update)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"format": "fedcollm/2"}, "format"),
        ({"author": "me"}, "author"),
        ({"round": 0}, "round"),
        ({"round": "1"}, "round"),
        ({"client": 0}, "client"),
        ({"stage": "train"}, "stage"),
        ({"parents": {"broadcast": "A" * 64}}, "parents.broadcast"),
        ({"files": {"x": {"sha256": "a" * 64, "size_bytes": -1}}}, "files.x.size_bytes"),
        ({"examples": 1.5}, "examples"),
    ],
)
def test_a_manifest_that_says_anything_else_is_refused_by_key(update: Path, changed: dict[str, Any], key: str) -> None:
    text = json.loads((update / MANIFEST).read_text()) | changed
    (update / MANIFEST).write_text(json.dumps(text))
    with pytest.raises(Damaged, match=f"not a fedcollm/1 manifest: {key}: "):
        read_artefact(update)


@pytest.mark.parametrize("name", ["../../../fedcollm.toml", "/etc/hostname", "adapter_model.bin"])
def test_a_name_in_a_manifest_is_never_used_as_a_path(update: Path, name: str) -> None:
    manifest = json.loads((update / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"].pop(ADAPTER_CONFIG)
    (update / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="an adapter folder has"):
        read_artefact(update)


def test_a_number_beyond_all_numbers_is_refused_in_a_manifest(update: Path) -> None:
    claims = json.loads((update / MANIFEST).read_text()) | {"metrics": {"x": float("inf")}}
    with pytest.raises(ValidationError, match="finite"):
        Manifest.model_validate(claims)


def test_a_file_larger_than_its_manifest_says_is_not_read(update: Path) -> None:
    with (update / ADAPTER_WEIGHTS).open("r+b") as file:
        file.truncate(3 << 30)  # takes no place on the disk
    tracemalloc.start()
    try:
        with pytest.raises(Damaged, match=f"has {3 << 30} bytes, its manifest says "):
            read_artefact(update)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_parent_of_thousands_of_digits_is_no_client(workspace: Workspace, update: Path) -> None:
    parent_place(workspace, read_manifest(update)[0], "client-" + "9" * 5000)


# --- belonging


@pytest.mark.parametrize(
    ("expected", "claim"),
    [
        ({"stage": "broadcast"}, "stage"),
        ({"round": 2}, "round"),
        ({"client": 3}, "client"),
        ({"client": None}, "client"),
    ],
)
def test_a_sound_folder_in_the_wrong_place_is_refused_by_what_is_wrong(
    workspace: Workspace, update: Path, expected: dict[str, Any], claim: str
) -> None:
    place: dict[str, Any] = {"stage": "client-train", "round": 1, "client": 2, "by": Onlooker(workspace)}
    check_belongs(read_artefact(update), **place)
    with pytest.raises(Refused, match=f"is of another {claim}: ") as caught:
        check_belongs(read_artefact(update), **(place | expected))
    assert caught.value.mend


@pytest.mark.parametrize(
    ("old", "new", "claim"),
    [
        ('name = "tiny"', 'name = "other"', "federation"),
        ("learning_rate = 1e-2\n\n[dist", "learning_rate = 1e-3\n\n[dist", "agreement"),
        ("[slm.lora]\nr = 4", "[slm.lora]\nr = 8", "LoRA shape"),
    ],
)
def test_a_folder_made_under_another_agreement_is_refused(update: Path, old: str, new: str, claim: str) -> None:
    root = update.parents[2]
    edit(root / "fedcollm.toml", old, new)
    by = Onlooker(Workspace(root))
    with pytest.raises(Refused, match=f"is of another {claim}"):
        check_belongs(read_artefact(update), by=by, stage="client-train", round=1, client=2)


# --- already made


def made(update: Path, parents: dict[str, str] = PARENTS, **changed: Any) -> object:
    by = Party.client(Workspace(update.parents[2]), 2)
    return already_made(update, parents, by=by, **({"overwrite": False} | changed))


def test_equal_inputs_are_already_done(update: Path) -> None:
    assert made(update) == read_artefact(update).manifest
    assert made(update.with_name("client-3")) is None


@pytest.mark.parametrize(
    ("parents", "named"),
    [({"broadcast": "b" * 64}, "broadcast"), (PARENTS | {"llm": "c" * 64}, "llm"), ({}, "broadcast")],
)
def test_other_inputs_are_refused_by_name(update: Path, parents: dict[str, str], named: str) -> None:
    with pytest.raises(Refused, match=f"was made from other inputs; changed since: {named}$") as caught:
        made(update, parents)
    assert "--overwrite" in str(caught.value.mend)
    assert made(update, parents, overwrite=True) is None


def test_a_changed_agreement_and_changed_training_data_are_other_inputs(update: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"inputs": {"data": "old"}}\n')
    assert made(update, log=log, data="old")
    with pytest.raises(Refused, match=r"changed since: the training data$"):
        made(update, log=log, data="new")
    edit(update.parents[2] / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused, match=r"changed since: fedcollm\.toml: federation\.seed was 7, is 8"):
        made(update)


def test_a_damaged_result_is_not_done_and_can_be_replaced(update: Path) -> None:
    flip(update / ADAPTER_WEIGHTS)
    with pytest.raises(Problem, match="not the file its manifest names"):
        made(update)
    assert made(update, overwrite=True) is None
