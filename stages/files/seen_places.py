"""Where something is published, and what was seen there before: no writer overwrites what it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


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
