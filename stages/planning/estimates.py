"""What each stage will take: steps, rows and memory by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stages.data.examples import Extent
from stages.workspace.budgets import Budget, Distillation
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES, Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.models.shapes import Shape
    from stages.planning.memory import Step
    from stages.training.objective import Losses, Tokens


ANSWER_TOKENS = 16
"""Of a row, where neither rows nor a tokenizer are here to tell; few answers of the paper's four tasks are longer."""
CHECKPOINTS = 2
"""How many a training stage keeps at most while it runs."""
UNKNOWN = 1 << 30
"""Tokens that a model whose configuration is not here takes: no row is longer."""
TOP_K = 64
"""What co-distill captures of each position unless it is told otherwise; its memory hardly depends on it."""


@dataclass(frozen=True)
class StagePlan:
    """One run of a stage: where, on how many rows in how many steps, its largest batch, its memory in bytes.

    rows, steps: the fewest and the most of all clients; None if unknown. length, answers: tokens of a row and of its
    answer. memory: bytes by part; empty where a model's configuration is not here. passes: over each batch of a step.
    """

    name: str
    party: str
    rows: tuple[int, int] | None = None
    steps: tuple[int, int] | None = None
    batch: int | None = None
    length: int | None = None
    answers: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    passes: int = 1


@dataclass(frozen=True)
class Here:
    """What is known on this machine; length: of a row, if that was asked for."""

    workspace: Workspace
    device: torch.device
    shapes: Mapping[Role, Shape]
    length: int | None


# --- the stages


def client_train(here: Here, rows: Extent | None) -> StagePlan:
    """What a client's training will take."""
    from stages.training.objective import task_loss

    budget = here.workspace.agreement.client_training
    attack = budget.adversarial
    found = trained_stage(
        "client-train", "each client", here, budget, rows=rows, losses=task_loss, is_attacked=attack.is_on
    )
    found = replace(found, passes=attack.passes)
    if attack.is_on and attack.weight < 1 and found.memory:  # kept while the later passes are made
        return replace(found, memory={**found.memory, "plain gradients": found.memory["gradients"]})
    if not (here.workspace.agreement.privacy.is_on and found.memory):
        return found
    gradient, batch = found.memory["gradients"], found.batch or 1
    each = {"each row's gradient": batch * gradient, "their sum": gradient}  # Opacus's grad_sample and summed_grad
    return replace(found, memory={**found.memory, **each})


def co_distill(here: Here, rows: Extent | None) -> StagePlan:
    """What co-distill will take in one phase, both models in one memory."""
    from stages.training.objective import mutual_losses

    budget = here.workspace.agreement.distillation
    return trained_stage(
        "co-distill", "server", here, budget, rows=rows, losses=mutual_losses(_whole(budget)), roles=ROLES
    )


def _whole(budget: Distillation) -> Distillation:
    """With every token distilled: which ones are not is known only when the models have spoken."""
    return budget.model_copy(update={"min_confidence": None, "select": "all"})


def in_two_phases(here: Here, rows: Extent | None) -> list[StagePlan]:
    """The same with one model at a time."""
    budget = here.workspace.agreement.distillation
    if "llm" not in here.shapes or budget.order == "alternating":
        return []
    losses = beside_a_capture("llm", budget)
    training = trained_stage("train", "server", here, budget, rows=rows, losses=losses, roles=("llm",))
    return [asked_stage("capture", here, "llm", training), training]


def asked_stage(name: str, here: Here, role: Role, training: StagePlan) -> StagePlan:
    """One forward pass over the rows of a training, keeping the likeliest tokens."""
    import torch

    from stages.models import devices, shapes
    from stages.planning import memory
    from stages.training.losses import top_k

    budget, shape = here.workspace.agreement.distillation, here.shapes.get(role)
    if shape is None:
        return replace(training, name=name, steps=None, memory={})
    compute = devices.precision(here.workspace, role, here.device)[0]
    step = memory.capture_step(
        shape,
        lambda logits: top_k(logits, TOP_K, temperature=budget.temperature),
        rows=training.batch or 1,
        length=training.length or 2,
        answers=training.answers or 1,
        device=counted_on(here.device),
        autocast=compute == torch.bfloat16,
    )
    takes = {
        "weights": shapes.weight_bytes(shape) + shapes.held_bytes(shape, compute, here.device),
        "adapters": shapes.FLOAT32_BYTES * shape.adapter_parameters,
        "logits": step.logits,
        "transient": step.transient + shapes.unpacked_bytes(shape, compute),
    }
    return replace(training, name=name, steps=None, memory=takes)


