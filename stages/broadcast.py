"""broadcast, line 11 of Algorithm 1: the server publishes theta^t to all clients.

Reads, in round 1, the SLM and the federation's seed; in round t, private/server/round-(t-1)/slm (the aggregate, where
nothing is distilled then). Writes exchange/round-t/broadcast. From round 2 on the adapter is that one, byte for byte.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest, Opening
from stages.artefacts.publishing import already_made, publish
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.artefacts.steps import Over, Step
from stages.parties.party import Party
from stages.runtime.events import Event, Report, ignore
from stages.secagg import openings
from stages.workspace.commands import Command
from stages.workspace.names import THETA_FILES
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
    return Broadcast(
        party=Party.server(workspace.of_round(round)),
        round=round,
        without=without,
        publishes=[workspace.broadcast(round)],
        log=workspace.log("broadcast", round),
        overwrite=overwrite,
        models=models,
        report=report,
    ).take()


class Opened(NamedTuple):
    """theta^t as the round before left it, None in round 1; the attempt at the round, and what it says of keys."""

    theta: Artefact | None
    attempt: int = 0
    opening: Opening | None = None

    @property
    def parents(self) -> dict[str, str]:
        """What it is made from."""
        return {self.theta.path.name: self.theta.sha256} if self.theta else {}


class Computed(NamedTuple):
    """What is published, and what the manifest says of it."""

    contents: Mapping[str, bytes]
    draft: Draft


@dataclass(frozen=True, kw_only=True)
class Broadcast(Step[Opened, Computed, Manifest]):
    """Line 11: the server sends theta^t to all clients."""

    round: int
    without: Collection[int] | None
    models: Models | None

    def alone(self) -> AbstractContextManager[None]:
        """With the server's keys: an attempt is counted once."""
        return self.party.keys.alone(self.report) if self.party.members else nullcontext()

    def open(self) -> Opened:
        """Read theta^t, if it is not made here."""
        self.workspace.check_round(self.round)
        self.workspace.check_step("broadcast", self.round)
        self.report(Event("stage", f"broadcast, round {self.round}"))
        return Opened(_theta(self.party, self.round))

    def decide(self, opened: Opened, again: bool) -> tuple[Opened, bool]:
        """Open the round."""
        attempt, opening = openings.open_round(self.party, self.round, again=again, without=self.without)
        return Opened(opened.theta, attempt, opening), again

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """A broadcast of this theta and this opening."""
        [target] = self.publishes
        done = already_made(target, opened.parents, by=self.party, overwrite=again, opening=opened.opening)
        if done:
            openings.opened(self.party, self.round)
        return done

    def compute(self, opened: Opened, again: bool) -> Computed:
        """Take what the round before left, byte for byte; in round 1, make it."""
        if opened.theta is None:
            return self._first(opened)
        base, parameters = opened.theta.manifest.base, opened.theta.manifest.parameters
        draft = Draft(
            stage="broadcast",
            round=self.round,
            attempt=opened.attempt,
            parents=opened.parents,
            base=base,
            parameters=parameters,
            opening=opened.opening,
        )
        return Computed(opened.theta.contents, draft)

    def publish(self, opened: Opened, computed: Computed, over: Over) -> Manifest:
        """Publish it, and remember, where there are keys, which broadcast opens the round."""
        [target] = self.publishes
        manifest = publish(target, computed.contents, computed.draft, by=self.party, over=over[target])
        openings.opened(self.party, self.round)
        return manifest

    def _first(self, opened: Opened) -> Computed:
        """theta^1: PEFT's initialisation (B = 0), drawn once: an average of different ones would be none.

        An LLM that is here, and needed later in the round, is checked without reading its weights before anyone trains:
        by itself, and that it has the SLM's tokenizer.
        """
        from stages.artefacts import residual_files
        from stages.bases import base_folders
        from stages.models import adapters, shapes
        from stages.models.loading import Models

        agreement, seed = self.workspace.agreement, self.workspace.seed_for("broadcast", 1)
        if agreement.federation.distils and base_folders.configuration(self.workspace, "llm"):
            shapes.of_workspace(self.workspace, "llm")
        models = self.models or Models(self.workspace)
        if agreement.federation.distils:
            models.check_both()
        models.use("slm")
        slm = models.get("slm")
        adapters.make_fresh(slm.model, seed)
        draft = Draft(
            stage="broadcast",
            round=1,
            attempt=opened.attempt,
            parents={},
            base=slm.identity,
            parameters=adapters.count(slm.model),
            seed=seed,
            opening=opened.opening,
        )
        files = adapters.as_files(slm.model, agreement.slm.lora) | residual_files.as_file({}, agreement)
        return Computed(files, draft)


def _theta(server: Party, round: int) -> Artefact | None:
    """theta^t as the round before left it; None in round 1, where it is made here."""
    if round == 1:
        return None
    workspace = server.workspace
    source = workspace.round_result(round - 1)
    stage: Literal["co-distill", "aggregate"] = "co-distill" if workspace.agreement.federation.distils else "aggregate"
    message = f"round {round} begins with the adapter that {stage} makes in round {round - 1}, which is not there"
    missing = message, Command(stage, round=round - 1)
    return received(source, by=server, stage=stage, round=round - 1, missing=missing, only=THETA_FILES)
