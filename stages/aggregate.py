"""aggregate, line 13 of Algorithm 1: the server averages the clients' adapters.

In plain mode it reads each update; in secure mode it closes the round over those that have arrived, and, once enough
clients have revealed, opens their sum.
Reads exchange/round-t/broadcast and every exchange/round-t/{client-k,reveal-k} that has arrived; with a gate,
private/server/held-out.jsonl and the SLM, which nothing else here needs.
Writes private/server/round-t/aggregate, and the log private/server/round-t/aggregate.jsonl; in secure mode
exchange/round-t/close first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.artefacts import turns
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest, Unmasking
from stages.artefacts.publishing import KEPT_OLD, already_made, publish
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import received
from stages.artefacts.tensor_files import largest_bytes
from stages.data.rows import Row, read_rows
from stages.files import reading, writing
from stages.parties.names import SERVER
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.aggregation.gate import Verdict
    from stages.artefacts.adapter_files import Tensors
    from stages.models.loading import Models

MOST_CLAIMED = 1 << 40
"""Examples, tokens or steps of one client in one round; the sum of all clients' must stay a number that is counted."""

OF_FACTORS = {"median", "trimmed-mean"}
"""Rules that act on each number of A and B by itself."""


@dataclass(frozen=True)
class _Gate:
    """What to ask of an average before it is taken: by how much it may raise the loss on these rows."""

    amount: float
    rows: list[Row]
    data_sha256: str


@dataclass(frozen=True)
class _Average:
    """An average before the gate, and what its manifest will say of it."""

    tensors: Tensors
    parents: dict[str, str]
    examples: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    unmasking: Unmasking | None = None


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
    require(source, f"the broadcast of round {round} is not there", f"fedcollm broadcast --round {round}")
    theta = received(source, workspace, reader=SERVER, stage="broadcast", round=round)
    gated = _gate(workspace, gate)
    if keep_old:
        return _keep_old(workspace, theta, overwrite, report)
    return _aggregate(workspace, theta, gated, overwrite, models, report)


def _aggregate(
    workspace: Workspace,
    theta: Artefact,
    gated: _Gate | None,
    overwrite: bool,
    models: Models | None,
    report: Report,
) -> Manifest:
    round, is_secure = theta.manifest.round, workspace.agreement.aggregation.is_secure
    updates: dict[int, Path] = {}
    closed: Artefact | None = None
    parents: dict[str, str] = {}

    def look(again: bool) -> Manifest | None:
        nonlocal updates, closed, parents
        if not parents and is_secure:
            closed = _close(workspace, theta, again, report)
            parents = closed.manifest.parents | {"close": closed.sha256}
        elif not parents:
            updates = _present(workspace, theta, report)
            arrived = {f"client-{k}": read_manifest(path)[1] for k, path in updates.items()}
            parents = {"broadcast": theta.sha256} | arrived
        return _already_made(workspace, round, parents, gated, again)

    def make(places: turns.Places) -> Manifest:
        started = time.monotonic()
        if closed:
            average = _unmask(workspace, theta, closed, parents, report)
        else:
            average = _average(workspace, round, theta, updates, parents, report)
        return _publish(workspace, theta, average, gated, models, started, places, report)

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


def _keep_old(workspace: Workspace, theta: Artefact, overwrite: bool, report: Report) -> Manifest:
    """What the server begins the next round with where this one has come to nothing."""
    round, parents = theta.manifest.round, {"broadcast": theta.sha256}
    target = workspace.aggregate(round)

    def look(again: bool) -> Manifest | None:
        return already_made(target, workspace, parents, overwrite=again)

    def make(places: turns.Places) -> Manifest:
        report(Event("warning", f"round {round} is given up: its aggregate is the broadcast's adapter"))
        return publish(
            target,
            theta.contents,
            workspace,
            Draft(
                stage="aggregate",
                round=round,
                attempt=theta.manifest.attempt,
                parents=parents,
                base=theta.manifest.base,
                parameters=theta.manifest.parameters,
                metrics={KEPT_OLD: 1.0},
            ),
            over=places[target],
        )

    return _turn(workspace, round, look, make, overwrite, report)


def _close(workspace: Workspace, theta: Artefact, overwrite: bool, report: Report) -> Artefact:
    """Secure mode: whose updates are summed, decided once."""
    from stages.secagg import closing

    closed = closing.close(workspace, theta, report, overwrite=overwrite)
    for client in closing.late(workspace, closed):
        report(Event("warning", f"client {client}'s update came after the close: it is left out, and stays masked"))
    return closed


