"""aggregate, line 13 of Algorithm 1: the server averages the clients' adapters.

In plain mode it reads each update; in secure mode it closes the round over those that have arrived, and, once enough
clients have revealed, opens their sum.
Reads exchange/round-t/broadcast and every exchange/round-t/{client-k,reveal-k} that has arrived; with a gate,
private/server/held-out.jsonl and the SLM, which nothing else here needs.
Writes private/server/round-t/aggregate, and the log private/server/round-t/aggregate.jsonl; in secure mode
exchange/round-t/close first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.aggregation import plain
from stages.aggregation.gating import Gate, gate_of
from stages.artefacts import turns
from stages.artefacts.average import Average
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import KEPT_OLD, already_made, publish
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import received
from stages.files import reading, writing
from stages.parties.party import Party
from stages.runtime.errors import Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models


def aggregate(
    workspace: Workspace,
    *,
    round: int,
    gate: float | None = None,
    keep_old: bool = False,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> Manifest:
    """Average the adapters of one round, by the agreement's rule, and publish the result. Returns its manifest.

    gate: publish the broadcast's adapter instead, byte for byte, if the average raises the loss on the held-out rows
    by more than this, in nats per answer token. By default the agreement's; without one no model is loaded.
    keep_old: give the round up, whatever has arrived: publish the broadcast's adapter, so that the next one can begin.
    Raises NotReady below the quorum, naming the absent; refuses, naming the client, any update that was trained from
    another broadcast, under another agreement, on another base or in another shape.
    """
    workspace.check_round(round)
    workspace.check_step("aggregate", round)
    report(Event("stage", f"aggregate, round {round}"))
    source = workspace.broadcast(round)
    missing = f"the broadcast of round {round} is not there", f"fedcollm broadcast --round {round}"
    server = Party.server(workspace)
    theta = received(source, by=server, stage="broadcast", round=round, missing=missing)
    gated = gate_of(workspace, gate)
    if keep_old:
        return _keep_old(server, theta, overwrite, report)
    return _aggregate(server, theta, gated, overwrite, models, report)


def _aggregate(
    server: Party,
    theta: Artefact,
    gated: Gate | None,
    overwrite: bool,
    models: Models | None,
    report: Report,
) -> Manifest:
    workspace = server.workspace
    round, is_secure = theta.manifest.round, workspace.agreement.aggregation.is_secure
    updates: dict[int, Path] = {}
    closed: Artefact | None = None
    parents: dict[str, str] = {}

    def look(again: bool) -> Manifest | None:
        nonlocal updates, closed, parents
        if not parents and is_secure:
            closed = _close(server, theta, again, report)
            parents = closed.manifest.parents | {"close": closed.sha256}
        elif not parents:
            updates = plain.present(workspace, theta, report)
            arrived = {f"client-{k}": read_manifest(path)[1] for k, path in updates.items()}
            parents = {"broadcast": theta.sha256} | arrived
        return _already_made(server, round, parents, gated, again)

    def make(places: turns.Places) -> Manifest:
        started = time.monotonic()
        if closed:
            average = _unmask(server, theta, closed, parents, report)
        else:
            average = plain.average(server, theta, updates, parents, report)
        return _publish(server, theta, average, gated, models, started, places, report)

    return _turn(workspace, round, look, make, overwrite, report)


def _turn(
    workspace: Workspace,
    round: int,
    look: Callable[[bool], Manifest | None],
    make: Callable[[turns.Places], Manifest],
    overwrite: bool,
    report: Report,
) -> Manifest:
    lock = workspace.log("aggregate", round).with_suffix(".lock")
    return turns.take([workspace.aggregate(round)], lock, look=look, make=make, overwrite=overwrite, report=report)


def _keep_old(server: Party, theta: Artefact, overwrite: bool, report: Report) -> Manifest:
    """What the server begins the next round with where this one has come to nothing."""
    round, parents = theta.manifest.round, {"broadcast": theta.sha256}
    workspace = server.workspace
    target = workspace.aggregate(round)

    def look(again: bool) -> Manifest | None:
        return already_made(target, parents, by=server, overwrite=again)

    def make(places: turns.Places) -> Manifest:
        report(Event("warning", f"round {round} is given up: its aggregate is the broadcast's adapter"))
        return publish(
            target,
            theta.contents,
            Draft(
                stage="aggregate",
                round=round,
                attempt=theta.manifest.attempt,
                parents=parents,
                base=theta.manifest.base,
                parameters=theta.manifest.parameters,
                metrics={KEPT_OLD: 1.0},
            ),
            by=server,
            over=places[target],
        )

    return _turn(workspace, round, look, make, overwrite, report)


def _close(server: Party, theta: Artefact, overwrite: bool, report: Report) -> Artefact:
    """Secure mode: whose updates are summed, decided once."""
    from stages.secagg import closing

    closed = closing.close(server, theta, report, overwrite=overwrite)
    for client in closing.late(server.workspace, closed):
        report(Event("warning", f"client {client}'s update came after the close: it is left out, and stays masked"))
    return closed


def _unmask(server: Party, theta: Artefact, closed: Artefact, parents: dict[str, str], report: Report) -> Average:
    """Secure mode: the survivors' sum, and nothing of each of them."""
    from stages.secagg import summing

    found = summing.open_sum(server, theta, closed, report)
    for warning in found.warnings:
        report(Event("warning", warning))
    return Average(found.average, parents, unmasking=found.unmasking)


