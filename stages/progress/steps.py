"""The steps of a round, and in what condition each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from stages.parties.names import SERVER, listed
from stages.workspace.commands import Command

Condition = Literal["done", "missing", "damaged", "stale"]


@dataclass(frozen=True)
class Step:
    """One folder of one round: its condition, why it is not "done", and the command that makes it.

    "missing" with a reason: a part of it is there, such as what is still being copied.

    party: who makes it, "server" or "client-2". here: whether that party is on this machine. changed: what
    it was made from and is another now.
    """

    name: str
    condition: Condition
    reason: str
    command: Command
    here: bool
    sha256: str = ""
    party: str = SERVER
    changed: tuple[str, ...] = ()


def awaited(what: str, absent: Sequence[int], missing: int, round: int, place: str) -> str:
    """What so many of these clients have yet to send, in words. place: where that of the first of them will lie."""
    of_some = f"{missing} of " if missing < len(absent) else ""
    plural = "s" if missing > 1 and what != "knowledge" else ""
    more = ", ..." if len(absent) > 1 else ""
    return f"the {what}{plural} of {of_some}{listed(absent)}, round {round} ({place}{more})"


@dataclass(frozen=True)
class Round:
    """The steps of one round, in the order of Algorithm 1, and what came too late in it.

    late: clients whose update is not in the aggregate. unheard: clients from whose knowledge the LLM did not learn.
    """

    number: int
    steps: list[Step]
    late: list[int] = field(default_factory=list)
    unheard: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to do."""
        return all(step.condition == "done" for step in self.steps)
