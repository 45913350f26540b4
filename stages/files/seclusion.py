"""Who may look at what is written: below private/, whatever the umask, its owner alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

AGREEMENT, EXCHANGE, PRIVATE = "fedcollm.toml", "exchange", "private"
"""What a workspace is known by from inside."""
OTHERS = 0o077


def is_private(path: Path) -> bool:
    """Whether a path is a workspace's folder of what never leaves its machine, or lies below it."""
    whole = path.absolute()
    return any(one.name == PRIVATE and (one.parent / AGREEMENT).is_file() for one in (whole, *whole.parents))


def permissions(path: Path, mode: int) -> int:
    """The permissions that a new file is asked for, before the umask."""
    return mode & ~OTHERS if is_private(path) else mode


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in. What is there already keeps the permissions that its owner gave it."""
    for one in reversed([folder, *folder.parents]):
        if not one.is_dir():
            one.mkdir(mode=permissions(one, 0o777), exist_ok=True)


@contextlib.contextmanager
def shutting_out(folder: Path) -> Iterator[None]:
    """While libraries write into a folder by themselves: below private/, for its owner alone."""
    if not is_private(folder):
        yield
        return
    before = os.umask(OTHERS)
    try:
        yield
    finally:
        os.umask(before)


def shut(folder: Path) -> None:
    """Take from others what was copied into a folder with the permissions that it had elsewhere."""
    for path in (folder, *folder.rglob("*")) if is_private(folder) else ():
        path.chmod(path.stat().st_mode & ~OTHERS)
