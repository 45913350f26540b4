"""aggregate, line 13 of Algorithm 1: the server averages the clients' adapters.

In plain mode it reads each update; where they are masked or encrypted it closes the round over those that have arrived,
and, once enough clients have revealed, or the one with the key, has their sum.
Reads exchange/round-t/broadcast and every exchange/round-t/{client-k,reveal-k} that has arrived (of averaged FedMKT
adapter-client-k, and server); with an optimiser, private/server/round-(t-1)/aggregate; with a gate,
private/server/held-out.jsonl and the SLM, which nothing else here needs.
Writes private/server/round-t/aggregate, and the log private/server/round-t/aggregate.jsonl; where updates are
hidden exchange/round-t/close first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from stages.aggregation import channels
from stages.aggregation.gating import Gate, check_same_gate, gate_of
from stages.aggregation.optimizing import Optimizer, optimizer_of
from stages.artefacts.average import Arrived, Average
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import KEPT_OLD, already_made, publish
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.artefacts.steps import Over, Step
from stages.files import writing
from stages.parties.party import Party
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.aggregation.gate import Verdict
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
    server = Party.server(workspace.of_round(round))
    return (KeepOld if keep_old else Aggregate)(
        party=server,
        channel=channels.from_clients(server, report),
        round=round,
        gate=gate,
        publishes=[workspace.aggregate(round)],
        log=workspace.log("aggregate", round),
        overwrite=overwrite,
        models=models,
        report=report,
    ).take()


class Opened(NamedTuple):
    """The broadcast that the round began with, the gate that is asked for, and the updates that have arrived."""

    theta: Artefact
    gate: Gate | None
    optimizer: Optimizer
    arrived: Arrived


class Computed(NamedTuple):
    """The average, what the gate says of it, and when that began, in seconds."""

    average: Average
    verdict: Verdict | None
    started: float


@dataclass(frozen=True, kw_only=True)
class Aggregate(Step[Opened, Computed, Manifest]):
    """Line 13: theta, averaged over the updates that have arrived."""

    channel: channels.FromClients
    round: int
    gate: float | None
    models: Models | None

    def open(self) -> Opened:
        """Read the broadcast, and the rows of the gate."""
        workspace, round = self.workspace, self.round
        workspace.check_round(round)
        workspace.check_step("aggregate", round)
        self.report(Event("stage", f"aggregate, round {round}"))
        missing = f"the broadcast of round {round} is not there", Command("broadcast", round=round)
        theta = received(workspace.broadcast(round), by=self.party, stage="broadcast", round=round, missing=missing)
        gate, optimizer = gate_of(workspace, self.gate), optimizer_of(self.party, theta)
        return Opened(theta, gate, optimizer, Arrived({"broadcast": theta.sha256} | optimizer.parents))

    def decide(self, opened: Opened, again: bool) -> tuple[Opened, bool]:
        """Which updates are averaged: decided once, whatever arrives meanwhile."""
        if opened.arrived.is_decided:
            return opened, again
        arrived = self.channel.arrived(opened.theta, again)
        return opened._replace(arrived=replace(arrived, parents=opened.arrived.parents | arrived.parents)), again

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """An aggregate of these updates. Raises Refused for one that passed another gate.

        Whoever asks for no gate takes it with the one it has.
        """
        [target], gate = self.publishes, opened.gate
        done = already_made(target, opened.arrived.parents, by=self.party, overwrite=again)
        if done and gate:
            check_same_gate(self.workspace, gate, done, self.log, target)
        return done

    def compute(self, opened: Opened, again: bool) -> Computed:
        """Average, take the step of the server's optimiser, and put what that made to the gate."""
        from stages.artefacts import adapter_files

        started, theta, gate = time.monotonic(), opened.theta, opened.gate
        average = self.channel.combine(theta, opened.arrived)
        adapter_files.check_finite(average.tensors, "the average")
        average = opened.optimizer.step(average, self.report)
        verdict = gate.verdict(self.workspace, theta, average, self.models, self.report) if gate else None
        return Computed(average, verdict, started)

    def publish(self, opened: Opened, computed: Computed, over: Over) -> Manifest:
        """Publish the average, or, where the gate keeps it out, the broadcast's adapter."""
        from stages.artefacts import adapter_files

        (average, verdict, started), theta, [target] = computed, opened.theta, self.publishes
        keeps_old = verdict is not None and verdict.keeps_old
        weights = {} if keeps_old else {ADAPTER_WEIGHTS: adapter_files.weights_bytes(average.tensors)}
        beside = opened.optimizer.kept() if keeps_old else average.beside
        said = verdict.metrics if verdict else {}
        manifest = publish(
            target,
            theta.contents | weights | beside,
            Draft(
                stage="aggregate",
                round=self.round,
                attempt=theta.manifest.attempt,
                parents=average.parents,
                base=theta.manifest.base,
                parameters=theta.manifest.parameters,
                examples=average.examples,
                tokens=average.tokens,
                metrics=average.metrics | said,
                unmasking=average.unmasking,
            ),
            by=self.party,
            over=over[target],
        )
        inputs = average.parents | ({"held-out": opened.gate.data_sha256} if opened.gate else {})
        left_out = {name: value for name, value in said.items() if name == "gate_rows_left_out"}
        begun, ended = {"inputs": inputs, **left_out}, {"wall_s": time.monotonic() - started}
        writing.write_log(self.log, [begun, ended])
        return manifest


class KeepOld(Aggregate):
    """What the server begins the next round with where this one has come to nothing: the broadcast's adapter."""

    def decide(self, opened: Opened, again: bool) -> tuple[Opened, bool]:
        """No update counts."""
        return opened, again

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """Whether it was given up before."""
        return already_made(self.publishes[0], opened.arrived.parents, by=self.party, overwrite=again)

    def compute(self, opened: Opened, again: bool) -> Computed:
        """Nothing is averaged."""
        self.report(Event("warning", f"round {self.round} is given up: its aggregate is the broadcast's adapter"))
        return Computed(Average({}, opened.arrived.parents), None, time.monotonic())

    def publish(self, opened: Opened, computed: Computed, over: Over) -> Manifest:
        """Publish the broadcast's adapter, byte for byte."""
        theta, [target] = opened.theta, self.publishes
        draft = Draft(
            stage="aggregate",
            round=self.round,
            attempt=theta.manifest.attempt,
            parents=computed.average.parents,
            base=theta.manifest.base,
            parameters=theta.manifest.parameters,
            metrics={KEPT_OLD: 1.0},
        )
        return publish(target, theta.contents | opened.optimizer.kept(), draft, by=self.party, over=over[target])
