"""Two processes that do one stage: the second waits, looks again, and never replaces what the first has just made.

A requeued job whose first copy still lives is such a second one. Where the file system has no locks, or none that reach
another machine, both work, and whoever is second to publish finds the other's in the place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

from stages.files import locks, seen_places, writing
from stages.runtime.errors import Damaged, NotReady
from stages.runtime.events import Event, Report, ignore

Made = TypeVar("Made")
Places = Mapping[Path, seen_places.Place]

COMPLETE_WITHIN_S = 10.0
"""From another process's publication until all that belongs to it is there, its log too."""


def take(
    paths: Sequence[Path],
    lock: Path,
    *,
    look: Callable[[bool], Made | None],
    make: Callable[[Places], Made],
    alone: AbstractContextManager[None] | None = None,
    overwrite: bool = False,
    done: str = "already done",
    report: Report = ignore,
) -> Made:
    """What a stage makes, by this process or by another.

    paths: the folders or files that it publishes. look: what is there of these inputs, or None; its argument says
    whether that is to be made again, which is False where another process has just made it. make: makes and publishes
    it, each path over its place. done: said of what is there. alone: entered for both. Raises what they raise; what
    make raises is dropped where look finds that another process has published meanwhile.
    """
    places = {path: seen_places.Place(path) for path in paths}
    with locks.held(lock, report=report), alone or nullcontext():
        is_new = any(place.has_changed for place in places.values())
        for place in places.values():
            writing.put_right(place.path)
            place.look()
        if (made := look(overwrite and not is_new)) is not None:
            report(Event("note", done))
            return made
        try:
            return make(places)
        except Exception:
            if not any(place.has_changed for place in places.values()) or (made := _found(look)) is None:
                raise
            report(Event("note", "another process published it first"))
            return made


def _found(look: Callable[[bool], Made | None]) -> Made | None:
    """What the other process has made of the same inputs, once it is complete."""
    deadline = time.monotonic() + COMPLETE_WITHIN_S
    while True:
        is_late = time.monotonic() > deadline
        try:
            if (made := look(False)) is not None or is_late:
                return made
        except (Damaged, NotReady):  # as a folder may seem while it is replaced
            if is_late:
                raise
        time.sleep(0.2)
