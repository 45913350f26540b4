"""How long what is left of several federations takes, told at each round, by what the rounds so far have taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from stages.progress.rounds import Reader
from stages.runtime.errors import Problem
from stages.runtime.events import SECONDS_LEFT, Event, Report
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

Federation = tuple[str, Collection[int]]
"""Of what kind one is, such as its method, and which of its rounds are to be made yet."""


class TimeLeft:
    """Hands on what federations report, one after the other, with the seconds that are left added to each round.

    A round takes what rounds of its kind have taken on average, or else what all have; scoring after it is part of it.
    Rounds that are only passed over count as nothing. Until a round has been made, nothing is told.
    """

    def __init__(
        self, federations: Sequence[Federation], report: Report, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._left = [(kind, set(rounds)) for kind, rounds in federations]
        self._report, self._clock = report, clock
        self._took: dict[str, list[float]] = {}
        self._begun: tuple[str, float] | None = None

    def begin(self, text: str) -> None:
        """Tell that the next federation begins; the first has begun."""
        self._end()
        self._report(Event("round", text, values=self._told()))

    def end(self) -> None:
        """The federation that was begun is over."""
        self._end()
        self._left.pop(0)

    def report(self, event: Event) -> None:
        """The report for the federation that was begun."""
        if event.kind == "round" and event.step:
            self._end()
            kind, rounds = self._left[0]
            event = replace(event, values=self._told())
            if event.step in rounds:
                rounds.discard(event.step)
                self._begun = kind, self._clock()
        self._report(event)

    def _end(self) -> None:
        if self._begun:
            kind, since = self._begun
            self._took.setdefault(kind, []).append(self._clock() - since)
            self._begun = None

    def _told(self) -> dict[str, float]:
        if not self._took:
            return {}
        every = fmean(one for took in self._took.values() for one in took)
        paces = {kind: fmean(took) for kind, took in self._took.items()}
        left = sum(paces.get(kind, every) * len(rounds) for kind, rounds in self._left)
        return {SECONDS_LEFT: left} if left else {}


def rounds_to_make(place: Path, parent: Workspace, *, overwrite: bool) -> set[int]:
    """The rounds of a derived workspace, there or not, that are to be made yet."""
    if overwrite or not (place / AGREEMENT).exists():
        return set(range(1, parent.agreement.federation.rounds + 1))
    workspace = Workspace(place, parent.flags)
    try:
        reader = Reader(workspace, verify=False)
        rounds = [reader.round(number) for number in range(1, workspace.agreement.federation.rounds + 1)]
    except Problem:  # told where it is run
        return set()
    return {round.number for round in rounds if not round.is_done}
