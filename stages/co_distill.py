"""co-distill, lines 15-18 of Algorithm 1: LLM and SLM teach each other on the auxiliary data (Eq. 4-6).

Reads private/server/round-t/aggregate, from round 2 private/server/round-(t-1)/llm, and private/server/auxiliary.jsonl.
Writes private/server/round-t/llm and, last, .../slm, and the log private/server/round-t/co-distill.jsonl.

In two phases, with one model in memory at a time: `capture` writes what a model says, before the round changes it, to
private/server/round-t/captured-llm (captured-slm); `train` trains each model against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import read_manifest
from stages.artefacts.steps import Over
from stages.distillation.inputs import Inputs, read_inputs
from stages.distillation.phases import Distilling, Phase, Trained, check_phase, done_before
from stages.parties.party import Party
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

if TYPE_CHECKING:
    from stages.models.loading import Models


def co_distill(
    workspace: Workspace,
    *,
    round: int,
    phase: Phase | None = None,
    model: Role | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> Manifest:
    """Train both adapters of one round and publish them. Returns the SLM's manifest; with FedMKT the LLM's, alone.

    phase: one of two, each with one model in memory at a time; it returns the manifest of what it made last. capture
    needs a model, train takes the LLM and then the SLM without one. top_k: how many tokens of each position are kept.
    processes: all call this alike; the first decides and writes, and each trains its share.
    """
    check_phase(workspace, round, phase=phase, model=model, top_k=top_k, processes=processes)
    server, read = Party.server(workspace.of_round(round)), cache(lambda: read_inputs(server, round, report))
    said: dict[str, Any] = {"overwrite": overwrite, "models": models, "processes": processes, "report": report}
    if workspace.agreement.federation.clients_tell:
        from stages.distillation.from_clients import LearnFromClients

        return LearnFromClients.of(server, round, **said).take()
    roles: tuple[Role, ...] = (model,) if model else ("llm", "slm")
    if phase == "capture":
        from stages.distillation.capture import Capture

        return Capture.of(server, round, roles[0], top_k=top_k, **said).take()
    if phase == "train":
        from stages.distillation.two_phases import TrainAgainst

        return [TrainAgainst.of(server, round, role, read=read, **said).take() for role in roles][-1]
    publishes, log = [workspace.slm(round), workspace.llm(round)], workspace.log("co-distill", round)
    return CoDistill(party=server, round=round, publishes=publishes, log=log, read=read, **said).take()


@dataclass(frozen=True, kw_only=True)
class CoDistill(Distilling[Inputs, Trained]):
    """Lines 15 to 18: theta and omega, trained together on the auxiliary data."""

    read: Callable[[], Inputs]

    def open(self) -> Inputs:
        """Read the auxiliary rows, the aggregate, and the LLM's adapter of the round before."""
        self.report(Event("stage", f"co-distill, round {self.round}"))
        return self.read()

    def look(self, opened: Inputs, again: bool) -> Manifest | None:
        """Both adapters, from these inputs."""
        return done_before(self.party, self.round, opened, overwrite=again)

    def compute(self, opened: Inputs, again: bool) -> Trained:
        """Make both models ready, and let them teach each other (Eq. 6)."""
        from stages.distillation import side
        from stages.models import adapters
        from stages.training.objective import Objective, mutual_losses

        models = side.loaded_to_train(self, "slm", "llm")
        slm, llm = side.ready(self, models, "slm", opened.theta), side.ready(self, models, "llm", opened.omega)
        examples, _, left_out = side.encoded(self, opened.rows, {"slm": slm.outline, "llm": llm.outline})
        begun = [(one, adapters.take(one.model)) for one in (llm, slm)]
        losses = mutual_losses(self.workspace.agreement.distillation)
        objective = Objective([slm, llm], losses, side.weights(self.workspace, "slm", "llm"))
        outcome = side.train(self, objective, [slm, llm], examples, inputs=opened.begun_with, again=again)
        norms = {one.role: adapters.check_trained(before, adapters.take(one.model)) for one, before in begun}
        return Trained(slm, llm, outcome, norms, left_out)

    def publish(self, opened: Inputs, computed: Trained, over: Over) -> Manifest:
        """Publish the LLM's adapter and then the SLM's, which ends the round, and write the log."""
        from stages.distillation import side

        (slm, llm, outcome, _, left_out), metrics, parents = computed, computed.metrics, opened.parents
        side.publish_model(self, llm, outcome, parents=parents, metrics=metrics("llm"), over=over)
        parents |= {"llm-after": read_manifest(self.workspace.llm(self.round))[1]}
        manifest = side.publish_model(self, slm, outcome, parents=parents, metrics=metrics("slm"), over=over)
        side.finish(self, [outcome.log[0] | left_out, *outcome.log[1:]])
        return manifest
