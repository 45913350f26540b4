"""One model of a co-distillation: made ready, told what to learn and how, and published; in one phase and in two."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact
from stages.artefacts.residual_files import as_file
from stages.artefacts.steps import Over
from stages.data.examples import Example, encode, tell_left_out
from stages.data.rows import Row
from stages.distillation.inputs import OTHER
from stages.distillation.phases import Distilling
from stages.files import writing
from stages.models import adapters, residual
from stages.models.loading import Models
from stages.models.tuned import Outline, Tuned
from stages.models.vocabulary import check_one_vocabulary
from stages.runtime.errors import Refused
from stages.runtime.events import Event
from stages.training import trackers, training
from stages.training.drafts import draft_of
from stages.training.objective import TAUGHT, Objective
from stages.training.recipes import Outcome, Recipe
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

AnyStep = Distilling[Any, Any]


def loaded(step: AnyStep, *roles: Role) -> Models:
    """The base models, of which the step is about to use these."""
    models = step.models or Models(step.workspace, step.processes)
    models.use(*roles)
    return models


def loaded_to_train(step: AnyStep, *roles: Role) -> Models:
    """The same. Raises UsageProblem, before a model is loaded, for a tracker that is not installed."""
    trackers.tracking(step.workspace, step.name, step.round)
    return loaded(step, *roles)


def ready(step: AnyStep, models: Models, role: Role, start: Artefact | None) -> Tuned:
    """One model with the adapter that it starts from: start, or in round 1 the LLM's own, made fresh."""
    whose = f"the aggregate of round {step.round}" if role == "slm" else f"the LLM's adapter of round {step.round - 1}"
    is_frozen = role == "slm" and step.workspace.agreement.aggregation.combine == "freeze-a"
    seed = step.workspace.seed_for("omega", 1)
    return models.begun(role, start, seed=seed, whose=whose, trains="B" if is_frozen else "AB")


def encoded(
    step: AnyStep, rows: list[Row], outlines: Mapping[Role, Outline]
) -> tuple[list[Example], int, dict[str, float]]:
    """The auxiliary rows as tokens of the one vocabulary, its size, and how many were left out, as tell_left_out says.

    Refused for a token that only one model has.
    """
    slm, llm, data = outlines["slm"], outlines["llm"], step.workspace.auxiliary_data
    shared = check_one_vocabulary(slm, llm)
    examples = encode(
        rows,
        slm.tokenizer,
        max_length=step.workspace.agreement.distillation.max_length,
        context=min(slm.context, llm.context),
        too_long=step.workspace.agreement.data.too_long,
        path=data,
    )
    left_out = tell_left_out(rows, examples, data, step.report)
    largest = max(max(example.input_ids) for example in examples)
    if largest >= shared:
        message = f"the auxiliary data uses token {largest}, but the models share only the first {shared}"
        raise Refused(message, where=data, mend="take two models with one tokenizer")
    return examples, shared, left_out


def train(
    step: AnyStep,
    objective: Objective,
    tuned: Sequence[Tuned],
    examples: Sequence[Example],
    *,
    inputs: Mapping[str, str],
    again: bool,
) -> Outcome:
    """Train the adapters of these models in place. Raises as training.train does.

    inputs: the digests of data and adapters; a run that was stopped goes on only from the same.
    """
    workspace = step.workspace
    outcome = training.train(
        objective,
        examples,
        recipe(workspace, step.round, *(one.role for one in tuned)),
        machine=workspace.machine,
        folder=workspace.unfinished(step.name, step.round),
        inputs={
            "agreement": workspace.agreement_sha256,
            **inputs,
            **{f"{one.role}_base": one.identity.weights_sha256 for one in tuned},
            "dtype": ", ".join(one.dtype for one in tuned),
        },
        overwrite=again,
        tracking=trackers.tracking(workspace, step.name, step.round),
        processes=step.processes,
        report=step.report,
    )
    step.report(Event("note", outcome.change))
    for role in (one.role for one in tuned):
        if outcome.metrics.get(f"{role}{TAUGHT}_before") == 0 == outcome.metrics.get(f"{role}{TAUGHT}_after"):
            words = f"the {OTHER[role].upper()} knew none of the rows looked at better than the {role.upper()}"
            step.report(Event("warning", f"{words}: it taught it nothing of them"))
    return outcome


def recipe(workspace: Workspace, round: int, *roles: Role) -> Recipe:
    """How these models are trained, together or one of them alone."""
    settings = workspace.agreement.distillation
    rates = {"slm": settings.slm_learning_rate, "llm": settings.llm_learning_rate}
    clips = {"slm": settings.slm_max_grad_norm, "llm": settings.llm_max_grad_norm}
    return Recipe(
        budget=settings,
        learning_rates={role: rates[role] for role in roles},
        clips={role: clips[role] for role in roles},
        warmup_steps=settings.warmup_steps if round == 1 else 0,
        schedule=settings.schedule,
        rounds_done=round - 1,
        rounds=workspace.agreement.federation.rounds,
        seed=workspace.seed_for("co-distill", round),
        alternating=settings.order == "alternating",
    )


def weights(workspace: Workspace, *roles: Role) -> dict[str, float]:
    """What each term of these models' losses counts."""
    settings = workspace.agreement.distillation
    distilled = {"slm": settings.lambda_slm, "llm": settings.lambda_llm}
    terms = (("_ft", dict.fromkeys(distilled, 1.0)), ("_kd", distilled), (TAUGHT, dict.fromkeys(distilled, 0.0)))
    return {f"{role}{name}": of_role[role] for role in roles for name, of_role in terms}


def publish_model(
    step: AnyStep,
    tuned: Tuned,
    outcome: Outcome,
    *,
    parents: Mapping[str, str],
    metrics: Mapping[str, float],
    over: Over,
) -> Manifest:
    """Publish one model's adapter as what the round ends with, and beside it what it stands on."""
    workspace, round = step.workspace, step.round
    folder = workspace.slm(round) if tuned.role == "slm" else workspace.llm(round)
    contents = adapters.as_files(tuned.model, workspace.agreement.model_of(tuned.role).lora)
    if tuned.role == "slm":
        contents |= as_file(residual.take(tuned.model), workspace.agreement)
    seed = workspace.seed_for("co-distill", round)
    draft = draft_of(tuned, outcome, stage="co-distill", round=round, parents=parents, seed=seed, metrics=metrics)
    return publish(folder, contents, draft, by=step.party, over=over[folder])


def finish(step: AnyStep, log: list[dict[str, Any]]) -> None:
    """Write the log, and clear away the checkpoints, which another process may be writing into."""
    writing.write_log(step.log, log)
    shutil.rmtree(step.workspace.unfinished(step.name, step.round), ignore_errors=True)