def _unmask(
    workspace: Workspace, theta: Artefact, closed: Artefact, parents: dict[str, str], report: Report
) -> _Average:
    """Secure mode: the survivors' sum, and nothing of each of them."""
    from stages.secagg import summing

    found = summing.open_sum(workspace, theta, closed, report)
    for warning in found.warnings:
        report(Event("warning", warning))
    return _Average(found.average, parents, unmasking=found.unmasking)


def _gate(workspace: Workspace, amount: float | None) -> _Gate | None:
    """The gate that is asked for, if any, with its rows."""
    amount = workspace.agreement.aggregation.gate if amount is None else amount
    if amount is None:
        return None
    if not 0 <= amount < math.inf:
        raise UsageProblem(f"a gate of {amount} is no amount of loss", mend="give a number such as --gate 0.1")
    mend = "put JSONL rows there that nobody trains on, or set data.held_out_share and `fedcollm prepare`"
    require(workspace.held_out_data, "the gate needs held-out rows, and there are none", mend)
    return _Gate(amount, *read_rows(workspace.held_out_data))


def _already_made(
    workspace: Workspace, round: int, parents: dict[str, str], gated: _Gate | None, overwrite: bool
) -> Manifest | None:
    """The manifest of an aggregate of these updates, if it is there. Raises Refused for one that passed another gate.

    Whoever asks for no gate takes it with the one it has.
    """
    target = workspace.aggregate(round)
    done = already_made(target, workspace, parents, overwrite=overwrite)
    if done is None or gated is None:
        return done
    logged = reading.logged_inputs(workspace.log("aggregate", round)).get("held-out")
    changed = ["the gate"] if done.metrics.get("gate") != gated.amount else []
    changed += ["the held-out rows"] if logged not in (None, gated.data_sha256) else []
    if changed:
        message = f"{workspace.shown(target)} was made otherwise; changed since: {', '.join(changed)}"
        raise Refused(message, where=target, mend="give the command again with --overwrite to replace it")
    return done


def _present(workspace: Workspace, theta: Artefact, report: Report) -> dict[int, Path]:
    """The updates that have arrived, if they are enough; those of an earlier attempt at the round do not count."""
    round, updates = theta.manifest.round, workspace.client_updates(theta.manifest.round)
    if theta.manifest.attempt:
        earlier = [k for k, path in updates.items() if read_manifest(path)[0].attempt < theta.manifest.attempt]
        for client in earlier:
            report(Event("warning", f"client {client}'s update is of an earlier attempt at this round"))
            del updates[client]
    absent = [k for k in workspace.clients if k not in updates]
    needed = workspace.agreement.aggregation.min_clients or len(workspace.clients)
    names = ", ".join(map(str, absent))
    if len(updates) < needed:
        message = f"round {round} has {len(updates)} of the {needed} updates it needs; absent: client {names}"
        mend = f"fedcollm client-train --client {absent[0]} --round {round}, there; then carry exchange/ here"
        raise NotReady(message, where=workspace.client_update(round, absent[0]), mend=mend)
    if absent:
        report(
            Event("warning", f"averaging {len(updates)} of {len(workspace.clients)} clients; absent: client {names}")
        )
    return updates


def _average(
    workspace: Workspace,
    round: int,
    theta: Artefact,
    updates: dict[int, Path],
    parents: dict[str, str],
    report: Report,
) -> _Average:
    """Plain mode: every update is read, and combined by the agreement's rule."""
    from threadpoolctl import threadpool_limits

    from stages.aggregation.rules import WEIGHTINGS, aggregator
    from stages.artefacts import adapter_files

    settings, lora = workspace.agreement.aggregation, workspace.agreement.slm.lora
    old = adapter_files.read_adapter(theta, None, lora)
    layout, weight_of = adapter_files.layout_of(old), WEIGHTINGS[settings.weighting]
    combined, examples, tokens = aggregator(settings, old), 0, 0
    del old  # rules that measure updates against it keep it
    if settings.rule in OF_FACTORS:
        report(Event("warning", f"{settings.rule} of A and of B, as they are: that is not the {settings.rule} of BA"))
    with threadpool_limits(1, "blas"):
        for number, (client, update) in enumerate(_each(workspace, theta, updates), 1):
            _check_update(update, client, round, theta)
            parents[f"client-{client}"] = update.sha256  # what was read now, should it have been replaced meanwhile
            combined.add(adapter_files.read_adapter(update, layout, lora), weight_of(update.manifest.examples))
            examples, tokens = examples + update.manifest.examples, tokens + update.manifest.tokens
            report(Event("step", f"client {client}", step=number, total=len(updates)))
        average = combined.result()
        metrics = combined.metrics(list(updates))

    return _Average(average, parents, examples, tokens, metrics)


