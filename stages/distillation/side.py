"""One model of a co-distillation: made ready, told what to learn and how, and published; in one phase and in two."""

from __future__ import annotations

from stages.artefacts import adapter_files, turns
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact
from stages.data.rows import Example, Row, encode, tell_left_out
from stages.models import adapters
from stages.models.loading import Models
from stages.models.tuned import Outline, Tuned
from stages.models.vocabulary import check_one_vocabulary
from stages.parties.party import Party
from stages.runtime.errors import Refused
from stages.runtime.events import Report
from stages.training.recipes import Outcome, Recipe
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


def ready(workspace: Workspace, round: int, models: Models, role: Role, start: Artefact | None) -> Tuned:
    """One model with the adapter that it starts from: start, or in round 1 the LLM's own, made fresh."""
    tuned = models.get(role)
    if start is None:
        adapters.make_fresh(tuned.model, workspace.seed_for("omega", 1))
        return tuned
    whose = f"the aggregate of round {round}" if role == "slm" else f"the LLM's adapter of round {round - 1}"
    models.expect(role, start.manifest.base, whose)
    lora = workspace.agreement.model_of(role).lora
    adapters.put(tuned.model, adapter_files.read_adapter(start, adapters.layout(tuned.model), lora))
    return tuned


def encoded(
    workspace: Workspace, rows: list[Row], slm: Outline, llm: Outline, report: Report
) -> tuple[list[Example], int, dict[str, float]]:
    """The auxiliary rows as tokens of the one vocabulary, its size, and how many were left out, as tell_left_out says.

    Refused for a token that only one model has.
    """
    shared = check_one_vocabulary(slm, llm)
    examples = encode(
        rows,
        slm.tokenizer,
        max_length=workspace.agreement.distillation.max_length,
        context=min(slm.context, llm.context),
        too_long=workspace.agreement.data.too_long,
        path=workspace.auxiliary_data,
    )
    left_out = tell_left_out(rows, examples, workspace.auxiliary_data, report)
    largest = max(max(example.input_ids) for example in examples)
    if largest >= shared:
        message = f"the auxiliary data uses token {largest}, but the models share only the first {shared}"
        raise Refused(message, where=workspace.auxiliary_data, mend="take two models with one tokenizer")
    return examples, shared, left_out


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
        seed=workspace.seed_for("co-distill", round),
        alternating=settings.order == "alternating",
    )


def weights(workspace: Workspace, role: Role) -> dict[str, float]:
    """What each term of this model's loss counts."""
    settings = workspace.agreement.distillation
    return {f"{role}_ft": 1.0, f"{role}_kd": settings.lambda_slm if role == "slm" else settings.lambda_llm}


def publish_model(
    server: Party,
    round: int,
    tuned: Tuned,
    parents: dict[str, str],
    outcome: Outcome,
    metrics: dict[str, float],
    places: turns.Places,
) -> Manifest:
    """Publish one model's adapter as what the round ends with; places: what may be replaced."""
    workspace = server.workspace
    folder = workspace.slm(round) if tuned.role == "slm" else workspace.llm(round)
    return publish(
        folder,
        adapters.as_files(tuned.model, workspace.agreement.model_of(tuned.role).lora),
        Draft(
            stage="co-distill",
            role=tuned.role,
            round=round,
            parents=parents,
            base=tuned.identity,
            parameters=adapters.count(tuned.model),
            seed=workspace.seed_for("co-distill", round),
            dtype=tuned.dtype,
            steps=outcome.steps,
            examples=outcome.examples,
            tokens=outcome.tokens,
            metrics=metrics,
        ),
        by=server,
        over=places[folder],
    )
