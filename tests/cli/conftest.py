"""What the tests of the command line share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, drafts, published, remembered, sign
from faulty_federations import AGGREGATE, make_states, state


@pytest.fixture
def refused(fedcollm: Callable[..., Outcome], own_secrets: Path) -> Callable[..., str]:
    """Give a command that must fail: refused(folder, 4, "aggregate", "--round", 1) -> what it said.

    It has to end with that exit code, to say where and what mends it, and to leave every published file, and what the
    parties keep outside the workspace, alone.
    """

    def call(folder: Path, code: int, *words: object) -> str:
        before, kept = published(folder), remembered(own_secrets)
        outcome = fedcollm(*words, "-w", folder)
        assert outcome.code == code, outcome.err
        assert "\nerror: " in f"\n{outcome.err}"
        assert "\n  in    " in outcome.err, f"names no file: {outcome.err}"
        assert "\n  mend  " in outcome.err, f"names no mend: {outcome.err}"
        assert "Traceback" not in outcome.err
        assert outcome.out == ""
        assert published(folder) == before
        assert drafts(folder) == []
        assert remembered(own_secrets) == kept
        return outcome.err

    return call


# --- secure aggregation


@pytest.fixture(scope="session")
def secure_states(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Path:
    """The first round of a federation in secure mode, as it stands after each step; made once, to be copied."""
    place = tmp_path_factory.mktemp("secure")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(place / "secrets"))
        return make_states(place, base_models)


@pytest.fixture
def secure(secure_states: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Such a federation of one's own, with its keys: secure("answered") -> the workspace."""
    return lambda name: state(secure_states, name, tmp_path)


@pytest.fixture
def give(fedcollm: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Give a command that must end well: give(folder, "aggregate", "--round", 1)."""

    def call(folder: Path, *words: object, code: int = 0) -> Outcome:
        outcome = fedcollm(*words, "-w", folder)
        assert outcome.code == code, outcome.err
        return outcome

    return call


@pytest.fixture
def three(secure: Callable[[str], Path], tmp_path: Path, give: Callable[..., Outcome]) -> Path:
    """A round that was closed without client 4, whose update comes later: it waits in tmp_path/late."""
    folder = secure("answered")
    (folder / ROUND / "client-4").rename(tmp_path / "late")
    said = give(folder, *AGGREGATE, code=3).err
    assert "warning: closing over 3 of 4 clients, for good; absent: client 4" in said
    return folder


# --- bundles

ROUND, MANIFEST = "exchange/round-0001", "manifest.json"


@pytest.fixture
def server(answered: Path, tmp_path: Path) -> Path:
    """The server's machine, which waits for client 2; what client 2 has is in `answered`."""
    folder = shutil.copytree(answered, tmp_path / "server", symlinks=True)
    shutil.rmtree(folder / ROUND / "client-2")
    return folder


@pytest.fixture
def pack(answered: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]) -> Callable[..., Path]:
    """Pack something of `answered`: pack("--client", 2, "--round", 1) -> the bundle."""

    def call(*words: object) -> Path:
        bundle = tmp_path / "x.fedcollm"
        outcome = fedcollm("pack", *words, "--output", bundle, "--overwrite", "-w", answered)
        assert outcome.code == 0, outcome.err
        assert outcome.out == f"{bundle}\n"
        return bundle

    return call


def _forged(folder: Path, like: Path, files: dict[str, bytes], **claims: object) -> None:
    """A folder of another kind, with a manifest like that one."""
    folder.mkdir(parents=True)
    manifest = json.loads((like / MANIFEST).read_text())
    manifest["files"] = {name: {} for name in files}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    sign(folder, **claims)
    (folder / f"{MANIFEST}.sig").write_text('{"v": 1}\n')


@pytest.fixture
def revealed(answered: Path) -> Path:
    """A round that was closed, and whose client 2 has revealed; the bytes mean nothing."""
    base = answered / ROUND / "broadcast"
    shutil.rmtree(answered / ROUND / "client-2")
    _forged(
        answered / ROUND / "client-2",
        base,
        {"masked.safetensors": b"y", "shares.safetensors": b"s"},
        stage="client-train",
        client=2,
        masking={"y_sha256": "0" * 64, "commit_self": "0" * 64, "commit_pairs": {}},
    )
    inboxes = {f"client-{k}.safetensors": bytes([k]) for k in (1, 2, 3)}
    _forged(answered / ROUND / "close", base, inboxes, stage="close")
    _forged(answered / ROUND / "reveal-2", base, {"reveal.bin": b"r"}, stage="reveal", client=2)
    return answered
