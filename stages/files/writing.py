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
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from stages.files.seclusion import make_folder, permissions, shutting_out
from stages.runtime.errors import Damaged, Held, NotReady, StorageProblem
from stages.runtime.events import Event, Report, ignore

COPY_AGAIN = "copy it again from its origin"
FOLDER_AGAIN = "copy the folder again from its origin, or make it there again with --overwrite"
LOG_AGAIN = "put it back from a backup; or make again what it is the log of, with --overwrite"
LARGEST_JSON_BYTES = 4 << 20
LARGEST_LOG_BYTES = 1 << 30
LARGEST_ADAPTER_BYTES = 4 << 30
LARGEST_OWN_BYTES = 8 << 30
READ_AT_ONCE_BYTES = 16 << 20
"""A larger file is judged by its head before the rest is read."""
ABANDONED_AFTER_S = 3600
LONGEST_PAUSE_S = 2.0
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What a file system says that has no locks."""
UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST),
    *(errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.ESTALE, errno.ELOOP),
}
"""Of the errors of a file system, those that waiting does not mend: rights, space, the disk."""


class Seen(NamedTuple):
    """Which publication lies in a place: no two are equal, even of the same bytes."""

    inode: int
    modified_ns: int


ABSENT = Seen(0, 0)


def seen(path: Path) -> Seen:
    """Which publication is there now; ABSENT for none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return ABSENT
    return Seen(status.st_ino, status.st_mtime_ns)


class Place:
    """A path to publish at, and what this process has seen or put there last: nothing else may be replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.look()

    def look(self) -> None:
        """Take note of what is there now."""
        self.seen = seen(self.path)

    @property
    def has_changed(self) -> bool:
        """Whether another process has published here since."""
        return seen(self.path) != self.seen


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
    descriptor = _open(path, levels)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path.name} is not a plain file", where=path, mend=COPY_AGAIN)
        if status.st_size > limit_bytes:
            message = f"{path.name} has {status.st_size} bytes, at most {limit_bytes} are expected"
            raise Damaged(message, where=path, mend=COPY_AGAIN)
        if named_bytes is not None and status.st_size > named_bytes:
            message = f"{path.name} has {status.st_size} bytes, its manifest says {named_bytes}"
            raise Damaged(message, where=path, mend=FOLDER_AGAIN)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            if look and status.st_size > READ_AT_ONCE_BYTES:
                look(file, status.st_size, path)
                file.seek(0)
            content = file.read(status.st_size + 1)
    finally:
        os.close(descriptor)
    if len(content) > status.st_size:
        raise NotReady(f"{path.name} is still being written", where=path, mend="wait, and give the same command again")
    return content


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
    return NotReady(f"{path.name} is not there", where=path, mend="put it there")


def check_plain(folder: Path) -> None:
    """Raise Damaged if a user's own folder, or anything below it, is neither file nor folder: libraries would hang."""
    for path in [folder, *sorted(folder.rglob("*"))]:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise _not_plain(path)


def _not_plain(path: Path) -> Damaged:
    mend = "remove it, and put the file itself in its place"
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

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, inner in pairs:
            if key in value:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            value[key] = inner
        return value

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not allowed")

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number[:40]} is too large a number")
        return value

    value = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if b"\\u" in content:
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is text that nobody can write
    return value


def json_bytes(value: object) -> bytes:
    """How JSON is written here: readable, sorted, one way only, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def json_line(value: dict[str, Any]) -> bytes:
    """An object as one line, for logs and signatures."""
    return (json.dumps(value, sort_keys=True) + "\n").encode()


def write_log(path: Path, lines: list[dict[str, Any]]) -> None:
    """A private log as JSON lines; the first one names the sha256 of all of them, without that name."""
    first, *rest = lines
    digest = sha256(b"".join(map(json_line, lines)))
    write(path, b"".join(map(json_line, [first | {"log_sha256": digest}, *rest])))


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


def _below_exchange(path: Path) -> int:
    """How many of a path's last parts are below a workspace's exchange folder; 1 for what lies elsewhere."""
    for number, folder in enumerate(path.absolute().parents, 1):
        if folder.name == "exchange" and (folder.parent / "fedcollm.toml").is_file():
            return number
    return 1


def write(
    path: Path, content: bytes, *, mode: int = 0o666, levels: int | None = None, over: Place | None = None
) -> None:
    """Put content at path, atomically: a reader sees the old bytes or the new ones, whatever happens in between.

    mode: the file's permissions, before the umask; below private/ its owner's alone. levels: as for check_no_link; by
    default what is below exchange/. over: raises Held where another process has written since its last look.
    """
    levels = _below_exchange(path) if levels is None else levels
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
        with _naming(draft), shutting_out(draft):  # libraries that write into it may not say which file
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
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and os.path.lexists(folder)
            if not taken:
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


@contextlib.contextmanager
def naming_storage_faults() -> Iterator[None]:
    """Turn an OSError of reading or writing into a StorageProblem that names the file and the mend."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE) and "exchange" in Path(str(error.filename)).parts:
            message = f"{Path(str(error.filename)).name} went away while it was read: it is being replaced"
            mend = "wait until the copy has ended, and give the same command again"
            raise NotReady(message, where=error.filename, mend=mend) from error
        raise StorageProblem(f"{error.strerror or error}", where=error.filename, mend=storage_mend(error)) from error


def storage_mend(error: Exception) -> str:
    """What mends a failed read or write. Of libraries that have errors of their own, a full disk is the likely one."""
    full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free some space and give the same command again" if full else "check the permissions and the disk"


def unwritable_cache(what: str, error: OSError) -> StorageProblem:
    """The error about a cache of the hub's libraries that the file system refuses."""
    mend = f"{storage_mend(error)}; or set HF_HOME, or whichever variable names that folder, to one that can be written"
    return StorageProblem(f"{what}: {error.strerror}", where=error.filename, mend=mend)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: bytes, mode: int = 0o666) -> None:
    with _naming(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, permissions(path, mode))
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


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
