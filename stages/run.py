"""run: the whole federation on one machine, in one process, by the same stages; the one stage that calls others.

Base models are loaded once. It leaves exactly the files that the separate commands leave, and goes on from whatever is
there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from stages.aggregate import aggregate
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.evaluate import evaluate
from stages.parts.events import Event, Report, ignore
from stages.parts.manifest import read_manifest
from stages.parts.workspace import Workspace

if TYPE_CHECKING:
    from stages.parts.models import Models


def run(
    workspace: Workspace,
    *,
    rounds: range | None = None,
    scores: bool = True,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> list[dict[str, Any]]:
    """Every step of these rounds (default: all). Returns the scores, unless scores is False.

    Scored are the SLM and the LLM after every round, and each client's SLM after the last; before, the bases alone.
    """
    from stages.parts.models import Models

    models = models or Models(workspace)
    agreement = workspace.agreement
    rounds = rounds or range(1, agreement.federation.rounds + 1)
    for round in (rounds[0], rounds[-1]):
        workspace.check_round(round)
    scores = scores and bool(agreement.evaluation.tasks or agreement.data.tasks)
    score = partial(evaluate, workspace, overwrite=overwrite, models=models, report=report)

    results = [score(model="slm"), score(model="llm")] if scores else []
    for round in rounds:
        report(Event("round", f"round {round} of {agreement.federation.rounds}"))
        broadcast(workspace, round=round, overwrite=overwrite, models=models, report=report)
        for client in _here(workspace, round):
            client_train(workspace, client=client, round=round, overwrite=overwrite, models=models, report=report)
        aggregate(workspace, round=round, overwrite=overwrite, report=report)
        co_distill(workspace, round=round, overwrite=overwrite, models=models, report=report)
        if scores:
            results += [score(model="slm", round=round), score(model="llm", round=round)]
    if scores:
        results += [score(round=rounds[-1], client=client) for client in workspace.clients]
    return results


def _here(workspace: Workspace, round: int) -> list[int]:
    """The clients to train on this machine in a round.

    Not those whose update came from elsewhere, as at a real server; nor, where a quorum is enough, those without data
    here, or those that a finished average did without.
    """
    clients = list(workspace.clients)
    if workspace.aggregate(round).exists():
        averaged = read_manifest(workspace.aggregate(round))[0].parents
        clients = [client for client in clients if f"client-{client}" in averaged]
    may_be_absent = workspace.agreement.aggregation.min_clients is not None
    return [
        client
        for client in clients
        if workspace.client_data(client).exists()
        or not (may_be_absent or workspace.client_update(round, client).exists())
    ]
