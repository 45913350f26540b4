"""evaluate: accuracy by lm-evaluation-harness, zero-shot, of the LLM, the SLM or a client's own SLM.

Reads private/server/round-t/{slm,llm,aggregate} or exchange/round-t/client-k. Writes results/round-t/*.json under the
same names; of the bases alone, results/zero-shot/{slm,llm}.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from stages.artefacts import records, turns
from stages.artefacts.manifest import BaseIdentity, versions
from stages.artefacts.reading import Artefact
from stages.artefacts.records import Measured, Result, Scored
from stages.artefacts.subjects import Subject, adapter_of, subject_of
from stages.files import reading, writing
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
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
    overwrite: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> Result:
    """Score one model and write down the scores. Returns what the result file says.

    model: which of the server's: "slm" and "llm" after co-distill, "aggregate" the SLM before it; with a client, that
    client's own SLM instead. Without a round, the base alone. Before scoring, the adapter is proven to be in the model
    and to change its logits. processes: all call this alike; the first decides and writes, and each scores its share.
    """
    if not processes.is_first:
        theirs = processes.agree()
        _score(workspace, theirs["role"], theirs["adapter"], models, processes, report)
        return cast(Result, processes.agree())
    subject = subject_of(model, client)
    role: Role = "llm" if subject == "llm" else "slm"
    name = subject if round is None else f"{subject}, round {round}"
    report(Event("stage", f"evaluate {name}"))
    adapter = None if round is None else adapter_of(workspace, model, round, client)
    if adapter is None:
        from stages.models.loading import Models

        models = models or Models(workspace, processes)
        base = models.get(role).identity
    else:
        base = adapter.manifest.base
    what = _what(workspace, subject, role, round, adapter, base)
    target = workspace.result(round, subject)

    def look(again: bool) -> Result | None:
        if again or not target.exists():
            return None
        earlier = records.read_result(target)
        is_same = all(earlier.get(key) == value for key, value in what.items() if key != "base")
        return earlier if is_same and records.is_of_base(earlier, base) else None

    def make(places: turns.Places) -> Result:
        processes.agree({"role": role, "adapter": adapter})
        result: Result = {**what, **_score(workspace, role, adapter, models, processes, report)}
        writing.write(target, reading.json_bytes(records.stamped(result)), over=places[target])
        for task, scores in result["tasks"].items():
            found = "  ".join(f"{key} {value:.4f}" for key, value in scores["metrics"].items())
            report(Event("note", f"{task}: {found}"))
            if scores["questions"] < scores["questions_in_all"]:
                words = (
                    f"only the first {scores['questions']} of {scores['questions_in_all']} questions of {task} count"
                )
                report(Event("warning", f"{words}, by evaluation.limit: no score of the whole task"))
        processes.agree(result)
        return result

    lock = target.with_name(f".{subject}.lock")
    return turns.take([target], lock, look=look, make=make, overwrite=overwrite, report=report)


def _what(
    workspace: Workspace,
    subject: str,
    role: Role,
    round: int | None,
    adapter: Artefact | None,
    base: BaseIdentity,
) -> Scored:
    """What decides the scores: two results that agree on it are the same result."""
    settings = workspace.agreement.evaluation
    if not (settings.tasks or workspace.agreement.data.tasks):
        raise UsageProblem(
            "nothing to score: evaluation.tasks is empty",
            where=workspace.root / AGREEMENT,
            mend="name lm-eval tasks there",
        )
    return {
        "subject": subject,
        "round": round,
        "agreement_sha256": workspace.agreement_sha256,
        "adapter_sha256": adapter.manifest.files[ADAPTER_WEIGHTS].sha256 if adapter else None,
        "manifest_sha256": adapter.sha256 if adapter else None,
        "base": base.model_dump(),
        "tasks_sha256": workspace.tasks_sha256(),
        "dtype": workspace.machine.dtype or workspace.agreement.model_of(role).dtype,
        "limit": settings.limit,
        "batch_size": settings.batch_size,
    }


def _score(
    workspace: Workspace,
    role: Role,
    adapter: Artefact | None,
    models: Models | None,
    processes: Processes,
    report: Report,
) -> Measured:
    from stages.data import tasks
    from stages.evaluation import scoring
    from stages.models.loading import Models

    settings = workspace.agreement.evaluation
    loaded = tasks.load(workspace, settings.tasks or workspace.agreement.data.tasks, report)
    for task in loaded:
        tasks.check_answers(task, report)
    models = models or Models(workspace, processes)
    models.use(role)
    tuned = models.get(role) if adapter is None else models.with_adapter(role, adapter)
    scores = scoring.score(
        tuned,
        loaded,
        with_adapter=adapter is not None,
        limit=settings.limit,
        batch_size=settings.batch_size,
        processes=processes,
        shares=role not in workspace.machine.sharding,
        report=report,
    )
    return {
        "weights_dtype": str(tuned.model.dtype).removeprefix("torch."),
        "versions": versions(),
        "tasks": scores,
    }
