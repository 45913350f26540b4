"""co-distill with FedMKT: the LLM alone learns, of each public row from whichever client knows it best (Eq. 7, 9).

Reads each exchange/round-t/client-k and exchange/round-0001/vocabulary-*, from round 2 private/server/round-(t-1)/llm,
and private/server/auxiliary.jsonl. Writes private/server/round-t/llm, and the log private/server/round-t/
co-distill.jsonl.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any, NamedTuple

from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import PUBLIC, already_made, publish
from stages.artefacts.reading import Artefact
from stages.artefacts.steps import Over
from stages.distillation import side, teaching
from stages.distillation.inputs import omega_of
from stages.distillation.phases import Distilling
from stages.distillation.public import Public, read_public
from stages.distillation.studying import Studied, Study
from stages.distillation.teaching import Taught
from stages.files import writing
from stages.models import adapters
from stages.parties.party import Party
from stages.runtime.events import Event
from stages.training.drafts import draft_of


class Opened(NamedTuple):
    """The public rows, the LLM's adapter of the round before, what clients teach, and the digests of all that."""

    public: Public
    omega: Artefact | None
    taught: Taught
    parents: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class LearnFromClients(Distilling[Opened, Studied]):
    """Lines 10 to 16 of FedMKT's Algorithm 1."""

    @classmethod
    def of(cls, server: Party, round: int, **said: Any) -> LearnFromClients:
        """In one round."""
        workspace = server.workspace
        return cls(
            party=server,
            round=round,
            publishes=[workspace.llm(round)],
            log=workspace.log("co-distill", round),
            **said,
        )

    def open(self) -> Opened:
        """Read the rows, the LLM's adapter, and what each client that has told knows."""
        self.report(Event("stage", f"co-distill, round {self.round}"))
        public, omega = read_public(self.party, self.report), omega_of(self.party, self.round)
        taught = teaching.from_clients(self.party, self.round, public, self.report)
        return Opened(public, omega, taught, taught.parents | ({"llm": omega.sha256} if omega else {}))

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """An adapter that was trained from these."""
        [folder], data = self.publishes, opened.public.sha256
        return already_made(
            folder, opened.parents, by=self.party, overwrite=again, log=self.log, data=data, rows=PUBLIC
        )

    def compute(self, opened: Opened, again: bool) -> Studied:
        """Ask the LLM what it knows, choose who teaches each row, and train it."""
        models = side.loaded_to_train(self, "llm")
        models.expect("llm", opened.taught.own.base, "vocabulary-server")
        llm = side.ready(self, models, "llm", opened.omega)
        study = Study(self.party, self.round, opened.public, opened.taught, self.processes, self.report)
        return study.take(llm, None, opened.parents, again)

    def publish(self, opened: Opened, computed: Studied, over: Over) -> Manifest:
        """Publish the adapter, and write the log."""
        [folder], (llm, outcome, metrics) = self.publishes, computed
        seed = self.workspace.seed_for("co-distill", self.round)
        draft = draft_of(
            llm,
            outcome,
            stage="co-distill",
            round=self.round,
            parents=opened.parents,
            seed=seed,
            metrics=metrics,
        )
        contents = adapters.as_files(llm.model, self.workspace.agreement.llm.lora)
        manifest = publish(folder, contents, draft, by=self.party, over=over[folder])
        writing.write_log(self.log, outcome.log)
        shutil.rmtree(self.workspace.unfinished(self.name, self.round), ignore_errors=True)
        return manifest
