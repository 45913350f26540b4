"""A round of FedMKT and of its baselines, on one machine: each client learns in private and then on the public rows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from stages.align_party import align_party
from stages.artefacts.reading import read_manifest
from stages.client_distill import client_distill
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.parties import names
from stages.runtime.events import Event, Report
from stages.share_knowledge import share_knowledge
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.models.loading import Models


def align_all(workspace: Workspace, clients: Sequence[int], *, overwrite: bool, report: Report) -> None:
    """Before round 1: every party tells how it reads, and each is aligned with the server."""
    if workspace.agreement.federation.server_tells:
        for client in (None, *clients):
            align_party(workspace, client=client, overwrite=overwrite, report=report)
        align_party(workspace, report=report)  # the server once more: now it has met all of them


def round_in_public(
    workspace: Workspace, round: int, clients: Sequence[int], *, overwrite: bool, models: Models, report: Report
) -> None:
    """One round of FedMKT's Algorithm 1, as far as the method goes."""
    federation = workspace.agreement.federation
    common: dict[str, Any] = {"round": round, "overwrite": overwrite, "models": models, "report": report}
    tell = partial(share_knowledge, workspace, **common)
    if federation.server_tells and not federation.clients_tell and round == 1:
        tell(server=True)
    for client in clients:
        client_train(workspace, client=client, **common)
        if federation.clients_tell:
            tell(client=client)
    if federation.clients_tell:
        if overwrite or not _was_without_some(workspace, round, clients, report):
            co_distill(workspace, **common)
        tell(server=True)
    for client in clients:
        client_distill(workspace, client=client, **common)


def _was_without_some(workspace: Workspace, round: int, clients: Sequence[int], report: Report) -> bool:
    """Whether the LLM has learned in this round without some of these clients, who came too late for it."""
    place = workspace.llm(round)
    learned_from = read_manifest(place)[0].parents if place.exists() else {}
    late = [k for k in clients if learned_from and names.client(k) not in learned_from]
    for k in late:
        report(Event("note", f"client {k} came too late: the LLM of round {round} has learned without it"))
    return bool(late)
