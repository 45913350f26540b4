"""evaluate: accuracy by lm-evaluation-harness of the LLM, the SLM or a client's own SLM.

Reads private/server/round-t/{slm,llm,aggregate} or exchange/round-t/client-k. Writes results/round-t/*.json under the
same names; of the bases alone, results/zero-shot/{slm,llm}.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.artefacts import records
from stages.artefacts.manifest import BaseIdentity, versions
from stages.artefacts.reading import Artefact
from stages.artefacts.records import Measured, Result, Scored
from stages.artefacts.steps import Over, Step
from stages.artefacts.subjects import Subject, adapter_of, subject_of
from stages.files import reading, writing
from stages.parties.party import Party
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.workspace.attacks import Attack
from stages.workspace.names import ADAPTER_WEIGHTS, AGREEMENT
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.workspace.settings import Role


def evaluate(
    workspace: Workspace,
    *,
    model: Subject = "slm",
    round: int | None = None,
    client: int | None = None,
    attack: Attack | None = None,
    overwrite: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> Result:
    """Score one model and write down the scores. Returns what the result file says.

    model: which of the server's: "slm" and "llm" after co-distill, "aggregate" the SLM before it; with a client, that
    client's own SLM instead. Without a round, the base alone. What is asked, and where the result is: see
    Workspace.asking. attack: measure accuracy under it, too, by default that
    of the agreement, if any; a result under another attack is made anew. Before scoring, the adapter is proven to be in
    the model and to change its logits, but for an aggregate that is still the first broadcast's adapter, which changes
    nothing. processes: all call this alike; the first decides and writes, and each scores its share.
    """
    subject = subject_of(model, client)
    target = workspace.result(round, subject)
    return Evaluate(
        party=Party.of(workspace, client),
        model=model,
        subject=subject,
        round=round,
        client=client,
        attack=attack or workspace.evaluation.attack,
        publishes=[target],
        log=target,
        overwrite=overwrite,
        models=models,
        processes=processes,
        report=report,
    ).take()


class Opened(NamedTuple):
    """The adapter, None for the base alone; which base that is; and what decides the scores."""

    adapter: Artefact | None
    base: BaseIdentity
    what: Scored


@dataclass(frozen=True, kw_only=True)
class Evaluate(Step[Opened, Measured, Result]):
    """Score one model on the tasks of the agreement."""

    model: Subject
    subject: str
    round: int | None
    client: int | None
    attack: Attack
    models: Models | None

    @property
    def role(self) -> Role:
        """The base that is scored."""
        return "llm" if self.subject == "llm" else "slm"

    @property
    def lock(self) -> Path:
        """Hidden, beside the result."""
        return self.log.with_name(f".{self.subject}.lock")

    def open(self) -> Opened:
        """Receive the adapter; without one, the base is loaded to know which it is."""
        name = self.subject if self.round is None else f"{self.subject}, round {self.round}"
        self.report(Event("stage", f"evaluate {name}"))
        if self.round is None:
            adapter, base = None, self._models.get(self.role).identity
        else:
            adapter = adapter_of(self.workspace, self.model, self.round, self.client)
            base = adapter.manifest.base
        return Opened(adapter, base, self._what(adapter, base))

    def look(self, opened: Opened, again: bool) -> Result | None:
        """A result of this adapter, under these settings."""
        [target] = self.publishes
        if again or not target.exists():
            return None
        earlier = records.read_result(target)
        is_same = all(earlier.get(key) == value for key, value in opened.what.items() if key != "base")
        is_same &= records.is_current(earlier, self.workspace)  # it may name settings that are the agreement's now
        return earlier if is_same and records.is_of_base(earlier, opened.base) else None

    def compute(self, opened: Opened, again: bool) -> Measured:
        """Put the adapter into the base, prove that it is there, and ask all questions."""
        from stages.data import tasks
        from stages.evaluation import scoring
        from stages.evaluation.prompting import Prompting
        from stages.evaluation.standing import standing
        from stages.models.perturbing import Ascent

        settings, role, adapter = self.workspace.evaluation, self.role, opened.adapter
        loaded = tasks.load(self.workspace, self.workspace.scored_tasks, self.report)
        for task in loaded:
            tasks.check_answers(task, self.report, shots=settings.num_fewshot)
        tuned, has_adapter = standing(self._models, role, adapter, self.workspace.agreement, self.report)
        scores = scoring.score(
            tuned,
            loaded,
            with_adapter=has_adapter,
            limit=settings.limit,
            batch_size=settings.batch_size,
            attack=Ascent.of(self.attack),
            prompting=Prompting.of(settings),
            as_trained=settings.precision == "training",
            processes=self.processes,
            shares=role not in self.workspace.machine.sharding,
            report=self.report,
        )
        dtype = tuned.dtype if settings.precision == "training" else str(tuned.model.dtype).removeprefix("torch.")
        return {"weights_dtype": dtype, "versions": versions(), "tasks": scores}

    def publish(self, opened: Opened, computed: Measured, over: Over) -> Result:
        """Write the result down, and tell it."""
        [target] = self.publishes
        result: Result = {**opened.what, **computed}
        writing.write(target, reading.json_bytes(records.stamped(result)), over=over[target])
        for task, scores in result["tasks"].items():
            found = "  ".join(f"{key} {value:.4f}" for key, value in scores["metrics"].items())
            self.report(Event("note", f"{task}: {found}"))
            if scores["questions"] < scores["questions_in_all"]:
                words = f"only the first {scores['questions']} of {scores['questions_in_all']} questions of {task}"
                limited_by = self.workspace.limited_by
                self.report(Event("warning", f"{words} count, by {limited_by}: no score of the whole task"))
        return result

    @cached_property
    def _models(self) -> Models:
        from stages.models.loading import Models

        return self.models.of(self.workspace) if self.models else Models(self.workspace, self.processes)

    def _what(self, adapter: Artefact | None, base: BaseIdentity) -> Scored:
        """What decides the scores: two results that agree on it are the same result."""
        agreement, settings = self.workspace.agreement, self.workspace.evaluation
        if not self.workspace.scored_tasks:
            raise UsageProblem(
                "nothing to score: evaluation.tasks is empty",
                where=self.workspace.root / AGREEMENT,
                mend="name lm-eval tasks there",
            )
        found: Scored = {
            "subject": self.subject,
            "round": self.round,
            "agreement_sha256": self.workspace.agreed_in(self.round),
            "adapter_sha256": adapter.manifest.files[ADAPTER_WEIGHTS].sha256 if adapter else None,
            "manifest_sha256": adapter.sha256 if adapter else None,
            "base": base.model_dump(),
            "tasks_sha256": self.workspace.tasks_sha256(self.workspace.scored_tasks),
            "dtype": self.workspace.machine.dtype or agreement.model_of(self.role).dtype,
            "limit": settings.limit,
            "batch_size": settings.batch_size,
        }
        if own := records.own_evaluation(self.workspace):
            found["evaluation"] = own
        if self.attack.radius is not None:
            found["attack"] = self.attack.model_dump()
        return found
