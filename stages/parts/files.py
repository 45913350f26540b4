"""Files that are whole or absent: one strict reader and one atomic writer.

Refuses symbolic links, anything that is not a plain file, and files larger than expected. What is read is read once
into memory, so that the bytes that were hashed are the bytes that are used. What is written appears under its name
only when it is complete and on disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.parts.errors import Damaged, Held, NotReady, StorageProblem

COPY_AGAIN = "copy it again from its origin"
LARGEST_JSON_BYTES = 4 << 20
LARGEST_ADAPTER_BYTES = 4 << 30
ABANDONED_AFTER_S = 3600


def sha256(content: bytes) -> str:
    """Hexadecimal digest."""
    return hashlib.sha256(content).hexdigest()


def read(path: Path, *, limit_bytes: int) -> bytes:
    """The whole content of a plain file. Raises NotReady if it is absent, Damaged if it is anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotReady(f"{path.name} is not there", where=path) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            mend = "put the file itself in its place"
            raise Damaged(
                f"{path.name} is a symbolic link; exchanged files are never followed", where=path, mend=mend
            ) from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path.name} is not a plain file", where=path, mend=COPY_AGAIN)
        if status.st_size > limit_bytes:
            message = f"{path.name} has {status.st_size} bytes, at most {limit_bytes} are expected"
            raise Damaged(message, where=path, mend=COPY_AGAIN)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object and the sha256 of its bytes. Refuses duplicate keys, NaN and anything but an object."""
    content = read(path, limit_bytes=LARGEST_JSON_BYTES)
    try:
        value = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is not valid JSON: {error}", where=path, mend=COPY_AGAIN) from None
    return value, sha256(content)


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object, strictly. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    value = json.loads(content, object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def json_bytes(value: object) -> bytes:
    """How JSON is written here: readable, sorted, one way only, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_log(path: Path, lines: list[dict[str, Any]]) -> None:
    """A private log as JSON lines."""
    write(path, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode())


def logged_inputs(path: Path) -> dict[str, str]:
    """The inputs that the first line of a private log names; empty if there is no such log, or a damaged one."""
    try:
        first = parse_json(path.read_bytes().partition(b"\n")[0])
    except (FileNotFoundError, ValueError):
        return {}
    return dict(first.get("inputs", {}))


def write(path: Path, content: bytes) -> None:
    """Put content at path, atomically: a reader sees the old bytes or the new ones, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _write(draft, content)
        _sync(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def publish(folder: Path, contents: dict[str, bytes]) -> None:
    """Make folder hold exactly these files, atomically; an earlier folder of that name is replaced."""
    with publishing(folder) as draft:
        for name, content in contents.items():
            _write(draft / name, content)


@contextlib.contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """A draft to write files into, which becomes folder when the block ends; an earlier folder is replaced.

    The draft lies beside the place; it is synced and renamed into it: that the folder exists means that it is whole.
    If anything fails before that, the place is as it was and the draft is gone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f".{folder.name}.*.partial"):  # by a process that was killed
        if time.time() - abandoned.lstat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(abandoned, ignore_errors=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
    shutil.rmtree(draft, ignore_errors=True)  # of a killed process that had the number of this one
    try:
        draft.mkdir()
        with _naming(draft):  # libraries that write into it may not say which file
            yield draft
        for path in sorted(draft.rglob("*")):
            _sync(path)
        _sync(draft)
        if os.path.lexists(folder):
            _remove(replaced)
            folder.rename(replaced)
        try:
            draft.rename(folder)
        except BaseException:
            if os.path.lexists(replaced):
                replaced.rename(folder)
            raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if os.path.lexists(folder):
            _remove(replaced)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep a second process out of the work that path names. Raises Held if one is there already.

    An advisory lock that the system drops with the process. Where the file system has no locks nothing is held, and
    publication by rename still keeps every artefact whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Held("another process is doing this stage", where=path, mend="wait for it, or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield


@contextlib.contextmanager
def naming_storage_faults() -> Iterator[None]:
    """Turn an OSError of reading or writing into a StorageProblem that names the file and the mend."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "free some space and give the same command again" if full else "check the permissions and the disk"
        raise StorageProblem(f"{error.strerror or error}", where=error.filename, mend=mend) from error


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with _naming(path):
        path.write_bytes(content)


def _sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in an OSError which file it is about, which a failed write or sync does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
