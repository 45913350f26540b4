"""files: whole or absent, read strictly, one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builders import ROOT, drafts
from stages.files import faults, locks, reading, seen_places, writing
from stages.runtime.errors import Damaged, Held, NotReady, StorageProblem
from storage_faults import without_locks

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
    writing.publish(folder, OLD)
    assert contents(folder) == OLD
    writing.publish(folder, NEW)
    assert contents(folder) == NEW
    assert [path.name for path in folder.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("replacing", [False, True])
def test_a_draft_becomes_the_folder_only_when_its_block_ends(tmp_path: Path, replacing: bool) -> None:
    folder = tmp_path / "place"
    if replacing:
        writing.publish(folder, OLD)

    def interrupted() -> None:
        with writing.publishing(folder) as draft:
            (draft / "a").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert folder.exists() == replacing
    assert not replacing or contents(folder) == OLD
    assert drafts(tmp_path) == []
    with writing.publishing(folder) as draft:
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
    writing.publish(place, NEW)
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
        writing.publish(folder, OLD)
    failing_fsync(which)
    with pytest.raises(OSError, match="No space left"):
        writing.publish(folder, NEW)
    assert (contents(folder) == OLD) if replacing else not folder.exists()
    assert drafts(tmp_path) == []
    writing.publish(folder, NEW)
    assert contents(folder) == NEW


@pytest.mark.parametrize("replacing", [False, True])
def test_one_that_fails_in_the_last_moment_is_whole_and_leaves_no_draft(
    tmp_path: Path, failing_fsync: Callable[[int], None], replacing: bool
) -> None:
    folder = tmp_path / "place"
    if replacing:
        writing.publish(folder, OLD)
    failing_fsync(4)
    with pytest.raises(OSError, match="No space left"):
        writing.publish(folder, NEW)
    assert contents(folder) == NEW
    assert drafts(tmp_path) == []


def test_one_whose_last_renaming_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "place", Path.rename
    writing.publish(folder, OLD)

    def rename(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        writing.publish(folder, NEW)
    assert contents(folder) == OLD
    assert drafts(tmp_path) == []


def test_what_killed_processes_left_beside_is_no_hindrance_and_goes_in_time(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    writing.publish(folder, OLD)
    for name in (f"{os.getpid()}.partial", f"{os.getpid()}-00c0ffee.partial", "7-00c0ffee.replaced", "8.partial"):
        left = tmp_path / f".place.{name}"
        left.mkdir()
        (left / "a").write_bytes(b"half")
        if name.startswith(str(os.getpid())):
            os.utime(left, (0, 0))
    writing.publish(folder, NEW)
    assert contents(folder) == NEW
    assert [path.name for path in drafts(tmp_path)] == [".place.8.partial"]  # whose process may live


def killed_while_writing(path: Path) -> None:
    """Another process, which is killed when the draft is whole and has not its name yet."""
    code = (
        "import os, sys; from pathlib import Path; from stages.files import writing;"
        "Path.replace = Path.rename = lambda *_: os.kill(os.getpid(), 9);"
        "writing.write(Path(sys.argv[1]), b'half')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=environment).returncode == -9


def test_what_a_process_that_was_killed_here_left_is_erased_by_the_next_that_writes_there(tmp_path: Path) -> None:
    for name in ("slm.json", "llm.json"):
        killed_while_writing(tmp_path / name)
    assert len(drafts(tmp_path)) == 1  # the second erased the first's, and was killed itself
    (tmp_path / f".llm.json.{os.getpid()}-{drafts(tmp_path)[0].name.split('-')[1]}").touch()  # of one that lives
    (tmp_path / ".notes.partial").touch()  # whose ever that is
    writing.write(tmp_path / "slm.json", b"whole")
    assert {path.name.split("-")[0] for path in drafts(tmp_path)} == {f".llm.json.{os.getpid()}", ".notes.partial"}
    assert (tmp_path / "slm.json").read_bytes() == b"whole"


@pytest.mark.parametrize("which", [1, 2])
def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, failing_fsync: Callable[[int], None], which: int
) -> None:
    path = tmp_path / "new" / "log.jsonl"
    writing.write(path, b"old")
    failing_fsync(which)  # of the draft; then, after the renaming, of the folder
    with pytest.raises(OSError, match="No space left"):
        writing.write(path, b"new")
    assert path.read_bytes() == {1: b"old", 2: b"new"}[which]
    assert [found.name for found in path.parent.iterdir()] == ["log.jsonl"]


def test_a_full_disk_is_named_with_the_file_and_the_mend(tmp_path: Path, failing_fsync: Callable[[int], None]) -> None:
    failing_fsync(2)
    with pytest.raises(StorageProblem, match="No space left") as caught, faults.naming_storage_faults():
        writing.publish(tmp_path / "place", NEW)
    assert str(caught.value.where).endswith("/b")
    assert "free some space" in str(caught.value.mend)


def test_a_place_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageProblem) as caught, faults.naming_storage_faults():
        writing.write(tmp_path / "file" / "below", b"")
    assert "permissions" in str(caught.value.mend)


def test_what_is_read_is_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x00\xff\r\n")
    assert reading.read(tmp_path / "x", limit_bytes=4) == b"\x00\xff\r\n"


def test_what_is_not_there_is_not_there_yet(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="x is not there"):
        reading.read(tmp_path / "x", limit_bytes=4)


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
        reading.read(tmp_path / "x", limit_bytes=4)


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
        reading.read_json(tmp_path / "x.json")
    assert "copy it again" in str(caught.value.mend)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le", "utf-8-sig"])
def test_json_in_another_encoding_than_utf_8_is_refused(encoding: str) -> None:
    with pytest.raises(ValueError, match=r"utf-8|BOM|Expecting"):
        reading.parse_json('{"a": 1}'.encode(encoding))


def test_equal_values_are_equal_json_bytes() -> None:
    value = {"b": [1, 2.5], "a": {"ü": None}}
    assert reading.json_bytes(value) == reading.json_bytes(dict(reversed(value.items())))
    assert reading.parse_json(reading.json_bytes(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        reading.json_bytes(float("nan"))


def test_the_inputs_of_a_log_are_those_of_its_first_line(tmp_path: Path) -> None:
    assert reading.logged_inputs(tmp_path / "log.jsonl") == {}
    writing.write_log(tmp_path / "log.jsonl", [{"inputs": {"data": "abc"}}, {"step": 1}])
    assert reading.logged_inputs(tmp_path / "log.jsonl") == {"data": "abc"}


HOLDER = """
import sys
from pathlib import Path
from stages.files import locks
with locks.held(Path(sys.argv[1])):
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


