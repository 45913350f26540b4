"""Below private/, whatever the umask, everything is its owner's alone; elsewhere the umask decides."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import make_workspace
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.files import locks, writing
from stages.files.seclusion import is_private, shut, shutting_out
from stages.workspace.paths import Workspace


@pytest.fixture(autouse=True, params=[0o000, 0o022], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield int(request.param)
    os.umask(before)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "fedcollm.toml").touch()
    return tmp_path / "private/client-1/round-0001"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def open_to_others(folder: Path) -> list[Path]:
    return [path for path in (folder, *folder.rglob("*")) if mode(path) & 0o077]


def test_files_folders_and_locks_below_private_are_for_their_owner(place: Path, tmp_path: Path) -> None:
    writing.write(place / "a.jsonl", b"1")
    writing.publish(place / "slm", {"b": b"2"})
    with locks.held(place / "next.lock"):
        assert open_to_others(tmp_path / "private") == []
    with writing.publishing(place / "made") as draft:
        (draft / "by a library").write_bytes(b"3")
        assert open_to_others(draft) == []
    assert open_to_others(tmp_path / "private") == []
    assert mode(place / "made/by a library") == 0o600


def test_elsewhere_the_umask_decides(tmp_path: Path, umask: int) -> None:
    (tmp_path / "fedcollm.toml").touch()
    for path in (tmp_path / "exchange/a", tmp_path / "elsewhere/private/a", tmp_path / "privately/a"):
        assert not is_private(path)
        writing.write(path, b"1")
        assert (mode(path), mode(path.parent)) == (0o666 & ~umask, 0o777 & ~umask)
    with shutting_out(tmp_path / "exchange"):
        (tmp_path / "more").touch()
    assert mode(tmp_path / "more") == 0o666 & ~umask


def test_what_was_there_keeps_its_permissions_and_what_is_copied_in_loses_them(place: Path) -> None:
    place.mkdir(parents=True)
    given = mode(place)
    writing.write(place / "a", b"1")
    assert mode(place) == given
    (place / "copied").mkdir()
    (place / "copied/b").touch()
    shut(place / "copied")
    assert open_to_others(place / "copied") == []


def test_a_training_leaves_nothing_open(tmp_path: Path, base_models: Path) -> None:
    study = make_workspace(tmp_path / "study", base_models)
    (study / "machine.toml").write_text("checkpoint_steps = 2\ntrackers = []\n")
    workspace, seen = Workspace.find(study), list[Path]()
    broadcast(workspace, round=1)
    before = set((study / "private").rglob("*"))

    def look(_: object) -> None:
        seen.extend(open_to_others(study / "private"))

    client_train(workspace, client=1, round=1, report=look)
    made = set((study / "private").rglob("*")) - before
    assert made
    assert not {path for path in {*made, *seen} - {study / "private"} - before if path.exists() and mode(path) & 0o077}
    assert not {path for path in seen if "client-train" in path.as_posix()}
