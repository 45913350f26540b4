"""What can go wrong, as data: what happened, where, how to mend it, and the exit code a script can act on."""

from __future__ import annotations

from pathlib import Path


class Problem(Exception):
    """A failure with a known cause. Composed here once, shown once by the command line.

    message: what happened, naming the expected and the found.
    where: the file or folder concerned.
    mend: what the reader can do about it: a text, or a command, which is printed.
    edited: what the command line adds where the agreement was edited before, since that may be the cause.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: Path | str | None = None, mend: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.mend = None if mend is None else str(mend)
        self.edited = ""


class UsageProblem(Problem):
    """The command or the agreement asks for something that does not exist."""

    exit_code = 2


class NotReady(Problem):
    """An input is not there yet; a script may wait and try again."""

    exit_code = 3


class Damaged(Problem):
    """A file is broken or is not what it claims to be."""

    exit_code = 4


class Refused(Problem):
    """A sound file that must not be used here: stale round, other federation, other base."""

    exit_code = 5


class BadNumbers(Problem):
    """NaN, nothing learned, out of memory, or a budget of privacy that is spent."""

    exit_code = 6


class Held(Problem):
    """Another process is doing the same stage."""

    exit_code = 7


class StorageProblem(Problem):
    """Disk full, no permission, or a read or write that failed."""

    exit_code = 8


NOTHING_LEFT_EXIT_CODE = 9
"""`next`: the party's part is done, so that whatever calls it again and again can end."""
INTERRUPTED_EXIT_CODE = 75
"""Ctrl-C, SIGTERM or SIGUSR1: nothing is half written and the same command resumes (EX_TEMPFAIL)."""