def test_work_that_another_process_does_is_waited_for_until_that_process_is_gone(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    path, said, is_killed = tmp_path / "new" / "x.lock", list[str](), threading.Event()
    with locks.held(path.with_name("y.lock")):  # other work is free
        pass
    with ThreadPoolExecutor() as pool:

        def work() -> bool:
            with locks.held(path, report=lambda event: said.append(event.text)):
                return is_killed.is_set()

        was_gone = pool.submit(work)
        with pytest.raises(TimeoutError):
            was_gone.result(timeout=0.5)
        is_killed.set()
        holder.kill()
        assert was_gone.result(timeout=60)
    assert said == [
        f"another process is doing this stage: waiting for it (process {holder.pid} on {os.uname().nodename})"
    ]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_where_there_are_no_locks_work_goes_on_unless_it_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    without_locks(monkeypatch, number)
    with locks.held(tmp_path / "x.lock"), locks.held(tmp_path / "x.lock"):
        pass
    with (
        pytest.raises(StorageProblem, match="no locks") as caught,
        locks.held(tmp_path / "y.lock", without="move it"),
    ):
        pytest.fail("it was done without a lock")
    assert (caught.value.mend, caught.value.where) == ("move it", tmp_path / "y.lock")


def test_any_other_failure_of_a_lock_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), locks.held(tmp_path / "x.lock"):
        pytest.fail("it was done without a lock")


