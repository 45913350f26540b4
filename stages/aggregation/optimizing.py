"""The server's optimiser as the agreement asks for it: what it goes on from, what it makes and keeps.

It remembers once for each round, in the aggregate's folder, and goes on from the round before. Where a round ends with
the adapter that it began with, by the gate or --keep-old, it remembers what it did before: no step was taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stages.artefacts.average import Average
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import received
from stages.parties.party import Party
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.events import Event, Report
from stages.workspace.commands import Command
from stages.workspace.names import SERVER_STATE
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.aggregation.optimizers import State
    from stages.artefacts.adapter_files import Tensors


@dataclass(frozen=True)
class Optimizer:
    """How theta, the round's broadcast, goes on.

    before: the aggregate of the round before, with what was remembered then; None in round 1, and without an optimiser.
    """

    server: Party
    theta: Artefact
    before: Artefact | None = None

    @property
    def parents(self) -> dict[str, str]:
        """What an aggregate is made from beside the broadcast and the updates."""
        return {"aggregate": self.before.sha256} if self.before else {}

    def step(self, average: Average, report: Report) -> Average:
        """The adapter that the round goes on with: without an optimiser, the average as it is.

        Raises BadNumbers where the step leaves float32; as read_state does for what was remembered.
        """
        from stages.aggregation import optimizers, server_state
        from stages.artefacts.adapter_files import check_finite

        settings = self.server.workspace.agreement.aggregation
        if settings.server == "none":
            return average
        theta = self._theta()
        made = optimizers.step(settings.server, settings.server_keys, theta, average.tensors, self._state(theta))
        for what, tensors in (("the adapter", made.tensors), ("m", made.state.m), ("v", made.state.v)):
            check_finite(tensors, f"{what} of {settings.server}")
        report(
            Event("note", f"{settings.server}: a step of {made.step_norm:.3g} for an update of {made.delta_norm:.3g}")
        )
        told = {f"server/{settings.server}": 1.0, "delta_norm": made.delta_norm, "step_norm": made.step_norm}
        beside = {SERVER_STATE: server_state.state_bytes(made.state)}
        return replace(average, tensors=made.tensors, metrics=average.metrics | told, beside=beside)

    def kept(self) -> dict[str, bytes]:
        """The file of what is remembered where no step is taken: that of the round before, byte for byte."""
        if self.server.workspace.agreement.aggregation.server == "none":
            return {}
        from stages.aggregation import server_state

        theta = self._theta()
        state = self._state(theta)  # looked at: what is damaged is not handed on
        return {SERVER_STATE: self.before.contents[SERVER_STATE] if self.before else server_state.state_bytes(state)}

    def _theta(self) -> Tensors:
        from stages.artefacts.adapter_files import read_adapter

        return read_adapter(self.theta, None, self.server.workspace.agreement.slm.lora)

    def _state(self, theta: Tensors) -> State:
        """What was remembered before this round."""
        from stages.aggregation import optimizers, server_state
        from stages.artefacts.adapter_files import layout_of

        settings = self.server.workspace.agreement.aggregation
        if self.before is None:
            return optimizers.first_state(settings.server, settings.server_keys, theta)
        content, path = self.before.contents[SERVER_STATE], self.before.path / SERVER_STATE
        return server_state.read_state(content, path, settings.server, layout_of(theta))


def optimizer_of(server: Party, theta: Artefact) -> Optimizer:
    """The agreed optimiser in a round, with what it remembers.

    Raises NotReady where the round before is not there, Damaged and Refused as received does, and Refused where the
    broadcast began with another aggregate than lies there.
    """
    workspace, round = server.workspace, theta.manifest.round - 1
    name = workspace.agreement.aggregation.server
    if name == "none" or round == 0:
        return Optimizer(server, theta)
    place, again = workspace.aggregate(round), Command("aggregate", round=round, overwrite=True)
    missing = f"{name} goes on from what it remembers of round {round}, whose aggregate is not there", again
    try:
        before = received(place, by=server, stage="aggregate", round=round, missing=missing, only=[SERVER_STATE])
        if SERVER_STATE not in before.contents:
            raise Damaged(f"the aggregate of round {round} names no {SERVER_STATE}", where=place)
    except (NotReady, Damaged) as problem:
        problem.mend = f"put the whole folder back from a backup; or `{again}`: the same updates give the same bytes"
        raise
    _check_follows(workspace, theta, before)
    return Optimizer(server, theta, before)


def _check_follows(workspace: Workspace, theta: Artefact, before: Artefact) -> None:
    """Raise Refused where theta began with another aggregate than the one whose optimiser is to go on.

    Where co-distill came between, by what its adapter says, if that is here.
    """
    round, made_of = before.manifest.round, theta.manifest.parents
    if "slm" in made_of:
        place = workspace.slm(round)
        if not place.exists():
            return
        manifest, sha256 = read_manifest(place)
        made_of = manifest.parents if sha256 == made_of["slm"] else {"aggregate": before.sha256}
    if made_of.get("aggregate") != before.sha256:
        message = f"the broadcast of round {round + 1} did not begin with the aggregate of round {round} that is here"
        mend = f"put that aggregate back; or make again what follows from this one: {Command('status')} names it"
        raise Refused(message, where=theta.path, mend=mend)