def beside_a_capture(role: Role, budget: Distillation) -> Losses:
    """One model's losses, its teacher's few tokens taken from nowhere."""
    import torch

    from stages.distillation.captures import as_batch, taught_losses
    from stages.training.losses import TopK

    def losses(logits: Mapping[str, Tensor], labels: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        count, vocabulary = logits[role].shape
        k = min(TOP_K, vocabulary)
        on: dict[str, Any] = {"device": labels.device}
        teacher = TopK(
            torch.ones(count, k, dtype=torch.long, **on),
            torch.ones(count, k + (k < vocabulary), **on),
            torch.ones(count, **on),
        )
        return taught_losses(role, _whole(budget), vocabulary)({**logits, **as_batch(teacher)}, labels, tokens)

    return losses


def trained_stage(
    name: str,
    party: str,
    here: Here,
    budget: Budget,
    *,
    rows: Extent | None,
    losses: Losses,
    roles: tuple[Role, ...] = ("slm",),
    is_attacked: bool = False,
) -> StagePlan:
    """A training stage, of these models and no other."""
    wanted = {role: shape for role, shape in here.shapes.items() if role in roles}
    found = batches_of(name, party, here, budget, rows)
    takes: dict[str, int] = {}
    if len(wanted) == len(roles):
        turns = ROLES if isinstance(budget, Distillation) and budget.order == "alternating" else (None,)
        sized = {"rows": found.batch or 1, "length": found.length or 2, "answers": found.answers or 1}
        steps = [_step(here, wanted, losses, sized, turn, is_attacked=is_attacked) for turn in turns]
        largest = max(steps, key=lambda one: one.activations + one.logits + one.transient)
        takes = _of_training(here, wanted, largest, budget.remembered)
    return replace(found, memory=takes)


def batches_of(name: str, party: str, here: Here, budget: Budget, rows: Extent | None) -> StagePlan:
    """Its rows, its steps and its largest batch."""
    tokens = _length(here, budget, rows)
    answers = min((rows and rows.longest_answer) or ANSWER_TOKENS, tokens - 1)
    batch = here.workspace.machine.rows_at_once(budget)
    counted = (rows.fewest, rows.most) if rows else None
    fewest, most = counted or ((1, 1) if budget.steps else (None, None))  # a budget in steps is the same for any rows
    steps_of = (budget.steps_for(fewest), budget.steps_for(most)) if fewest and most else None
    return StagePlan(name, party, counted, steps_of, batch, tokens, answers)


def _step(
    here: Here,
    wanted: Mapping[Role, Shape],
    losses: Losses,
    sized: Mapping[str, int],
    turn: Role | None,
    *,
    is_attacked: bool,
) -> Step:
    import torch

    from stages.models import devices
    from stages.planning import memory

    computes = {role: devices.precision(here.workspace, role, here.device)[0] for role in wanted}
    return memory.training_step(
        {str(role): shape for role, shape in wanted.items()},
        losses,
        rows=sized["rows"],
        length=sized["length"],
        answers=sized["answers"],
        device=counted_on(here.device),
        autocast={role: dtype == torch.bfloat16 for role, dtype in computes.items()},
        turn=turn,
        is_attacked=is_attacked,
    )


def beneath(here: Here, role: Role) -> dict[str, int]:
    """What lies beneath the SLM's adapter in the last round, where that is agreed: part of no other part."""
    from stages.models import shapes
    from stages.planning.residuals import numbers_beneath

    if role != "slm" or "slm" not in here.shapes:
        return {}
    numbers = numbers_beneath(here.workspace.agreement, here.shapes["slm"].layout)
    return {"residual": shapes.FLOAT32_BYTES * numbers} if numbers else {}


def _of_training(here: Here, wanted: Mapping[Role, Shape], step: Step, remembered: int) -> dict[str, int]:
    from stages.models import devices, shapes

    computes = {role: devices.precision(here.workspace, role, here.device)[0] for role in wanted}
    unpacked = max(shapes.unpacked_bytes(shape, computes[role]) for role, shape in wanted.items())
    trained = sum(shape.adapter_parameters for shape in wanted.values())
    return {
        "weights": sum(
            shapes.weight_bytes(one) + shapes.held_bytes(one, computes[role], here.device)
            for role, one in wanted.items()
        ),
        "adapters": shapes.FLOAT32_BYTES * trained,
        "gradients": shapes.FLOAT32_BYTES * trained,
        "optimiser": shapes.FLOAT32_BYTES * remembered * trained,
        "activations": step.activations,
        "logits": step.logits,
        "transient": step.transient + unpacked,
    } | (beneath(here, "slm") if "slm" in wanted else {})


def evaluate(here: Here, role: Role, rows: Extent | None, questions: int | None = None) -> StagePlan:
    """What scoring a model will take. questions: tokens of the longest; if that is not known, as of the longest row."""
    from stages.models import shapes
    from stages.planning import memory
    from stages.training.objective import task_loss

    batch = here.workspace.evaluation.batch_size
    tokens = _length(here, here.workspace.agreement.client_training, rows)
    if questions and not here.length:
        tokens = min(questions, longest(here))
    takes, attack = {}, here.workspace.evaluation.attack
    if shape := here.shapes.get(role):
        step = memory.scoring_step(shape, rows=batch, length=tokens, device=counted_on(here.device))
        takes = {
            "weights": shapes.weight_bytes(shape),
            "adapters": shapes.FLOAT32_BYTES * shape.adapter_parameters,
            "logits": step.logits,
            "transient": step.transient,
        }
        takes |= beneath(here, role)
        if attack.is_on:
            sized = {"rows": batch, "length": tokens, "answers": min(ANSWER_TOKENS, tokens - 1)}
            step = _step(here, {"slm": shape}, task_loss, sized, None, is_attacked=True)
            more = {"activations": step.activations, "logits": step.logits, "transient": step.transient}
            takes |= {part: max(size, takes.get(part, 0)) for part, size in more.items()}
    party = "server" if role == "llm" else "server, clients"
    passes = 1 + attack.passes if attack.is_on else 1
    return StagePlan(f"evaluate {role}", party, batch=batch, length=tokens, memory=takes, passes=passes)


def counted_on(device: torch.device) -> torch.device:
    """Where fake tensors pretend to be: torch has no such kernels for Apple's GPUs."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def _length(here: Here, budget: Budget, rows: Extent | None) -> int:
    """Tokens of a row: as asked, or of the longest row here, or max_length; never more than is trained on."""
    most = min(budget.max_length, longest(here))
    return here.length or max(2, min(most, (rows and rows.longest) or most))


def longest(here: Here) -> int:
    """The longest sequence that both models take, in tokens."""
    return min((shape.context for shape in here.shapes.values()), default=UNKNOWN)
