"""files: whole or absent, read strictly, one process at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import ROOT, drafts
from stages.parts import files
from stages.parts.errors import Damaged, Held, NotReady, StorageProblem

OLD, NEW = {"a": b"old a", "gone": b"old"}, {"a": b"new a", "b": b"new b"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def failing_fsync(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the n-th fsync from now fail as on a full disk; the operating system's part, none of ours."""

    def arm(which: int) -> None:
        calls, real = iter(range(1, 100)), os.fsync

        def fsync(descriptor: int) -> None:
            if next(calls) == which:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return arm


def test_a_published_folder_holds_exactly_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "place"
    files.publish(folder, OLD)
    assert contents(folder) == OLD
    files.publish(folder, NEW)
    assert contents(folder) == NEW
    assert [path.name for path in folder.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("replacing", [False, True])
def test_a_draft_becomes_the_folder_only_when_its_block_ends(tmp_path: Path, replacing: bool) -> None:
    folder = tmp_path / "place"
    if replacing:
        files.publish(folder, OLD)

    def interrupted() -> None:
        with files.publishing(folder) as draft:
            (draft / "a").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert folder.exists() == replacing
    assert not replacing or contents(folder) == OLD
    assert drafts(tmp_path) == []
    with files.publishing(folder) as draft:
        (draft / "below").mkdir()
        (draft / "below" / "a").write_bytes(b"whole")
        assert folder.exists() == replacing
    assert [path.name for path in folder.iterdir()] == ["below"]
    assert (folder / "below" / "a").read_bytes() == b"whole"
    assert drafts(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_whatever_stands_in_the_place_is_replaced_and_nothing_beyond_a_link_is_touched(
    tmp_path: Path, kind: str
) -> None:
    place, beyond = tmp_path / "place", tmp_path / "beyond"
    beyond.mkdir()
    (beyond / "a").touch()
    place.touch() if kind == "file" else place.symlink_to(beyond if kind == "link" else tmp_path / "nowhere")
    files.publish(place, NEW)
    assert contents(place) == NEW
    assert (beyond / "a").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beyond", "place"]


# publish syncs: file a, file b, the folder of both; these come before the renaming. After it, the folder around.
@pytest.mark.parametrize("which", [1, 2, 3])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_publication_that_fails_half_way_leaves_what_was_there_and_no_draft(
    tmp_path: Path, failing_fsync: Callable[[int], None], which: int, replacing: bool
) -> None:
    folder = tmp_path / "place"
    if replacing:
        files.publish(folder, OLD)
    failing_fsync(which)
    with pytest.raises(OSError, match="No space left"):
        files.publish(folder, NEW)
    assert (contents(folder) == OLD) if replacing else not folder.exists()
    assert drafts(tmp_path) == []
    files.publish(folder, NEW)
    assert contents(folder) == NEW


@pytest.mark.parametrize("replacing", [False, True])
def test_one_that_fails_in_the_last_moment_is_whole_and_leaves_no_draft(
    tmp_path: Path, failing_fsync: Callable[[int], None], replacing: bool
) -> None:
    folder = tmp_path / "place"
    if replacing:
        files.publish(folder, OLD)
    failing_fsync(4)
    with pytest.raises(OSError, match="No space left"):
        files.publish(folder, NEW)
    assert contents(folder) == NEW
    assert drafts(tmp_path) == []


def test_one_whose_last_renaming_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "place", Path.rename
    files.publish(folder, OLD)

    def rename(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        files.publish(folder, NEW)
    assert contents(folder) == OLD
    assert drafts(tmp_path) == []


def test_drafts_that_a_killed_process_of_this_number_left_are_no_hindrance(tmp_path: Path) -> None:
    # In a container every process may have the same number.
    folder = tmp_path / "place"
    files.publish(folder, OLD)
    for kind in ("partial", "replaced"):
        left = tmp_path / f".place.{os.getpid()}.{kind}"
        left.mkdir()
        (left / "a").write_bytes(b"half")
    files.publish(folder, NEW)
    assert contents(folder) == NEW
    assert drafts(tmp_path) == []


@pytest.mark.parametrize("which", [1, 2])
def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, failing_fsync: Callable[[int], None], which: int
) -> None:
    path = tmp_path / "new" / "log.jsonl"
    files.write(path, b"old")
    failing_fsync(which)  # of the draft; then, after the renaming, of the folder
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"new")
    assert path.read_bytes() == {1: b"old", 2: b"new"}[which]
    assert [found.name for found in path.parent.iterdir()] == ["log.jsonl"]


def test_a_full_disk_is_named_with_the_file_and_the_mend(tmp_path: Path, failing_fsync: Callable[[int], None]) -> None:
    failing_fsync(2)
    with pytest.raises(StorageProblem, match="No space left") as caught, files.naming_storage_faults():
        files.publish(tmp_path / "place", NEW)
    assert str(caught.value.where).endswith("/b")
    assert "free some space" in str(caught.value.mend)


def test_a_place_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageProblem) as caught, files.naming_storage_faults():
        files.write(tmp_path / "file" / "below", b"")
    assert "permissions" in str(caught.value.mend)


