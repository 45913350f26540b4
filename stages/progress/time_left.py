"""How long what is left of training on this machine will take, if each step takes as long as it took last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.files import reading
from stages.progress.steps import Round
from stages.runtime.errors import Problem
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

LOGGED = ("client-train", "co-distill", "client-distill", "share-knowledge")
"""The commands that take long, and whose private logs say how long."""


def seconds_left(workspace: Workspace, rounds: Sequence[Round]) -> float | None:
    """Seconds; 0 where nothing is left here, None where nothing tells: such a step was not taken here yet."""
    begun = [number for number, one in enumerate(rounds) if any(step.condition == "done" for step in one.steps)]
    left = {str(command): command.verb for one in rounds[max(begun, default=0) :] for command in _left(one)}
    took = {verb: _last(workspace, rounds, verb) for verb in dict.fromkeys(left.values())}
    each = [took[verb] for verb in left.values()]
    return None if None in each else sum(one for one in each if one is not None)


def _left(round: Round) -> Iterator[Command]:
    for step in round.steps:
        if step.here and step.condition != "done" and step.command.verb in LOGGED:
            yield step.command


def _last(workspace: Workspace, rounds: Sequence[Round], verb: str) -> float | None:
    """The mean of all parties here, in the last round in which one of them took this step."""
    for round in reversed(rounds):
        logs = (workspace.log(verb, round.number, k) for k in (None, *workspace.clients))
        if found := [seconds for log in logs if (seconds := _wall_s(log)) is not None]:
            return sum(found) / len(found)
    return None


def _wall_s(log: Path) -> float | None:
    """What the last line of a log says; None where there is none, or it says something else."""
    if not log.exists():
        return None
    try:
        said = json.loads(reading.read_own(log).rstrip().rpartition(b"\n")[2])["wall_s"]
        return float(said)
    except (Problem, OSError, ValueError, TypeError, LookupError, RecursionError):  # other commands say what is wrong
        return None
