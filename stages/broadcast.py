"""broadcast, line 11 of Algorithm 1: the server publishes theta^t to all clients.

Reads, in round 1, the SLM and the federation's seed; in round t, private/server/round-(t-1)/slm (the aggregate, where
the method is fedavg). Writes exchange/round-t/broadcast. From round 2 on the adapter is that one, byte for byte.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from stages.artefacts import turns
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest, Opening
from stages.artefacts.publishing import already_made, publish
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.files import seen_places
from stages.parties.party import Party
from stages.runtime.events import Event, Report, ignore
from stages.secagg import openings
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models


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
    target, server = workspace.broadcast(round), Party.server(workspace)
    theta = _theta(server, round)
    parents = {theta.path.name: theta.sha256} if theta else {}
    attempt, opening = 0, None

    def look(again: bool) -> Manifest | None:
        nonlocal attempt, opening
        attempt, opening = openings.open_round(server, round, again=again, without=without)
        done = already_made(target, parents, by=server, overwrite=again, opening=opening)
        if done:
            openings.opened(server, round)
        return done

    def make(places: turns.Places) -> Manifest:
        if theta is None:
            manifest = _first(server, attempt, opening, models, places[target])
        else:
            manifest = _next(server, round, theta, attempt, opening, places[target])
        openings.opened(server, round)
        return manifest

    lock = workspace.log("broadcast", round).with_suffix(".lock")
    alone = server.keys.alone(report) if server.members else None
    return turns.take([target], lock, look=look, make=make, alone=alone, overwrite=overwrite, report=report)


def _first(
    server: Party, attempt: int, opening: Opening | None, models: Models | None, over: seen_places.Place
) -> Manifest:
    """theta^1: PEFT's initialisation (B = 0), drawn once: an average of different ones would be none.

    An LLM that is here, and needed later in the round, is checked without reading its weights before anyone trains.
    """
    from stages.bases import base_folders
    from stages.models import adapters, shapes
    from stages.models.loading import Models

    workspace = server.workspace
    if workspace.agreement.federation.distils and base_folders.configuration(workspace, "llm"):
        shapes.of_workspace(workspace, "llm")
    models = models or Models(workspace)
    models.use("slm")
    slm = models.get("slm")
    seed = workspace.seed_for("broadcast", 1)
    adapters.make_fresh(slm.model, seed)
    return publish(
        workspace.broadcast(1),
        adapters.as_files(slm.model, workspace.agreement.slm.lora),
        Draft(
            stage="broadcast",
            round=1,
            attempt=attempt,
            parents={},
            base=slm.identity,
            parameters=adapters.count(slm.model),
            seed=seed,
            opening=opening,
        ),
        by=server,
        over=over,
    )


def _theta(server: Party, round: int) -> Artefact | None:
    """theta^t as the round before left it; None in round 1, where it is made here."""
    if round == 1:
        return None
    workspace = server.workspace
    source = workspace.round_result(round - 1)
    stage: Literal["co-distill", "aggregate"] = "co-distill" if workspace.agreement.federation.distils else "aggregate"
    message = f"round {round} begins with the adapter that {stage} makes in round {round - 1}, which is not there"
    missing = message, f"fedcollm {stage} --round {round - 1}"
    return received(source, by=server, stage=stage, round=round - 1, missing=missing)


def _next(
    server: Party, round: int, theta: Artefact, attempt: int, opening: Opening | None, over: seen_places.Place
) -> Manifest:
    """What the round before left, byte for byte."""
    return publish(
        server.workspace.broadcast(round),
        theta.contents,
        Draft(
            stage="broadcast",
            round=round,
            attempt=attempt,
            parents={theta.path.name: theta.sha256},
            base=theta.manifest.base,
            parameters=theta.manifest.parameters,
            opening=opening,
        ),
        by=server,
        over=over,
    )
