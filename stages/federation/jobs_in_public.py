"""What is left of a round of FedMKT and of its baselines, as jobs in which no client waits for another.

Reads what `progress` has found. A client trains on its own rows and tells what it knows; the server teaches the LLM and
tells what that knows; in a second job the client learns from it. Before their first round they align. Where their
adapters are averaged after the round, all clients begin the next one with the average.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from stages.federation.job import Job, Script
from stages.parties.names import SERVER, client, number_of
from stages.progress.steps import Round
from stages.workspace.agreement import Agreement
from stages.workspace.paths import Workspace


def round_in_public(workspace: Workspace, round: Round, parties: Collection[str], jobs: list[Job]) -> str:
    """Add what these parties have to do in a round. Returns what they wait for after it."""
    number, federation = round.number, workspace.agreement.federation
    left = functools.partial(_left, round)
    if SERVER in left("broadcast"):
        if SERVER not in parties:
            return f"the broadcast of round {number}"
        if Job("average", number - 1) not in jobs:
            jobs.append(Job("broadcast", number))

    telling = left("align", "share-knowledge") - {SERVER}
    aligning = left("align") & left("client-distill")  # of a round that is over, the next round's job aligns
    asked = (left("client-train", "share-knowledge") | aligning) & set(parties) - {SERVER}
    if asked:
        jobs.append(Job("client", number, _numbers(asked)))

    work = left("align", "co-distill", "share-knowledge")
    if SERVER in work and SERVER in parties:
        absent = telling - asked
        if SERVER in left("co-distill") and _are_too_many(workspace, absent):
            return f"what {', '.join(map(client, _numbers(absent)))} knows in round {number}"
        jobs.append(Job("server", number))

    learning = left("client-distill")
    if asked := learning & set(parties):
        told = workspace.told_in(number)
        is_coming = any((job.script, job.round) == ("server", told) for job in jobs)
        if federation.server_tells and not is_coming and not workspace.knowledge(told, None).exists():
            return f"what the server knows in round {told}"
        jobs.append(Job("distill", number, _numbers(asked)))

    if SERVER in left("aggregate") and SERVER in parties:
        if _are_too_many(workspace, absent := learning - asked):
            return f"the adapters of {', '.join(map(client, _numbers(absent)))} in round {number}"
        jobs.append(Job("average", number))
    return ""


def _are_too_many(workspace: Workspace, absent: Collection[str]) -> bool:
    """Whether without these clients there are fewer than the server needs."""
    enough = workspace.agreement.aggregation.min_clients or len(workspace.clients)
    return len(workspace.clients) - len(absent) < enough


def _left(round: Round, *verbs: str) -> set[str]:
    """The parties that have one of these commands still to give."""
    return {step.party for step in round.steps if step.condition == "missing" and step.command.verb in verbs}


def _numbers(parties: Collection[str]) -> tuple[int, ...]:
    return tuple(sorted(map(number_of, parties)))


def linked(agreement: Agreement, jobs: Sequence[Job]) -> list[Job]:
    """The same jobs, each with what it waits for: a client's task only for its own before, and for the server.

    An average waits for all clients, and they for it.

    With min_clients, the server waits until all clients' tasks have ended, whichever way.
    """
    found: list[Job] = []
    there = {(job.script, job.round) for job in jobs}
    last = {job.script: job.round for job in jobs}
    waited_for: dict[tuple[Script, int], set[int]] = {}
    for job in reversed(jobs):
        clients = set(job.clients) | waited_for.get((job.script, job.round), set())
        after = []
        for how, script, number in _before(agreement, job, last):
            if (script, number) in there:
                after.append(f"{how}:{script}/{number}")
                # Slurm looks for a task of the same number: where that is done already, it is passed over.
                waited_for.setdefault((script, number), set()).update(clients if how == "aftercorr" else ())
        found.append(replace(job, clients=tuple(sorted(clients)), after=tuple(after)))
    return found[::-1]


def _before(agreement: Agreement, job: Job, last: Mapping[Script, int]) -> list[tuple[str, Script, int]]:
    """Which jobs this one waits for, if they are there, and how: as sbatch calls it. last: the last round of each."""
    number, told = job.round, job.round if agreement.federation.clients_tell else 1
    ended = "afterok" if agreement.aggregation.min_clients is None else "afterany"
    if job.script == "client":
        if agreement.averages:
            return [("afterok", "average", number - 1), ("afterok", "broadcast", number)]
        return [("aftercorr", "distill", number - 1), ("afterok", "broadcast", number)]
    if job.script == "average":
        return [(ended, "distill", number)]
    if job.script == "distill":
        return [("aftercorr", "client", number), ("afterok", "server", told)]
    if job.script == "server":
        waits = agreement.federation.clients_tell
        return [("afterok", "server", number - 1), (ended, "client", number)] if waits else []
    if job.script in ("evaluate", "window"):
        how: dict[Script, str] = {"server": "afterok", "client": ended, "distill": ended, "average": "afterok"}
        return [(way, script, last[script]) for script, way in how.items() if script in last]
    return []