def _publish(
    workspace: Workspace,
    theta: Artefact,
    average: _Average,
    gated: _Gate | None,
    models: Models | None,
    started: float,
    places: turns.Places,
    report: Report,
) -> Manifest:
    """Publish the average, or, where the gate keeps it out, the broadcast's adapter."""
    from stages.artefacts import adapter_files

    adapter_files.check_finite(average.tensors, "the average")
    round, metrics = theta.manifest.round, average.metrics
    weights, inputs = adapter_files.weights_bytes(average.tensors), dict(average.parents)
    begun: dict[str, Any] = {"inputs": inputs}
    if gated:
        verdict = _pass(workspace, theta, average.tensors, gated, models, report)
        weights = theta.contents[ADAPTER_WEIGHTS] if verdict.keeps_old else weights
        metrics = metrics | verdict.metrics
        inputs["held-out"] = gated.data_sha256
        begun |= {name: value for name, value in verdict.metrics.items() if name == "gate_rows_left_out"}
    manifest = publish(
        workspace.aggregate(round),
        {ADAPTER_CONFIG: theta.contents[ADAPTER_CONFIG], ADAPTER_WEIGHTS: weights},
        workspace,
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
        over=places[workspace.aggregate(round)],
    )
    writing.write_log(workspace.log("aggregate", round), [begun, {"wall_s": time.monotonic() - started}])
    return manifest


def _pass(
    workspace: Workspace, theta: Artefact, average: Tensors, gated: _Gate, models: Models | None, report: Report
) -> Verdict:
    """Put the average to the gate."""
    from stages.aggregation.gate import gate
    from stages.models.loading import Models

    models = models or Models(workspace)
    return gate(workspace, theta, average, gated.rows, amount=gated.amount, models=models, report=report)


def _each(workspace: Workspace, theta: Artefact, updates: dict[int, Path]) -> Iterator[tuple[int, Artefact]]:
    """The artefacts one by one, the next being read and hashed while the last is added: two in memory, however many."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        limit_bytes = largest_bytes(theta.manifest.parameters)

        def read(client: int) -> Artefact:
            return received(
                updates[client],
                workspace,
                reader=SERVER,
                stage="client-train",
                round=theta.manifest.round,
                client=client,
                limit_bytes=limit_bytes,
            )

        clients = list(updates)
        upcoming = reader.submit(read, clients[0])
        for number, client in enumerate(clients, 1):
            artefact = upcoming.result()
            if number < len(clients):
                upcoming = reader.submit(read, clients[number])
            yield client, artefact


def _check_update(update: Artefact, client: int, round: int, theta: Artefact) -> None:
    """Raise Refused unless this client trained it in this round from this broadcast on this base."""
    again = f"fedcollm client-train --client {client} --round {round} --overwrite, on client {client}'s machine"
    if max(update.manifest.examples, update.manifest.tokens, update.manifest.steps) > MOST_CLAIMED:
        message = f"client {client}'s update of round {round} says it saw more than {MOST_CLAIMED} examples or tokens"
        raise Refused(message, where=update.path, mend=again)
    if update.manifest.examples == 0:
        raise Refused(
            f"client {client}'s update of round {round} says it saw no examples", where=update.path, mend=again
        )
    if update.manifest.parents != {"broadcast": theta.sha256}:
        message = f"client {client}'s update of round {round} was trained from another broadcast than the one here"
        raise Refused(message, where=update.path, mend=f"carry exchange/ there; then {again}")
    if name := update.manifest.base.differs(theta.manifest.base):
        message = f"client {client}'s update of round {round} was trained on another base model or tokenizer"
        message += ", by its configuration" if name == "settings_sha256" else f", by its {name}"
        raise Refused(message, where=update.path, mend=again)
