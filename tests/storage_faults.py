"""A disk that fails: the n-th write, fsync or rename below a folder ends as the system's own does.

Taken over is what the system does, and nothing of ours: Python's files, os.fsync and os.rename and os.replace. Files
that libraries write in C or Rust (checkpoints, merged weights) are out of its reach; tests/cli/test_killed.py starves
those by a limit on the size of files.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

Kind = Literal["write", "fsync", "rename"]
KINDS: tuple[Kind, ...] = ("write", "fsync", "rename")


class FailingDisk:
    """What happens below a folder is counted, by kind; the n-th fails, and all writes and fsyncs after it, if sticky.

    A full disk (ENOSPC) stays full until the command has ended; a bad sector (EIO) fails once.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = folder.resolve()
        self._log: list[tuple[Kind, str]]
        self._real_open, self._real_fdopen = open, os.fdopen
        self._real_fsync, self._real_rename, self._real_replace = os.fsync, os.rename, os.replace
        self.disarm()
        patch.setattr(builtins, "open", self._open)
        patch.setattr(io, "open", self._open)
        patch.setattr(os, "fdopen", self._fdopen)
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(os, "rename", self._renaming(self._real_rename))
        patch.setattr(os, "replace", self._renaming(self._real_replace))

    def arm(self, kind: Kind, which: int, number: int) -> None:
        """From now, the which-th of this kind fails with this error number."""
        self._kind, self._which, self._number, self._seen = kind, which, number, 0

    def watch(self) -> list[tuple[Kind, str]]:
        """From now, nothing fails. Returns what will have happened: the kind, and where.

        Where is a draft or, of any other file, its folder; both without numbers and random names.
        """
        self.arm("write", 0, 0)
        return self._log

    def disarm(self) -> bool:
        """Fail no more. Returns whether it failed at all."""
        has_failed = getattr(self, "_which", 0) and self._seen >= self._which
        self._kind, self._which, self._number, self._seen, self._log = "none", 0, 0, 0, []
        return bool(has_failed)

    def _fails(self, kind: Kind, path: Any) -> bool:
        if self._kind != "none":
            place = Path(os.fsdecode(path)).absolute()
            place = place if place.name.startswith(".") else place.parent
            self._log.append((kind, re.sub(r"[0-9a-f]*\d[0-9a-f]*", "#", str(place))))
        if self._number == errno.ENOSPC and self._seen >= self._which > 0:
            return kind != "rename"
        self._seen += kind == self._kind
        return kind == self._kind and self._seen == self._which

    def _is_below(self, path: Any) -> bool:
        return Path(os.fsdecode(path)).absolute().is_relative_to(self._folder)

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        writes = set(mode) & set("wax+") and not isinstance(file, int)
        if self._kind == "none" or not writes or not self._is_below(file):
            return self._real_open(file, mode, buffering, *rest, **more)
        raw = io.FileIO(file, mode.replace("b", "").replace("t", ""))
        writer = _Writer(raw, lambda: self._fails("write", file), self)
        return writer if "b" in mode else io.TextIOWrapper(writer, *rest, **more)

    def _fdopen(self, descriptor: int, mode: str = "r", *rest: Any, **more: Any) -> Any:
        path = _path_of(descriptor)
        if self._kind == "none" or "w" not in mode or not self._is_below(path):
            return self._real_fdopen(descriptor, mode, *rest, **more)
        return _Writer(io.FileIO(descriptor, "w"), lambda: self._fails("write", path), self)

    def _fsync(self, descriptor: int) -> None:
        path = _path_of(descriptor)
        if self._is_below(path) and self._fails("fsync", path):
            raise OSError(self._number, os.strerror(self._number))
        self._real_fsync(descriptor)

    def _renaming(self, real: Callable[..., None]) -> Callable[..., None]:
        def rename(source: Any, target: Any, **more: Any) -> None:
            if self._is_below(source) and self._fails("rename", source):
                raise OSError(self._number, os.strerror(self._number), source, None, target)
            real(source, target, **more)

        return rename

    @property
    def number(self) -> int:
        """The error that it fails with."""
        return self._number


def _path_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


class _Writer(io.BufferedWriter):
    """A file on that disk: a write that fails has written half."""

    def __init__(self, raw: io.FileIO, fails: Callable[[], bool], disk: FailingDisk) -> None:
        super().__init__(raw)
        self._fails, self._disk = fails, disk

    def write(self, content: Any, /) -> int:
        if not self._fails():
            return super().write(content)
        super().write(bytes(content)[: len(content) // 2])
        raise OSError(self._disk.number, os.strerror(self._disk.number))


def without_locks(patch: pytest.MonkeyPatch, number: int | None = errno.ENOLCK) -> None:
    """A file system without locks: flock fails with this number, or, with None, is granted to everybody.

    The latter is what a file system does that keeps the locks of each machine apart. Libraries that lock their caches,
    elsewhere, by a descriptor, get what they ask for.
    """
    real = fcntl.flock

    def flock(file: Any, operation: int) -> None:
        if isinstance(file, int):
            real(file, operation)
        elif number is not None:
            raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", flock)
