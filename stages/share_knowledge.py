"""share-knowledge, FedMKT: what a model knows of the public rows, for others of any family to learn from (S_k, S_0).

A client's reads private/client-k/round-t/trained, private/client-k/public.jsonl and exchange/round-0001/vocabulary-
client-k. Writes exchange/round-t/client-k: of each row the loss, of each position of its completion the likeliest
tokens with their probabilities; and the private log private/client-k/round-t/share-knowledge.jsonl.
The server's reads private/server/round-t/llm and auxiliary.jsonl, and writes exchange/round-t/server. Where the LLM
stays as it is (llm2slm), round 1 tells all there is to tell.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import PUBLIC, already_made, publish
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.artefacts.steps import Over, Step
from stages.artefacts.subjects import trained_by
from stages.files import writing
from stages.parties import names
from stages.parties.party import Party
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import KNOWLEDGE
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

if TYPE_CHECKING:
    from stages.distillation.knowledge import Knowledge
    from stages.distillation.pairs import Voice
    from stages.distillation.public import Public
    from stages.models.loading import Models
    from stages.models.tuned import Tuned


def share_knowledge(
    workspace: Workspace,
    *,
    round: int,
    client: int | None = None,
    server: bool = False,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> Manifest:
    """Tell what one model knows: a client's, or the server's LLM. Returns the manifest of what is told.

    Raises as received does for an adapter that is not there, Refused for rows or a model that are not those whose
    vocabulary was told, BadNumbers for NaN.
    """
    if (client is None) != server:
        commands = (
            Command("share-knowledge", client=..., round=round),
            Command("share-knowledge", server=True, round=round),
        )
        raise UsageProblem("who tells what it knows: a client, or the server?", mend=f"{commands[0]}, or {commands[1]}")
    workspace.check_round(round)
    workspace.check_step("share-knowledge", round)
    if client is not None:
        workspace.check_client(client)
    party = Party.of(workspace, client)
    return ShareKnowledge(
        party=party,
        round=round,
        publishes=[workspace.knowledge(round, client)],
        log=workspace.log("share-knowledge", round, client),
        overwrite=overwrite,
        models=models,
        report=report,
    ).take()


class Opened(NamedTuple):
    """The public rows, how the party reads them, and the adapter; None: of an LLM that stays as it is."""

    public: Public
    voice: Voice
    start: Artefact | None
    parents: dict[str, str]


class Computed(NamedTuple):
    """What the model knows, the model, and when that was begun."""

    knowledge: Knowledge
    tuned: Tuned
    started: float


@dataclass(frozen=True, kw_only=True)
class ShareKnowledge(Step[Opened, Computed, Manifest]):
    """One party's knowledge, in one round."""

    round: int
    models: Models | None

    @property
    def client(self) -> int | None:
        """Whose it is; None: the server's."""
        return None if self.party.is_server else self.party.number

    @property
    def role(self) -> Role:
        """What the model is."""
        return "llm" if self.party.is_server else "slm"

    def open(self) -> Opened:
        """Read the rows, what was told of how they are read, and the adapter."""
        from stages.distillation.pairs import voice_of
        from stages.distillation.public import read_public

        self.report(Event("stage", f"share-knowledge, round {self.round}, {names.said(self.party.name)}"))
        public = read_public(self.party, self.report)
        voice, start = voice_of(self.party, self.client, public), self._start()
        parents = {f"vocabulary-{self.party.name}": voice.sha256}
        parents |= {start.path.name: start.sha256} if start else {}
        return Opened(public, voice, start, parents)

    def _start(self) -> Artefact | None:
        workspace, round = self.workspace, self.round
        if self.party.is_server:
            if not workspace.agreement.federation.clients_tell:
                if round > 1:
                    mend = f"clients learn from what round 1 told: {Command('share-knowledge', server=True, round=1)}"
                    raise UsageProblem("the LLM stays as it is: there is nothing new to tell", mend=mend)
                return None
            made_by = Command("co-distill", round=round)
            missing = f"the LLM of round {round} is not trained", made_by
            return received(workspace.llm(round), by=self.party, stage="co-distill", round=round, missing=missing)
        return trained_by(self.party, round)

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """What this model has told of these rows."""
        [folder], data = self.publishes, opened.public.sha256
        return already_made(
            folder, opened.parents, by=self.party, overwrite=again, log=self.log, data=data, rows=PUBLIC
        )

    def compute(self, opened: Opened, again: bool) -> Computed:
        """Ask it at every position of every completion."""
        from stages.distillation.knowing import known
        from stages.models.loading import Models

        started = time.monotonic()
        models = self.models.of(self.workspace) if self.models else Models(self.workspace)
        models.use(self.role)
        models.expect(self.role, opened.voice.base, f"vocabulary-{self.party.name}")
        tuned = models.begun(self.role, opened.start, seed=self.workspace.seed_for("omega", 1))
        folder = self.workspace.unfinished("share-knowledge", self.round, self.client)
        inputs = {"data": opened.public.sha256, **opened.parents}
        knowledge = known(
            tuned,
            opened.public,
            opened.voice,
            self.workspace,
            folder=folder,
            inputs=inputs,
            again=again,
            report=self.report,
        )
        return Computed(knowledge, tuned, started)

    def publish(self, opened: Opened, computed: Computed, over: Over) -> Manifest:
        """Publish it, and write the log."""
        from stages.distillation.knowledge import figures, knowledge_bytes
        from stages.models import adapters

        knowledge, tuned, started = computed
        [folder], content = self.publishes, knowledge_bytes(knowledge)
        metrics = figures(knowledge)
        words = f"{len(content)} bytes: {len(knowledge.chances)} positions of {int(metrics['rows'])} rows"
        self.report(Event("note", f"{words}; mean loss of an answer {metrics['loss']:.4g} nats"))
        draft = Draft(
            stage="share-knowledge",
            role=self.role,
            round=self.round,
            parents=opened.parents,
            base=tuned.identity,
            parameters=adapters.count(tuned.model),
            dtype=tuned.dtype,
            examples=int(metrics["rows"]),
            tokens=len(knowledge.chances),
            metrics=metrics,
            privacy=opened.start.manifest.privacy if opened.start else None,
        )
        manifest = publish(folder, {KNOWLEDGE: content}, draft, by=self.party, over=over[folder])
        inputs = {"agreement": self.workspace.agreement_sha256, "data": opened.public.sha256, **opened.parents}
        writing.write_log(self.log, [{"inputs": inputs}, {"wall_s": round(time.monotonic() - started, 3)}])
        shutil.rmtree(self.workspace.unfinished("share-knowledge", self.round, self.client), ignore_errors=True)
        return manifest
