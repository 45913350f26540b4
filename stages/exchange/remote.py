"""The place that parties share, where no folder is carried by hand: files by name, through fsspec.

What lies there is data of other parties. Names are never taken from it, links are not followed knowingly, and nothing
is read beyond a given size.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stages.exchange.remote_systems import system
from stages.files.reading import COPY_AGAIN, sha256
from stages.runtime.errors import Damaged, NotReady, Problem, Refused, UsageProblem
from stages.workspace.names import MACHINE
from stages.workspace.paths import Workspace

WITHOUT_RENAME = ("s3", "gs", "az", "abfs")
"""Protocols that show an object only when all of it has arrived; a rename would be a copy."""


@dataclass(frozen=True)
class Remote:
    """A folder of a file system of fsspec's. renames: whether a file is written under another name first."""

    url: str
    system: Any
    top: str
    renames: bool

    @staticmethod
    def of(workspace: Workspace) -> Remote:
        """The one that machine.toml names. Raises UsageProblem where it names none, or a package is missing."""
        settings = workspace.machine.exchange
        if settings.remote is None:
            mend = f'write remote = "sftp://host/folder" under [exchange] in {MACHINE}'
            raise UsageProblem("no remote is named", where=workspace.root / MACHINE, mend=mend)
        with _said(settings.remote):
            found, top = system(settings.remote, dict(settings.options))
        renames = settings.remote.partition(":")[0] not in WITHOUT_RENAME
        return Remote(settings.remote, found, top.rstrip("/"), renames)

    def shown(self, name: str) -> str:
        """How people see a file of it."""
        return f"{self.url.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none. Raises Damaged for a link or anything but a file."""
        found = self._info(name)
        if found is None:
            return None
        if found.get("islink") or found.get("type") != "file" or not isinstance(found.get("size"), int):
            raise Damaged("is a link, or no plain file", where=self.shown(name), mend="take it out of the remote")
        return int(found["size"])

    def read(self, name: str, limit_bytes: int) -> bytes:
        """A whole file. Raises Damaged for one that has more bytes, NotReady for one that is gone."""
        size_bytes = self.size(name)
        if size_bytes is None:
            raise NotReady("is not there any more", where=self.shown(name), mend="give the same command again")
        if size_bytes <= limit_bytes:
            with _said(self.shown(name)), self.system.open(self._path(name), "rb") as file:
                content: bytes = file.read(limit_bytes + 1)
            if len(content) <= limit_bytes:
                return content
        message = f"has {size_bytes} bytes, at most {limit_bytes} are expected"
        raise Damaged(message, where=self.shown(name), mend=COPY_AGAIN)

    def write(self, name: str, content: bytes) -> None:
        """Put a file there: whole or not at all. Raises Refused where a link would lead it elsewhere."""
        folder = name.rpartition("/")[0]
        parents = [folder.rsplit("/", n)[0] for n in range(folder.count("/") + 1)] if folder else []
        for parent in parents:
            if (self._info(parent) or {}).get("islink"):
                raise Refused("is a link", where=self.shown(parent), mend="take it out of the remote")
        path = self._path(name)
        with _said(self.shown(name)):
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if not self.renames:
                self.system.pipe_file(path, content)
                return
            base = path.rpartition("/")
            draft = f"{base[0]}/.{base[2]}.{sha256(content)[:16]}.partial"  # who was killed writes it anew
            try:
                with self.system.open(draft, "wb") as file:
                    file.write(content)
                self.remove(name)
                self.system.mv(draft, path)
            except BaseException:
                with contextlib.suppress(Exception):
                    self.system.rm_file(draft)
                raise

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        if self._info(name) is not None:
            with _said(self.shown(name)):
                self.system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.top}/{name}"

    def _info(self, name: str) -> dict[str, Any] | None:
        with _said(self.shown(name)):
            try:
                found: dict[str, Any] = self.system.info(self._path(name))
                return found
            except (FileNotFoundError, NotADirectoryError):
                return None


@contextlib.contextmanager
def _said(place: str) -> Iterator[None]:
    """Turn what a remote's library raises into a problem: it may be mended by waiting, unless it is about rights."""
    try:
        yield
    except Problem:
        raise
    except PermissionError as error:
        mend = "ask the remote's owner for the right, or look at the credentials"
        raise Refused(f"the remote does not allow it: {_first_line(error)}", where=place, mend=mend) from error
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "make room on the remote" if is_full else "look at the network and the credentials"
        message = "the remote is full" if is_full else f"the remote failed: {_first_line(error)}"
        raise NotReady(message, where=place, mend=f"{mend}, then give the same command again") from error


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
