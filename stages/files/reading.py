"""Reading: every file of another party, and of one's own, whole and within a limit, through no link, pipe or device."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from stages.files.seclusion import AGREEMENT, EXCHANGE
from stages.runtime.errors import Damaged, NotReady

COPY_AGAIN = "copy it again from its origin"
FOLDER_AGAIN = "copy the folder again from its origin, or make it there again with --overwrite"
LOG_AGAIN = "put it back from a backup; or make again what it is the log of, with --overwrite"
LARGEST_JSON_BYTES = 4 << 20
LARGEST_LOG_BYTES = 1 << 30
LARGEST_ADAPTER_BYTES = 4 << 30
LARGEST_OWN_BYTES = 8 << 30
READ_AT_ONCE_BYTES = 16 << 20
"""A larger file is judged by its head before the rest is read."""


def sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


def read(
    path: Path,
    *,
    limit_bytes: int,
    levels: int = 1,
    named_bytes: int | None = None,
    look: Callable[[IO[bytes], int, Path], None] | None = None,
) -> bytes:
    """The whole content of a plain file. Raises NotReady if it is absent, Damaged if it is anything else.

    levels: how many of the path's last parts are opened without following symbolic links. named_bytes: what its
    manifest says that it has; a larger file is not read. look: raises for an open file, of so many bytes, whose head
    says that the rest is not worth reading; small files are read at once.
    """
    with _opened(path, levels) as (file, size_bytes):
        if size_bytes > limit_bytes:
            message = f"{path.name} has {size_bytes} bytes, at most {limit_bytes} are expected"
            raise Damaged(message, where=path, mend=COPY_AGAIN)
        if named_bytes is not None and size_bytes > named_bytes:
            message = f"{path.name} has {size_bytes} bytes, its manifest says {named_bytes}"
            raise Damaged(message, where=path, mend=FOLDER_AGAIN)
        if look and size_bytes > READ_AT_ONCE_BYTES:
            look(file, size_bytes, path)
            file.seek(0)
        content = file.read(size_bytes + 1)
    if len(content) > size_bytes:
        raise NotReady(f"{path.name} is still being written", where=path, mend="wait, and give the same command again")
    return content


def read_into(path: Path, buffer: memoryview, *, start: int, named_bytes: int, levels: int = 1) -> bool:
    """Fill a buffer from a place in a plain file, opened as `read` opens it. Returns whether the file had so much.

    named_bytes: as many as it must have in all, no more and no fewer. For files that are read bit by bit: nothing says
    that they stay the same meanwhile, so whoever uses what was read holds the digest of all of it against the manifest.
    """
    with _opened(path, levels) as (file, size_bytes):
        if size_bytes != named_bytes:
            return False
        file.seek(start)
        return file.readinto(buffer) == buffer.nbytes


@contextlib.contextmanager
def _opened(path: Path, levels: int) -> Iterator[tuple[BufferedReader, int]]:
    """A plain file of another party, open, and its size in bytes."""
    descriptor = _open(path, levels)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path.name} is not a plain file", where=path, mend=COPY_AGAIN)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    finally:
        os.close(descriptor)


def read_own(path: Path) -> bytes:
    """The content of a file of this user's own, which may be a link; a pipe, a device or a folder is refused at once.

    Raises FileNotFoundError if there is none, Damaged if it is not a plain file or absurdly large.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _not_plain(path)
        if status.st_size > LARGEST_OWN_BYTES:
            message = f"{path.name} has {status.st_size} bytes, at most {LARGEST_OWN_BYTES} are expected"
            raise Damaged(message, where=path, mend="put the right file in its place")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def not_there(path: Path) -> NotReady:
    """The error about a user's own file that is absent, or a link that leads to nothing here."""
    if path.is_symlink():
        message = f"{path.name} is a symbolic link to {path.readlink()}, which is not there on this machine"
        return NotReady(message, where=path, mend="put the file there, or mount what it lies on, or replace the link")
    return NotReady(f"{path.name} is not there", where=path, mend="put it there, or correct the name")


def check_plain(folder: Path) -> None:
    """Raise Damaged if a user's own folder, or anything below it, is neither file nor folder: libraries would hang."""
    for path in [folder, *sorted(folder.rglob("*"))]:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise _not_plain(path)


