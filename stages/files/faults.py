"""What a file system's own errors mean to people: a full disk, a folder that may not be written."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from stages.files.seclusion import EXCHANGE
from stages.runtime.errors import NotReady, StorageProblem

UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST),
    *(errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.ESTALE, errno.ELOOP),
}
"""Of the errors of a file system, those that waiting does not mend: rights, space, the disk."""


@contextlib.contextmanager
def naming_storage_faults() -> Iterator[None]:
    """Turn an OSError of reading or writing into a StorageProblem that names the file and the mend."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE) and EXCHANGE in Path(str(error.filename)).parts:
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say in an OSError which file it is about, which a failed write or sync does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
