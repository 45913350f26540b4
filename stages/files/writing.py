"""Files that are whole or absent: one strict reader and one atomic writer.

Refuses symbolic links, anything that is not a plain file, and files larger than expected. What is read is read once
into memory, so that the bytes that were hashed are the bytes that are used. What is written appears under its name
only when it is complete and on disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.files.faults import naming
from stages.files.reading import below_exchange, check_no_link, json_line, sha256
from stages.files.seclusion import make_folder, permissions, shutting_out
from stages.files.seen_places import ABSENT, Place, seen
from stages.runtime.errors import Held

ABANDONED_AFTER_S = 3600


def write_log(path: Path, lines: list[dict[str, Any]]) -> None:
    """A private log as JSON lines; the first one names the sha256 of all of them, without that name."""
    first, *rest = lines
    digest = sha256(b"".join(map(json_line, lines)))
    write(path, b"".join(map(json_line, [first | {"log_sha256": digest}, *rest])))


def write(
    path: Path, content: bytes, *, mode: int = 0o666, levels: int | None = None, over: Place | None = None
) -> None:
    """Put content at path, atomically: a reader sees the old bytes or the new ones, whatever happens in between.

    mode: the file's permissions, before the umask; below private/ its owner's alone. levels: as for check_no_link; by
    default what is below exchange/. over: raises Held where another process has written since its last look.
    """
    levels = below_exchange(path) if levels is None else levels
    check_no_link(path, levels)
    make_folder(path.parent)
    _erase_abandoned(path)
    draft, _ = _drafts(path)
    try:
        _write(draft, content, mode)
        _sync(draft)
        check_no_link(path, levels)
        if over and over.has_changed:
            raise _overtaken(path)
        draft.replace(path)
        if over:
            over.look()
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def publish(
    folder: Path,
    contents: dict[str, bytes],
    *,
    over: Place | None = None,
    levels: int = 1,
    spares: Callable[[Path], None] | None = None,
) -> None:
    """Make folder hold exactly these files, atomically; an earlier folder of that name is replaced, if it may be."""
    with publishing(folder, over=over, levels=levels, spares=spares) as draft:
        for name, content in contents.items():
            _write(draft / name, content)


@contextlib.contextmanager
def publishing(
    folder: Path, *, over: Place | None = None, levels: int = 1, spares: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A draft to write files into, which becomes folder when the block ends; an earlier folder is replaced.

    The draft lies beside the place; it is synced and renamed into it: that the folder exists means that it is whole.
    If anything fails before that, the place is as it was and the draft is gone.
    over: whose last look says what may be replaced; raises Held where something else is there by then: another process
    was first. By default, whatever is there. levels: as for check_no_link. spares: raises for an earlier folder that is
    not to be replaced.
    """

    def check() -> None:
        check_no_link(folder, levels)
        if spares and folder.is_dir() and not folder.is_symlink():
            spares(folder)

    check()
    make_folder(folder.parent)
    put_right(folder)
    _erase_abandoned(folder)
    draft, replaced = _drafts(folder)
    try:
        make_folder(draft)
        with naming(draft), shutting_out(draft):  # libraries that write into it may not say which file
            yield draft
        check_no_link(folder, levels)
        for path in sorted(draft.rglob("*")):
            _sync(path)
        _sync(draft)
        check()
        _put(draft, folder, replaced, over)
        _sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if os.path.lexists(folder):
            _remove(replaced)


def _put(draft: Path, folder: Path, replaced: Path, over: Place | None) -> None:
    """Rename a draft into its place, where only what over says may be; that goes to replaced."""
    while True:
        if over is None or over.seen != ABSENT:
            with contextlib.suppress(FileNotFoundError):
                folder.rename(replaced)
        is_other = over is not None and seen(replaced) not in (ABSENT, over.seen)
        try:
            if not is_other:
                draft.rename(folder)
                if over is not None:
                    over.look()
                return
        except OSError as error:
            was_taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)  # a third may have moved it away since
            if not was_taken and not (error.errno == errno.ENOTDIR and os.path.lexists(folder)):
                _put_back(replaced, folder)
                raise
            is_other = over is not None
        if is_other:
            _put_back(replaced, folder)
            raise _overtaken(folder)
        _remove(replaced)  # and once more, over what another process has put there in between


def _overtaken(path: Path) -> Held:
    return Held(f"another process published {path.name} first", where=path, mend="give the same command again")


def put_right(folder: Path) -> None:
    """Put folder back if a process was killed when it had moved it away and its own was not there yet."""
    for replaced in _left_beside(folder, "replaced"):
        _put_back(replaced, folder)
        if os.path.lexists(folder):
            _remove(replaced)


def _put_back(replaced: Path, folder: Path) -> None:
    """Undo a move, unless the place has been taken meanwhile."""
    if os.path.lexists(replaced) and not os.path.lexists(folder):
        with contextlib.suppress(OSError):  # by another process, in this moment
            replaced.rename(folder)


def _drafts(path: Path) -> tuple[Path, Path]:
    """Where a new content of path is made, and where the old one goes; each process of each machine has its own."""
    own = f"{os.getpid()}-{_machine()}{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{own}.partial"), path.with_name(f".{path.name}.{own}.replaced")


def _machine() -> str:
    """How a draft's name tells this machine from others: eight digits."""
    return sha256(os.uname().nodename.encode())[:8]


def _erase_abandoned(path: Path) -> None:
    """Erase drafts in path's folder whose processes were killed here, and old ones of path by whomever."""
    beside = set(_left_beside(path, "partial"))
    for draft in path.parent.glob(".*.partial"):
        with contextlib.suppress(OSError):
            is_old = draft in beside and time.time() - draft.lstat().st_mtime > ABANDONED_AFTER_S
            if is_old or _has_ended(draft):
                _remove(draft)


def _has_ended(draft: Path) -> bool:
    """Whether the process whose draft this is ran on this machine and is no more."""
    found = re.fullmatch(rf"\..+\.([0-9]{{1,9}})-{_machine()}[0-9a-f]{{8}}\.partial", draft.name)
    if found is None:
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _left_beside(path: Path, ending: str) -> list[Path]:
    """What processes at work, or killed at it, have beside path, the newest first."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+(-[0-9a-f]+)?\.{ending}")
    found = [beside for beside in path.parent.iterdir() if name.fullmatch(beside.name)] if path.parent.is_dir() else []
    return sorted(found, key=lambda beside: seen(beside).modified_ns, reverse=True)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: bytes, mode: int = 0o666) -> None:
    with naming(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, permissions(path, mode))
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


def _sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