def test_only_what_was_seen_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    early, late = seen_places.Place(folder), seen_places.Place(folder)
    writing.publish(folder, OLD, over=late)
    assert early.has_changed
    assert not late.has_changed
    with pytest.raises(Held, match="another process published place first"):
        writing.publish(folder, NEW, over=early)
    assert contents(folder) == OLD
    writing.publish(folder, NEW, over=late)
    assert contents(folder) == NEW
    early.look()
    writing.publish(folder, OLD, over=early)
    with pytest.raises(Held, match="another process published place first"):
        writing.publish(folder, NEW, over=late)
    assert contents(folder) == OLD
    other = seen_places.Place(tmp_path / "file")
    writing.write(other.path, b"first")
    with pytest.raises(Held, match="another process published file first"):
        writing.write(other.path, b"second", over=other)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert drafts(tmp_path) == []


PUBLISHER = """
import sys
from pathlib import Path
from stages.files import writing
from stages.runtime.errors import Held
folder, own = Path(sys.argv[1]), sys.argv[2].encode()
place = writing.Place(folder)
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    try:
        writing.publish(folder, {"a": own, "b": own}, over=place if sys.argv[3] == "seen" else None)
        print("published", flush=True)
    except Held:
        place.look()
"""


@pytest.mark.parametrize("over", ["seen", "any"])
def test_of_many_that_publish_at_once_each_time_one_does_and_nothing_is_mixed(tmp_path: Path, over: str) -> None:
    folder = tmp_path / "place"
    command = [sys.executable, "-c", PUBLISHER, str(folder)]
    with contextlib.ExitStack() as stack:
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [
            stack.enter_context(subprocess.Popen([*command, str(number), over], cwd=ROOT, **pipe))  # type: ignore[call-overload]
            for number in range(3)
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=100)[0].count("published") for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0]
    assert contents(folder)["a"] == contents(folder)["b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
    assert min(said) > 0 if over == "any" else sum(said) > 0
    assert over == "seen" or said == [60, 60, 60]


@pytest.mark.parametrize("left", [1, 2])
def test_what_a_process_killed_between_two_renamings_had_moved_away_is_put_back(tmp_path: Path, left: int) -> None:
    folder = tmp_path / "place"
    for number, content in enumerate([NEW, OLD][-left:]):
        writing.publish(folder, content)
        folder.rename(tmp_path / f".place.{number}-00c0ffee.replaced")
        time.sleep(0.02)
    other = tmp_path / ".place-2.7-00c0ffee.replaced"  # of another place
    other.mkdir()
    writing.put_right(folder)
    assert contents(folder) == OLD  # the later one
    assert drafts(tmp_path) == [other]
    writing.put_right(folder)
    assert contents(folder) == OLD
    folder.rename(tmp_path / ".place.7.replaced")  # as earlier versions call it
    writing.publish(folder, NEW)
    assert contents(folder) == NEW
    assert drafts(tmp_path) == [other]


def test_one_flipped_bit_anywhere_in_a_log_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    writing.write_log(path, [{"inputs": {"data": "abc"}}, {"step": 1, "slm_ft": 2.5}, {"wall_s": 1.0}])
    reading.check_log(path)
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(Damaged, match=r"log\.jsonl"):
            reading.check_log(path)


def test_what_goes_away_in_the_exchange_while_it_is_read_is_not_there_yet(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match="went away while it was read"), faults.naming_storage_faults():
        list((tmp_path / "exchange/round-0001/client-1").iterdir())
    with pytest.raises(StorageProblem), faults.naming_storage_faults():
        list((tmp_path / "private").iterdir())
