"""What is left of a federation as a chain of jobs, each to begin when the one before it has ended.

A job is a script of slurm/ with its round, and one task for each client in it. Nothing is read here but what `progress`
has found, so that jobs, `run` and commands given by hand can take turns.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stages.parties.names import SERVER, number_of
from stages.progress import staleness
from stages.progress.steps import Round, Step
from stages.runtime.errors import Refused
from stages.workspace.agreement import threshold
from stages.workspace.paths import Workspace

Script = Literal["broadcast", "server", "client", "close", "reveal", "evaluate", "window"]


@dataclass(frozen=True)
class Job:
    """One job. round: the server's job ends this round and opens the next."""

    script: Script
    round: int
    clients: tuple[int, ...] = ()

    @property
    def tasks(self) -> str:
        """The clients as an array's tasks, such as 1-3,5; "" for a job of one task."""
        runs: list[list[int]] = []
        for client in self.clients:
            if runs and client == runs[-1][-1] + 1:
                runs[-1].append(client)
            else:
                runs.append([client])
        return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True)
class Chain:
    """The jobs in their order, and what has to arrive from elsewhere before there can be more; "" if nothing."""

    jobs: list[Job]
    waiting_for: str


def chain(
    workspace: Workspace, rounds: Sequence[Round], parties: Collection[str], *, window: int | None = None
) -> Chain:
    """What these parties ("server", "client-2") can do, each round resting on the one before.

    window: at most so many rounds, and then a job that asks again. Raises Refused for what is damaged or stale: what
    replaces it is for a person to decide.
    """
    jobs: list[Job] = []
    begun = 0
    for round in rounds:
        before = list(jobs)
        waiting_for = _round(workspace, round, parties, jobs)
        begun += jobs != before
        if window is not None and begun > window:
            return Chain([*before, Job("window", round.number)], "")
        if waiting_for:
            return Chain(jobs, waiting_for)
    if SERVER in parties and (jobs or _is_unscored(workspace)) and _is_scored(workspace):
        jobs.append(Job("evaluate", rounds[-1].number))
    return Chain(jobs, "")


def _round(workspace: Workspace, round: Round, parties: Collection[str], jobs: list[Job]) -> str:
    """Add what these parties have to do in a round. Returns what they wait for after it."""
    for step in round.steps:
        if step.condition in ("damaged", "stale"):
            message = f"{step.name} of round {round.number} is {step.condition}: {step.reason}"
            raise Refused(message, where=workspace.root, mend=step.command)
    if round.is_done:
        return ""
    number, missing = round.number, {step.name for step in round.steps if step.condition == "missing"}
    has_gone_on = os.path.lexists(workspace.broadcast(number + 1))
    if "broadcast" in missing:
        if SERVER not in parties:
            return f"the broadcast of round {number}"
        if Job("server", number - 1) not in jobs:
            jobs.append(Job("broadcast", number))

    updates = [step for step in round.steps if step.name == step.party]
    is_closed = has_gone_on or any(step.name == "close" and step.condition == "done" for step in round.steps)
    asked = [] if is_closed else _asked(updates, parties)
    if asked:
        jobs.append(Job("client", number, _numbers(asked)))
    needed = min(workspace.agreement.aggregation.min_clients or len(updates), len(updates))
    is_due = SERVER in parties and bool(missing & {"close", "aggregate"}) and not is_closed
    if is_due and (absent := _too_few(updates, asked, needed)):
        return f"{absent} of round {number}"

    if "close" in missing:
        if SERVER not in parties:
            return "" if has_gone_on else f"the close of round {number}"
        jobs.append(Job("close", number))
    reveals = [step for step in round.steps if step.name.startswith("reveal-")]
    asked = [] if has_gone_on else _asked(reveals, parties)
    if asked:
        jobs.append(Job("reveal", number, _numbers(asked)))
    is_due = SERVER in parties and bool(reveals) and "aggregate" in missing
    if is_due and (absent := _too_few(reveals, asked, threshold(len(updates)))):
        return f"{absent} of round {number}"

    if SERVER in parties and missing & {"aggregate", "llm", "slm"}:
        jobs.append(Job("server", number))
    return ""


def _asked(steps: Iterable[Step], parties: Collection[str]) -> list[Step]:
    return [step for step in steps if step.condition == "missing" and step.party in parties]


def _numbers(steps: Iterable[Step]) -> tuple[int, ...]:
    return tuple(number_of(step.party) for step in steps)


def _too_few(steps: Sequence[Step], asked: Collection[Step], needed: int) -> str:
    """What has to come from elsewhere, where what is there and what is asked for are fewer than needed."""
    absent = [step.name for step in steps if step.condition == "missing" and step not in asked]
    return ", ".join(absent) if len(steps) - len(absent) < needed else ""


# --- scores


def _is_scored(workspace: Workspace) -> bool:
    return bool(workspace.agreement.evaluation.tasks or workspace.agreement.data.tasks)


def _is_unscored(workspace: Workspace) -> bool:
    """Whether a score of the last round, or of the bases, is missing here, or stale."""
    last = workspace.agreement.federation.rounds
    subjects = [*server_subjects(workspace), *(f"client-{client}" for client in workspace.client_adapters(last))]
    bases = base_subjects(workspace)
    paths = [workspace.result(last, name) for name in subjects] + [workspace.result(None, name) for name in bases]
    stale = {path for path, *_ in staleness.stale(workspace)}
    return any(path in stale or not path.exists() for path in paths)


def server_subjects(workspace: Workspace) -> list[str]:
    """The server's models that are scored after the last round."""
    federation = workspace.agreement.federation
    return ["slm", "llm"] if federation.distils else ["aggregate"] if federation.averages else []


def base_subjects(workspace: Workspace) -> list[str]:
    """The bases that are scored without an adapter; a derived workspace's are scored where it was derived from."""
    if workspace.home != workspace.root:
        return []
    return ["slm", "llm"] if workspace.agreement.federation.distils else ["slm"]