def test_what_is_read_is_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x00\xff\r\n")
    assert files.read(tmp_path / "x", limit_bytes=4) == b"\x00\xff\r\n"


def test_what_is_not_there_is_not_there_yet(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="x is not there"):
        files.read(tmp_path / "x", limit_bytes=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "symbolic link"),
        (lambda path: path.symlink_to("nowhere"), "symbolic link"),
        (lambda path: path.mkdir(), "not a plain file"),
        (os.mkfifo, "not a plain file"),
        (lambda path: path.write_bytes(b"12345"), "has 5 bytes, at most 4"),
    ],
    ids=["link", "dangling link", "folder", "pipe", "too large"],
)
def test_anything_but_a_plain_file_of_a_sane_size_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(Damaged, match=message):
        files.read(tmp_path / "x", limit_bytes=4)


@pytest.mark.parametrize(
    "text",
    [
        *(
            '{"a": 1, "a": 2}',
            '{"x": {"a": 1, "a": 1}}',
            '{"a": NaN}',
            '{"a": Infinity}',
            '{"a": -Infinity}',
            '{"a": 1e999}',
            '{"a": "\\ud800"}',
        ),
        *("[1]", "1", "", '{"a": 1', "{" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, '"\udcff"'),
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Damaged, match="is not valid JSON") as caught:
        files.read_json(tmp_path / "x.json")
    assert "copy it again" in str(caught.value.mend)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le", "utf-8-sig"])
def test_json_in_another_encoding_than_utf_8_is_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match=r"utf-8|BOM|Expecting"):
        files.parse_json('{"a": 1}'.encode(encoding))


def test_equal_values_are_equal_json_bytes() -> None:
    value = {"b": [1, 2.5], "a": {"ü": None}}
    assert files.json_bytes(value) == files.json_bytes(dict(reversed(value.items())))
    assert files.parse_json(files.json_bytes(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.json_bytes(float("nan"))


def test_the_inputs_of_a_log_are_those_of_its_first_line(tmp_path: Path) -> None:
    assert files.logged_inputs(tmp_path / "log.jsonl") == {}
    files.write_log(tmp_path / "log.jsonl", [{"inputs": {"data": "abc"}}, {"step": 1}])
    assert files.logged_inputs(tmp_path / "log.jsonl") == {"data": "abc"}


HOLDER = """
import sys
from pathlib import Path
from stages.parts import files
with files.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that does the work at tmp_path/new/x.lock until its stdin is closed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "new" / "x.lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_work_that_another_process_does_is_held_until_that_process_is_gone(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    path = tmp_path / "new" / "x.lock"
    with pytest.raises(Held, match="another process") as caught, files.held(path):
        pytest.fail("two processes do the same work")
    assert caught.value.where == path
    with files.held(path.with_name("y.lock")):  # other work is free
        pass
    holder.kill()
    holder.wait()
    with files.held(path):
        pass
