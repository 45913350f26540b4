"""Other people's bars and chatter kept out of ours: stages report, the console draws."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from stages.runtime.events import Event, Report

MOST_LETTERS = 300


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Drop what libraries, and the programs they call, print to stdout and stderr meanwhile; what they raise passes.

    The console writes to a copy of stderr, made before, and is not silenced; its result it writes afterwards.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        nowhere = _nowhere()
        for stream in (1, 2):
            kept = os.dup(stream)
            os.dup2(nowhere.fileno(), stream)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, stream)
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


@functools.cache
def _nowhere() -> TextIO:
    """Never closed: a library that is imported meanwhile logs to it from then on."""
    return open(os.devnull, "w")  # noqa: PTH123


@contextlib.contextmanager
def telling(report: Report, library: str, *, but_for: str) -> Iterator[None]:
    """Report what a library's logger warns of meanwhile, each warning once and its first line alone.

    but_for: a pattern of those that change no number, or are told by us.
    """
    told = _Told(report, re.compile(but_for))
    logger = logging.getLogger(library)
    logger.addHandler(told)
    try:
        yield
    finally:
        logger.removeHandler(told)


class _Told(logging.Handler):
    def __init__(self, report: Report, but_for: re.Pattern[str]) -> None:
        super().__init__(logging.WARNING)
        self._report, self._but_for, self._seen = report, but_for, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        words = " ".join(record.getMessage().strip().partition("\n")[0].split())[:MOST_LETTERS]
        if words not in self._seen and not self._but_for.search(words):
            self._seen.add(words)
            self._report(Event("warning", f"{record.name.partition('.')[0]}: {words}"))
