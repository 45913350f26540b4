"""broadcast, line 11 of Algorithm 1: the server publishes theta^t to all clients.

Reads, in round 1, the SLM and the federation's seed; in round t, private/server/round-(t-1)/slm (the aggregate, where
the method is fedavg). Writes exchange/round-t/broadcast. From round 2 on the adapter is that one, byte for byte.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from stages.parts import openings
from stages.parts.events import Event, Report, ignore
from stages.parts.manifest import Manifest, Opening, already_made, check_belongs, publish, read_artefact
from stages.parts.vault import SERVER
from stages.parts.workspace import Workspace, require

if TYPE_CHECKING:
    from stages.parts.models import Models


def broadcast(
    workspace: Workspace,
    *,
    round: int,
    without: Collection[int] | None = None,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> Manifest:
    """Publish the global adapter of a round. Returns its manifest.

    Where there are keys it opens the round, and overwrite begins a new attempt at it: what clients sent for the one
    before no longer counts. without: in secure mode, clients that this round is not opened for.
    """
    workspace.check_round(round)
    workspace.check_step("broadcast", round)
    report(Event("stage", f"broadcast, round {round}"))
    attempt, opening = openings.open_round(workspace, round, again=overwrite, without=without)
    if round == 1:
        manifest = _first(workspace, attempt, opening, overwrite, models, report)
    else:
        manifest = _next(workspace, round, attempt, opening, overwrite, report)
    openings.opened(workspace, round)
    return manifest


def _first(
    workspace: Workspace,
    attempt: int,
    opening: Opening | None,
    overwrite: bool,
    models: Models | None,
    report: Report,
) -> Manifest:
    """theta^1: PEFT's initialisation (B = 0), drawn once: an average of different ones would be none."""
    target = workspace.broadcast(1)
    if done := already_made(target, workspace, {}, overwrite=overwrite, opening=opening):
        report(Event("note", "already done"))
        return done

    from stages.parts import adapters
    from stages.parts.models import Models

    models = models or Models(workspace)
    models.use("slm")
    slm = models.get("slm")
    seed = workspace.seed_for("broadcast", 1)
    adapters.make_fresh(slm.model, seed)
    return publish(
        target,
        adapters.as_files(slm.model, workspace.agreement.slm.lora),
        workspace,
        stage="broadcast",
        round=1,
        attempt=attempt,
        parents={},
        base=slm.identity,
        parameters=adapters.count(slm.model),
        seed=seed,
        opening=opening,
    )


def _next(
    workspace: Workspace, round: int, attempt: int, opening: Opening | None, overwrite: bool, report: Report
) -> Manifest:
    """theta^t as the round before left it."""
    source = workspace.round_result(round - 1)
    stage: Literal["co-distill", "aggregate"] = "co-distill" if workspace.agreement.federation.distils else "aggregate"
    message = f"round {round} begins with the adapter that {stage} makes in round {round - 1}, which is not there"
    require(source, message, f"fedcollm {stage} --round {round - 1}")
    theta = read_artefact(source)
    check_belongs(theta, workspace, reader=SERVER, stage=stage, round=round - 1)
    parents = {source.name: theta.sha256}
    target = workspace.broadcast(round)
    if done := already_made(target, workspace, parents, overwrite=overwrite, opening=opening):
        report(Event("note", "already done"))
        return done
    return publish(
        target,
        theta.contents,
        workspace,
        stage="broadcast",
        round=round,
        attempt=attempt,
        parents=parents,
        base=theta.manifest.base,
        parameters=theta.manifest.parameters,
        opening=opening,
    )