def _not_plain(path: Path) -> Damaged:
    mend = "put a plain file in its place, or name another"
    return Damaged(f"{path.name} is not a plain file, but a pipe, a device or a folder", where=path, mend=mend)


def _open(path: Path, levels: int) -> int:
    """A descriptor of path, each of whose last parts is opened in the one before: none can be swapped for a link."""
    *folders, _ = parts = path.absolute().parts[-levels:]
    above = str(path.absolute().parents[levels - 1])
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    parent = -1
    try:
        parent = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in folders:
            inside = os.open(part, flags | os.O_DIRECTORY, dir_fd=parent)
            os.close(parent)
            parent = inside
        return os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=parent)
    except FileNotFoundError:
        mend = "wait until it has arrived, or copy it again from its origin"
        raise NotReady(f"{path.name} is not there", where=path, mend=mend) from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
            error.filename = str(path)
            raise
        mend = "put the file itself in its place"
        message = f"{path.name} is a symbolic link, or lies in one, which is never followed here"
        raise Damaged(message, where=path, mend=mend) from None
    finally:
        if parent >= 0:
            os.close(parent)


def read_json(path: Path, *, levels: int = 1) -> tuple[dict[str, Any], bytes]:
    """A JSON object and its bytes. Refuses duplicate keys, NaN and anything but an object."""
    content = read(path, limit_bytes=LARGEST_JSON_BYTES, levels=levels)
    try:
        return parse_json(content), content
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is not valid JSON: {error}", where=path, mend=COPY_AGAIN) from None


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, strictly: no key twice, no infinite number, no half of a character. Raises ValueError."""
    text = content.decode("utf-8")
    if text.startswith("\ufeff"):
        raise json.JSONDecodeError("Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0)
    value = _STRICT.decode(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if b"\\u" in content:
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is text that nobody can write
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        known = set[str]()
        for key, _ in pairs:
            if key in known:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            known.add(key)
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not allowed")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is too large a number")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)


def json_bytes(value: object) -> bytes:
    """How JSON is written here: readable, sorted, one way only, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def json_line(value: dict[str, Any]) -> bytes:
    """An object as one line, for logs and signatures."""
    return (json.dumps(value, sort_keys=True) + "\n").encode()


def check_log(path: Path) -> None:
    """Raise Damaged unless a private log is as it was written; one of an earlier version has no digest."""
    first, _, rest = read(path, limit_bytes=LARGEST_LOG_BYTES).partition(b"\n")
    try:
        said = parse_json(first)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"the first line of {path.name} is not valid JSON: {error}", where=path, mend=LOG_AGAIN) from None
    named = said.pop("log_sha256", None)
    is_changed = sha256(json_line(said) + rest) != named if named else set(said) != {"inputs"}
    if is_changed:
        raise Damaged(f"{path.name} has been changed since it was written", where=path, mend=LOG_AGAIN)


def first_logged(path: Path) -> dict[str, Any]:
    """The first line of a private log; empty if there is no such log, or a damaged one."""
    try:
        return parse_json(read_own(path).partition(b"\n")[0])
    except (FileNotFoundError, ValueError):
        return {}


def logged_inputs(path: Path) -> dict[str, str]:
    """The inputs that the first line of a private log names; empty if there is no such log, or a damaged one."""
    return dict(first_logged(path).get("inputs", {}))


def check_no_link(path: Path, levels: int) -> None:
    """Raise Damaged if a symbolic link is among the folders that path's last parts lie in: nothing is written there.

    levels: how many parts; the last one itself may be a link, which is replaced and never followed.
    """
    for folder in reversed(list(path.absolute().parents)[: levels - 1]):
        if folder.is_symlink():
            message = f"{folder.name} is a symbolic link; nothing is written or replaced beyond one"
            raise Damaged(message, where=folder, mend="remove the link, and put the folder itself in its place")


def below_exchange(path: Path) -> int:
    """How many of a path's last parts are below a workspace's exchange folder; 1 for what lies elsewhere."""
    for number, folder in enumerate(path.absolute().parents, 1):
        if folder.name == EXCHANGE and (folder.parent / AGREEMENT).is_file():
            return number
    return 1


def below(path: Path, top: Path) -> str | None:
    """The rest of a path that lies under a folder, else None: as Path.relative_to, but quick."""
    here, above = str(path), str(top).rstrip("/") + "/"
    if here == str(top):
        return "."
    return here.removeprefix(above) if here.startswith(above) else None
