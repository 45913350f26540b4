"""Checkpoints of a training that may be stopped or killed, each process's in a folder of its own.

Two processes may train the same at once: a job that was given again while its first copy lives, where the file system
has no locks. So each writes, rotates and removes only what is in its own folder, and goes on from the newest checkpoint
of any that is of equal inputs and has the bytes that were sealed, having copied it. Folders of processes that have
ended here are cleared away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from stages.files import reading, writing
from stages.files.seclusion import shut
from stages.runtime.errors import Damaged, NotReady
from stages.runtime.events import Event, Report, ignore

INPUTS, COMPLETE = "inputs.json", "complete"


def own(folder: Path) -> Path:
    """Where this process keeps the checkpoints of the training that folder is of."""
    return folder / f"{socket.gethostname()}-{os.getpid()}"


def begin(folder: Path, inputs: Mapping[str, Any], *, anew: bool = False, report: Report = ignore) -> Path | None:
    """Make this process's own folder. Returns the checkpoint in it to go on from, if any process left one.

    anew: begin from the start, whatever is there. One that is not as it was written is passed over with a warning.
    """
    mine, wanted = own(folder), reading.json_bytes(dict(inputs))
    if anew or not is_of(mine, wanted):
        shutil.rmtree(mine, ignore_errors=True)
    writing.write(mine / INPUTS, wanted)
    found = None if anew else _newest(folder, wanted, report)
    for other in folder.iterdir():
        if other != mine and _has_ended(other):
            shutil.rmtree(other, ignore_errors=True)
    return found


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole once all of it is on disk. Without its process's folder there is nothing to mark."""
    for path in _files_in(checkpoint):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    writing.write(checkpoint / COMPLETE, reading.json_bytes(_digests(checkpoint)))


def drop(mine: Path) -> None:
    """Remove this process's own folder, and the one around it where no other run has any there."""
    shutil.rmtree(mine, ignore_errors=True)
    with contextlib.suppress(OSError):
        mine.parent.rmdir()


def is_kept(mine: Path) -> bool:
    """Whether a process's own folder is still there: who publishes first removes those of all."""
    return (mine / INPUTS).exists()


def step_of(checkpoint: Path) -> int:
    """The step that it was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def _files_in(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE)


def _digests(checkpoint: Path) -> dict[str, str]:
    """The sha256 of every file of a checkpoint, read piece by piece: they are as large as the models' adapters."""
    found = {}
    for path in _files_in(checkpoint):
        with path.open("rb") as file:
            found[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _newest(folder: Path, wanted: bytes, report: Report) -> Path | None:
    """The newest whole checkpoint of a training with these inputs, in this process's own folder."""
    mine = own(folder)
    places = [mine, *(other for other in folder.iterdir() if other != mine)]
    found = [path for place in places if is_of(place, wanted) for path in place.glob("checkpoint-*")]
    for checkpoint in sorted(found, key=step_of, reverse=True):  # its own first among equals
        if checkpoint.parent == mine and is_whole(checkpoint):
            return checkpoint
        if checkpoint.parent != mine and _copied(checkpoint, mine / checkpoint.name):
            return mine / checkpoint.name
        if (checkpoint / COMPLETE).exists():  # one that was never sealed is what a killed process leaves
            message = f"{checkpoint.name} in {folder.name} is not what was written: it is passed over"
            report(Event("warning", message))
    return None


def _copied(checkpoint: Path, to: Path) -> bool:
    """Copy another process's checkpoint. False if it is not whole, or is no longer: its process may remove it."""
    draft = to.with_name(f".{to.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(checkpoint, draft)
        shut(draft)
        if not is_whole(draft):
            return False
        shutil.rmtree(to, ignore_errors=True)
        draft.rename(to)
    except (FileNotFoundError, shutil.Error):
        return False
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def is_whole(checkpoint: Path) -> bool:
    """Whether it was sealed and has the files that it then had, no other, with the same bytes."""
    try:
        sealed, _ = reading.read_json(checkpoint / COMPLETE)
        return sealed == _digests(checkpoint)
    except (OSError, NotReady, Damaged):
        return False


def is_of(place: Path, wanted: bytes) -> bool:
    """Whether what is kept there was made from these inputs."""
    try:
        return reading.read_own(place / INPUTS) == wanted
    except (OSError, Damaged):
        return False


def _has_ended(place: Path) -> bool:
    """Whether the process whose folder this is ran here and is no more; of another host's nobody here can tell."""
    host, _, number = place.name.rpartition("-")
    if host != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


class Stop:
    """Whether someone has asked for an end after the step that is being done."""

    is_asked = False


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """While inside, SIGTERM and SIGUSR1 ask for a stop; a second one does what it did outside."""
    stop, before = Stop(), dict[signal.Signals, Any]()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.is_asked = True
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
