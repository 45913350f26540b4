"""What is left of a federation as a chain of jobs, each to begin when the one before it has ended.

Nothing is read here but what `progress` has found, so that jobs, `run` and commands given by hand can take turns.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence

from stages.federation.job import Chain, Job
from stages.federation.jobs_in_public import linked, round_in_public
from stages.parties.names import SERVER, client, number_of
from stages.progress import staleness
from stages.progress.steps import Round, Step
from stages.runtime.errors import Refused
from stages.workspace.paths import Workspace


def chain(
    workspace: Workspace, rounds: Sequence[Round], parties: Collection[str], *, window: int | None = None
) -> Chain:
    """What these parties ("server", "client-2") can do, each round resting on the one before.

    window: at most so many rounds, and then a job that asks again. Raises Refused for what is damaged or stale: what
    replaces it is for a person to decide.
    """
    found = _chain(workspace, rounds, parties, window)
    if workspace.agreement.federation.learns_in_public:
        return Chain(linked(workspace.agreement, found.jobs), found.waiting_for)
    return found


def _chain(workspace: Workspace, rounds: Sequence[Round], parties: Collection[str], window: int | None) -> Chain:
    in_public = workspace.agreement.federation.learns_in_public
    jobs: list[Job] = []
    begun = 0
    for round in rounds:
        check_sound(workspace, round)
        before = list(jobs)
        waiting_for = (round_in_public if in_public else _round)(workspace, round, parties, jobs)
        begun += jobs != before
        if window is not None and begun > window:
            return Chain([*before, Job("window", round.number)], "")
        if waiting_for:
            return Chain(jobs, waiting_for)
    scores_here = SERVER in parties or in_public  # there a client's model is on no machine but its own
    if scores_here and (jobs or _is_unscored(workspace, parties)) and workspace.scored_tasks:
        jobs.append(Job("evaluate", rounds[-1].number))
    return Chain(jobs, "")


def check_sound(workspace: Workspace, round: Round) -> None:
    """Raise Refused for a step that is damaged or stale."""
    for step in round.steps:
        if step.condition in ("damaged", "stale"):
            message = f"{step.name} of round {round.number} is {step.condition}: {step.reason}"
            raise Refused(message, where=workspace.root, mend=step.command)


def _round(workspace: Workspace, round: Round, parties: Collection[str], jobs: list[Job]) -> str:
    """Add what these parties have to do in a round. Returns what they wait for after it."""
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
    if is_due and (absent := _too_few(reveals, asked, workspace.agreement.aggregation.reveals_needed(len(updates)))):
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


def _is_unscored(workspace: Workspace, parties: Collection[str]) -> bool:
    """Whether a score of the last round, or of the bases, is missing here, or stale."""
    last = workspace.agreement.federation.rounds
    clients = [client(k) for k in workspace.client_adapters(last)]
    if workspace.agreement.federation.learns_in_public:
        clients = [name for name in clients if name in parties]
    subjects, bases = [*server_subjects(workspace, parties), *clients], base_subjects(workspace, parties)
    paths = [workspace.result(last, name) for name in subjects] + [workspace.result(None, name) for name in bases]
    stale = {path for path, *_ in staleness.stale(workspace)}
    return any(path in stale or not path.exists() for path in paths)


def server_subjects(workspace: Workspace, parties: Collection[str]) -> list[str]:
    """The server's models that are scored after the last round."""
    federation = workspace.agreement.federation
    if federation.clients_tell:
        return [*(["aggregate"] if workspace.agreement.averages else []), "llm"] if SERVER in parties else []
    return ["slm", "llm"] if federation.distils else ["aggregate"] if federation.averages else []


def base_subjects(workspace: Workspace, parties: Collection[str]) -> list[str]:
    """The bases that are scored without an adapter; a derived workspace's are scored where it was derived from.

    Where each party has a model of its own, those of these parties.
    """
    federation = workspace.agreement.federation
    if workspace.home != workspace.root:
        return []
    if not federation.learns_in_public and workspace.agreement.is_of_one_slm:
        return ["slm", "llm"] if federation.distils else ["slm"]
    here = [k for k in workspace.clients if client(k) in parties]
    own = [client(k) for k in here if workspace.of_client(k).own_model]
    llm = ["llm"] if federation.server_tells and SERVER in parties else []
    return [*(["slm"] if len(own) < len(here) else []), *own, *llm]
