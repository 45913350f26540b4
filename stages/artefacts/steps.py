"""How a step of a round is taken: one process at a time, by all the processes that torchrun started, never twice.

Two commands may do the same step: a requeued job whose first copy still lives is a second one. The second waits, looks
again, and never replaces what the first has just made. Where the file system has no locks, or none that reach another
machine, both work, and whoever is second to publish finds the other's in the place.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from stages.files import locks, seen_places, writing
from stages.parties.party import Party
from stages.runtime.errors import Damaged, NotReady
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.workspace import addressees
from stages.workspace.commands import Command
from stages.workspace.names import round_of
from stages.workspace.paths import Workspace

Opened = TypeVar("Opened")
Computed = TypeVar("Computed")
Made = TypeVar("Made")
Over = Mapping[Path, seen_places.Place]
"""For each path that a step publishes, what it has seen there: nothing else may be replaced."""

COMPLETE_WITHIN_S = 10.0
"""From another process's publication until all that belongs to it is there, its log too."""


@dataclass(frozen=True, kw_only=True)
class Step(ABC, Generic[Opened, Computed, Made]):
    """One step: the first process opens it, all compute it alike, the first publishes what came of it.

    A subclass says what it reads, computes and writes; `take` holds the lock, looks whether it is done, and brings the
    processes together. party: who takes it. publishes: the folders or files that it writes. log: its own record.
    overwrite: whether what is there is made again. done: said where it has been taken before. processes: all take the
    same step.
    """

    party: Party
    publishes: Sequence[Path]
    log: Path
    overwrite: bool = False
    done: str = "already done"
    processes: Processes = ALONE
    report: Report = ignore

    @property
    def workspace(self) -> Workspace:
        """The workspace it is taken in."""
        return self.party.workspace

    @property
    def lock(self) -> Path:
        """Held by whoever takes it."""
        return self.log.with_suffix(".lock")

    def alone(self) -> AbstractContextManager[None]:
        """What else is held meanwhile."""
        return nullcontext()

    @abstractmethod
    def open(self) -> Opened:
        """Read what it starts from, and refuse what does not fit, before any model is loaded."""

    def decide(self, opened: Opened, again: bool) -> tuple[Opened, bool]:
        """Under the lock: what can be known only now, and whether what is there is made again."""
        return opened, again

    @abstractmethod
    def look(self, opened: Opened, again: bool) -> Made | None:
        """What is there of these inputs, or None: compute it. Raises Refused for what was made of others."""

    @abstractmethod
    def compute(self, opened: Opened, again: bool) -> Computed:
        """Do the work, in every process. again: whether checkpoints of an earlier run are passed over."""

    @abstractmethod
    def publish(self, opened: Opened, computed: Computed, over: Over) -> Made:
        """Write what was computed, each path over what was seen in its place."""

    def end(self, opened: Opened, made: Made, again: bool) -> Made:
        """What follows, without the lock, be it made now or before."""
        return made

    def take(self) -> Made:
        """Take it, and return what it made, or what another process has made of the same inputs.

        Raises what its parts raise; what computing and publishing raise is dropped where another process has published
        meanwhile.
        """
        if not self.processes.is_first:
            return self._help()
        opened, alone = self.open(), self.alone()
        places = {path: seen_places.Place(path) for path in self.publishes}
        with locks.held(self.lock, report=self.report), alone:
            is_new = any(place.has_changed for place in places.values())
            for place in places.values():
                writing.put_right(place.path)
                place.look()
            opened, again = self.decide(opened, self.overwrite and not is_new)
            if (made := self.look(opened, again)) is not None:
                self.report(Event("note", self.done))
                self.processes.agree((None, again, made))
            else:
                made = self._make(opened, again, places)
                self._tell_whose()
        return self.end(opened, made, again)

    def _tell_whose(self) -> None:
        """Say to whom it goes, where they are on another machine."""
        workspace, agreement = self.workspace, self.workspace.agreement
        sent = [path for path in self.publishes if path.is_relative_to(workspace.exchange)]
        federation = agreement.federation
        is_told = federation.server_tells if self.party.is_server else federation.clients_tell
        if not sent or not (agreement.averages or is_told):
            return
        number, round = None if self.party.is_server else self.party.number, round_of(sent[0].parent.name)
        pack = Command("pack", client=number, server=number is None, round=round)
        addressees.tell(workspace, sent[0], pack, self.report, client=number)

    def _make(self, opened: Opened, again: bool, places: Over) -> Made:
        try:
            self.processes.agree((opened, again, None))
            computed = self.compute(opened, again)
        except Exception as error:
            return self._instead(error, opened, places)  # the others may be amid a computation, and are told nothing
        try:
            made = self.publish(opened, computed, places)
        except Exception as error:
            made = self._instead(error, opened, places)
        self.processes.agree(made)
        return made

    def _help(self) -> Made:
        """What a process does that is not the first: compute what that one has opened."""
        opened, again, made = self.processes.agree()
        if made is None:
            self.compute(opened, again)
            made = self.processes.agree()
        found: Made = made
        return found

    def _instead(self, error: Exception, opened: Opened, places: Over) -> Made:
        """What another process has made of the same inputs, once it is complete. Raises the error where there is none.

        Raises what look does for what was made of others.
        """
        if not any(place.has_changed for place in places.values()):
            raise error
        deadline = time.monotonic() + COMPLETE_WITHIN_S
        while True:
            is_late = time.monotonic() > deadline
            try:
                if (made := self.look(*self.decide(opened, False))) is not None:
                    self.report(Event("note", "another process published it first"))
                    return made
                if is_late:
                    raise error
            except (Damaged, NotReady):  # as a folder may seem while it is replaced
                if is_late:
                    raise
            time.sleep(0.2)
