"""client-distill, FedMKT: a client's model learns on the public rows, from the LLM where that knows better (Eq. 8, 10).

Reads private/client-k/round-t/trained, private/client-k/public.jsonl, exchange/round-t/server, its own
exchange/round-t/client-k, and from round 1 both vocabularies. Where the LLM stays as it is (llm2slm), it is round 1's
exchange/round-0001/server that is learned from; standalone-public learns from the answers alone.
Writes private/client-k/round-t/slm, and the private log private/client-k/round-t/client-distill.jsonl. Where adapters
are averaged after the round, that one goes to exchange/round-t/adapter-client-k instead.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import PUBLIC, already_made, is_earlier, publish
from stages.artefacts.reading import Artefact
from stages.artefacts.steps import Over, Step
from stages.artefacts.subjects import OWN_EXAMPLES, OWN_TOKENS, trained_by
from stages.files import writing
from stages.parties.party import Party
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    import numpy as np

    from stages.distillation.public import Public
    from stages.distillation.studying import Studied
    from stages.distillation.teaching import Taught
    from stages.models.loading import Models


def client_distill(
    workspace: Workspace,
    *,
    client: int,
    round: int,
    overwrite: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> Manifest:
    """Train one client's adapter on the public rows and publish it. Returns its manifest.

    processes: all call this alike; the first decides and writes, and each trains its share.
    """
    workspace.check_round(round)
    workspace.check_step("client-distill", round)
    workspace.check_client(client)
    party = Party.client(workspace, client)
    return ClientDistill(
        party=party,
        round=round,
        publishes=[workspace.client_adapter(round, client)],
        log=workspace.log("client-distill", round, client),
        overwrite=overwrite,
        models=models,
        processes=processes,
        report=report,
    ).take()


class Opened(NamedTuple):
    """The public rows, the adapter, what the LLM teaches, and how well the client itself knows each row.

    taught, losses: None where there is no teacher; losses: also where the client tells nobody. attempt: at a round
    whose adapters are averaged.
    """

    public: Public
    trained: Artefact
    taught: Taught | None
    losses: np.ndarray | None
    parents: dict[str, str]
    attempt: int


@dataclass(frozen=True, kw_only=True)
class ClientDistill(Step[Opened, "Studied", Manifest]):
    """Lines 31 to 39 of FedMKT's Algorithm 1."""

    round: int
    models: Models | None

    def open(self) -> Opened:
        """Read the rows, the adapter, and what the LLM and the client itself know of them."""
        from stages.distillation import teaching
        from stages.distillation.public import read_public

        round, number, federation = self.round, self.party.number, self.workspace.agreement.federation
        self.report(Event("stage", f"client-distill, round {round}, client {number}"))
        public = read_public(self.party, self.report)
        trained = trained_by(self.party, round)
        parents, taught, losses, attempt = {"trained": trained.sha256}, None, None, 0
        if self.workspace.agreement.averages:
            parents |= trained.manifest.parents  # the broadcast, which the server looks for
            attempt = trained.manifest.attempt
        if federation.server_tells:
            taught = teaching.from_server(self.party, round, public, self.report)
            parents |= taught.parents
        if taught and federation.clients_tell:
            knowledge, own = teaching.told_by(self.party, round, number, public, taught.own)
            parents[self.party.name], losses = own.sha256, knowledge.losses
        return Opened(public, trained, taught, losses, parents, attempt)

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """An adapter that was trained from these; one for an earlier attempt at the round is made again."""
        [folder], data = self.publishes, opened.public.sha256
        again = again or is_earlier(folder, opened.attempt)
        return already_made(
            folder, opened.parents, by=self.party, overwrite=again, log=self.log, data=data, rows=PUBLIC
        )

    def compute(self, opened: Opened, again: bool) -> Studied:
        """Choose the rows that the LLM knows better, and train on all of them."""
        from stages.distillation.studying import Study
        from stages.models.loading import Models

        models = self.models.of(self.workspace) if self.models else Models(self.workspace, self.processes)
        models.use("slm")
        if opened.taught:
            models.expect("slm", opened.taught.own.base, f"vocabulary-{self.party.name}")
        slm = models.with_adapter("slm", opened.trained)
        study = Study(self.party, self.round, opened.public, opened.taught, self.processes, self.report)
        return study.take(slm, opened.losses, opened.parents, again)

    def publish(self, opened: Opened, computed: Studied, over: Over) -> Manifest:
        """Publish the adapter, and write the log."""
        from stages.models import adapters
        from stages.training.drafts import draft_of

        [folder], (slm, outcome, metrics), trained = self.publishes, computed, opened.trained.manifest
        own = {OWN_EXAMPLES: float(trained.examples), OWN_TOKENS: float(trained.tokens)}
        draft = draft_of(
            slm,
            outcome,
            stage="client-distill",
            round=self.round,
            attempt=opened.attempt,
            parents=opened.parents,
            seed=self.workspace.seed_for("client-distill", self.round, self.party.number),
            metrics={**metrics, **(own if self.workspace.agreement.averages else {})},
            privacy=trained.privacy,
        )
        contents = adapters.as_files(slm.model, self.workspace.agreement.slm.lora)
        manifest = publish(folder, contents, draft, by=self.party, over=over[folder])
        writing.write_log(self.log, outcome.log)
        unfinished = self.workspace.unfinished("client-distill", self.round, self.party.number)
        shutil.rmtree(unfinished, ignore_errors=True)  # which another process may be writing into
        return manifest
