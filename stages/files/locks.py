"""Locks: who holds one, who waits, and what is done where a file system has none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stages.files.seclusion import make_folder, permissions
from stages.runtime.errors import Damaged, Held, StorageProblem
from stages.runtime.events import Event, Report, ignore

LONGEST_PAUSE_S = 2.0
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What a file system says that has no locks."""


@contextlib.contextmanager
def held(path: Path, *, waits: bool = True, without: str | None = None, report: Report = ignore) -> Iterator[None]:
    """Do the work that path names alone: wait until no other process is at it, having said so once.

    An advisory lock that the system drops with the process. Where the file system has no locks nothing is held, and
    publication by rename still keeps every artefact whole.
    waits: if False, raises Held instead. without: for work that needs a lock, what mends the lack of it; raises
    StorageProblem then.
    """
    make_folder(path.parent)
    with os.fdopen(_open_lock(path), "r+") as file:
        try:
            _lock(file, path, waits, report)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if without is not None:
                message = "this file system has no locks, and two processes at once would do harm here"
                raise StorageProblem(message, where=path, mend=without) from error
        with contextlib.suppress(OSError):  # who it is; a full disk is no reason to stop here
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), 0)


def _open_lock(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, permissions(path, 0o666))
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise
        descriptor = -1
    if descriptor < 0 or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        if descriptor >= 0:
            os.close(descriptor)
        raise Damaged(f"{path.name} is not a plain file", where=path, mend="remove it: it is a lock, and made anew")
    return descriptor


def _lock(file: IO[str], path: Path, waits: bool, report: Report) -> None:
    pause_s = 0.0
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            by = os.pread(file.fileno(), 200, 0).decode(errors="replace")
            if not waits:
                message = f"another process is doing this{by and f' ({by})'}"
                raise Held(message, where=path, mend="wait for it, or stop it") from None
            if not pause_s:
                report(Event("note", f"another process is doing this stage: waiting for it{by and f' ({by})'}"))
        pause_s = min(pause_s + 0.05, LONGEST_PAUSE_S)
        time.sleep(pause_s)