def _already_made(
    server: Party, round: int, parents: dict[str, str], gated: Gate | None, overwrite: bool
) -> Manifest | None:
    """The manifest of an aggregate of these updates, if it is there. Raises Refused for one that passed another gate.

    Whoever asks for no gate takes it with the one it has.
    """
    workspace = server.workspace
    target = workspace.aggregate(round)
    done = already_made(target, parents, by=server, overwrite=overwrite)
    if done is None or gated is None:
        return done
    logged = reading.logged_inputs(workspace.log("aggregate", round)).get("held-out")
    changed = ["the gate"] if done.metrics.get("gate") != gated.amount else []
    changed += ["the held-out rows"] if logged not in (None, gated.data_sha256) else []
    if changed:
        message = f"{workspace.shown(target)} was made otherwise; changed since: {', '.join(changed)}"
        raise Refused(message, where=target, mend="give the command again with --overwrite to replace it")
    return done


def _publish(
    server: Party,
    theta: Artefact,
    average: Average,
    gated: Gate | None,
    models: Models | None,
    started: float,
    places: turns.Places,
    report: Report,
) -> Manifest:
    """Publish the average, or, where the gate keeps it out, the broadcast's adapter."""
    from stages.artefacts import adapter_files

    adapter_files.check_finite(average.tensors, "the average")
    workspace, round, metrics = server.workspace, theta.manifest.round, average.metrics
    weights, inputs = adapter_files.weights_bytes(average.tensors), dict(average.parents)
    begun: dict[str, Any] = {"inputs": inputs}
    if gated:
        verdict = gated.verdict(workspace, theta, average.tensors, models, report)
        weights = theta.contents[ADAPTER_WEIGHTS] if verdict.keeps_old else weights
        metrics = metrics | verdict.metrics
        inputs["held-out"] = gated.data_sha256
        begun |= {name: value for name, value in verdict.metrics.items() if name == "gate_rows_left_out"}
    manifest = publish(
        workspace.aggregate(round),
        {ADAPTER_CONFIG: theta.contents[ADAPTER_CONFIG], ADAPTER_WEIGHTS: weights},
        Draft(
            stage="aggregate",
            round=round,
            attempt=theta.manifest.attempt,
            parents=average.parents,
            base=theta.manifest.base,
            parameters=theta.manifest.parameters,
            examples=average.examples,
            tokens=average.tokens,
            metrics=metrics,
            unmasking=average.unmasking,
        ),
        by=server,
        over=places[workspace.aggregate(round)],
    )
    writing.write_log(workspace.log("aggregate", round), [begun, {"wall_s": time.monotonic() - started}])
    return manifest
