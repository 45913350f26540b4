"""plan: what each stage will take on this machine, and what is missing here, before anything is loaded or fetched.

Reads the settings, the configurations of the base models, and the rows and tokenizer if they are here; asks no hub.
Writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.bases import base_files, base_folders
from stages.bases.base_names import name_of
from stages.data.rows import Extent, encode, extent, read_rows
from stages.runtime.errors import Damaged, NotReady, UsageProblem
from stages.workspace.agreement import ROLES, Budget, Distillation, Role
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.models.shapes import Shape
    from stages.planning.memory import Step
    from stages.planning.missing import Missing
    from stages.training.objective import Losses, Tokens

ANSWER_TOKENS = 16
"""Of a row, where neither rows nor a tokenizer are here to tell; few answers of the paper's four tasks are longer."""
CHECKPOINTS = 2
"""How many a training stage keeps at most while it runs."""
ADAM_BYTES = 8
"""Of AdamW's two float32 averages, for each parameter that is trained."""
ORDERED_BYTES = {"krum": 12, "median": 16, "trimmed-mean": 24}
"""Of one number of one client while a rule looks at a tensor of all: float32 and float64; float64 and a copy in order;
float64, its place in order, and what is taken."""
TOP_K = 64
"""What co-distill captures of each position unless it is told otherwise; its memory hardly depends on it."""


@dataclass(frozen=True)
class BaseModel:
    """A base model of the agreement. came_from: where its configuration lies; stored_bytes: on disk, if known."""

    role: Role
    model: str
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    stored_bytes: int | None
    came_from: str
    dtype: str


@dataclass(frozen=True)
class StagePlan:
    """One run of a stage: where, on how many rows in how many steps, its largest batch, its memory in bytes.

    rows, steps: the fewest and the most of all clients; None if unknown. length, answers: tokens of a row and of its
    answer. memory: bytes by part; empty where a model's configuration is not here.
    """

    name: str
    party: str
    rows: tuple[int, int] | None = None
    steps: tuple[int, int] | None = None
    batch: int | None = None
    length: int | None = None
    answers: int | None = None
    memory: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The whole federation.

    two_phases: co-distill's, of the LLM, since the SLM takes less: capture and train.
    sent: bytes that a client, and the server, sends in a round; each receives as many. disk: bytes by part, of all
    rounds and parties in one folder.
    """

    device: str
    clients: int
    rounds: int
    models: list[BaseModel]
    stages: list[StagePlan]
    two_phases: list[StagePlan]
    sent: Mapping[str, int]
    disk: Mapping[str, int]
    missing: list[Missing]


@dataclass(frozen=True)
class _Here:
    """What is known on this machine; length: of a row, if that was asked for."""

    workspace: Workspace
    device: torch.device
    shapes: Mapping[Role, Shape]
    length: int | None


def plan(workspace: Workspace, *, length: int | None = None) -> Plan:
    """What lies ahead. length: plan for rows of so many tokens, instead of the longest row here or max_length.

    Raises UsageProblem where the settings ask for what cannot be: a device, target modules, a configuration.
    """
    from stages.models import loading, shapes
    from stages.planning.missing import missing

    device = loading.device_of(workspace.machine)
    found: dict[Role, Shape] = {}
    for role in ROLES:
        kept_in = loading.precision(workspace, role, device)[1]
        try:
            found[role] = shapes.of_workspace(workspace, role, kept_in)
        except NotReady:
            continue  # it is among the missing
    here = _Here(workspace, device, found, length)
    if length is not None and not 2 <= length <= _context(here):
        message = f"rows of {length} tokens: a row has 2 at least, and these models take {_context(here)}"
        raise UsageProblem(message, mend="give another --length, or leave it out")
    tokenizer = _tokenizer(workspace)
    clients = extent([workspace.client_data(k) for k in workspace.clients], tokenizer)
    auxiliary = extent([workspace.auxiliary_data], tokenizer, unlabelled=True)
    stages = [_client_train(here, clients), _aggregate(here), _co_distill(here, auxiliary)]
    return Plan(
        str(device),
        len(workspace.clients),
        workspace.agreement.federation.rounds,
        [_base_model(here, role) for role in found],
        [*stages, *(_evaluate(here, role, clients or auxiliary) for role in ROLES)],
        _in_two_phases(here, auxiliary),
        _sent(here),
        _disk(here),
        [*missing(workspace), *_refused_rows(here, tokenizer)],
    )


def _refused_rows(here: _Here, tokenizer: Any) -> list[Missing]:
    """The rows here that training would refuse: the first of each file."""
    from stages.planning.missing import Missing

    workspace, found = here.workspace, []
    agreement = workspace.agreement
    budgets: dict[Path, Budget] = {workspace.client_data(k): agreement.client_training for k in workspace.clients}
    budgets[workspace.auxiliary_data] = agreement.distillation
    for path, budget in budgets.items():
        if tokenizer is None or not path.exists():
            continue
        is_auxiliary = path == workspace.auxiliary_data
        context = _context(here) if is_auxiliary else here.shapes["slm"].context if "slm" in here.shapes else 1 << 30
        rows = read_rows(path, unlabelled=is_auxiliary)[0]
        limits = {"max_length": budget.max_length, "context": context}
        try:
            encode(rows, tokenizer, **limits, too_long=agreement.data.too_long, path=path)
        except Damaged as problem:
            what = f"rows that can be trained on: in {workspace.shown(path)}, {problem.message}"
            found.append(Missing(what, problem.mend or ""))
    return found


# --- the stages


def _client_train(here: _Here, rows: Extent | None) -> StagePlan:
    from stages.training.objective import task_loss

    budget = here.workspace.agreement.client_training
    found = _training("client-train", "each client", here, budget, rows, task_loss)
    if not (here.workspace.agreement.privacy.is_on and found.memory):
        return found
    gradient, batch = found.memory["gradients"], found.batch or 1
    each = {"each row's gradient": batch * gradient, "their sum": gradient}  # Opacus's grad_sample and summed_grad
    return replace(found, memory={**found.memory, **each})


def _co_distill(here: _Here, rows: Extent | None) -> StagePlan:
    from stages.training.objective import mutual_losses

    budget = here.workspace.agreement.distillation
    return _training("co-distill", "server", here, budget, rows, mutual_losses(_whole(budget)), ROLES)


def _whole(budget: Distillation) -> Distillation:
    """With every token distilled: which ones are not is known only when the models have spoken."""
    return budget.model_copy(update={"min_confidence": None})


def _in_two_phases(here: _Here, rows: Extent | None) -> list[StagePlan]:
    """The same with one model at a time."""
    import torch

    from stages.models import loading, shapes
    from stages.planning import memory
    from stages.training.losses import top_k

    budget = here.workspace.agreement.distillation
    shape = here.shapes.get("llm")
    if shape is None or budget.order == "alternating":
        return []
    training = _training("train", "server", here, budget, rows, _beside_a_capture(budget), ("llm",))
    compute = loading.precision(here.workspace, "llm", here.device)[0]
    step = memory.capture_step(
        shape,
        lambda logits: top_k(logits, TOP_K, temperature=budget.temperature),
        rows=training.batch or 1,
        length=training.length or 2,
        answers=training.answers or 1,
        device=_counted_on(here.device),
        autocast=compute == torch.bfloat16,
    )
    takes = {
        "weights": shapes.weight_bytes(shape),
        "adapters": shapes.FLOAT32_BYTES * shape.adapter_parameters,
        "logits": step.logits,
        "transient": step.transient + shapes.unpacked_bytes(shape, compute),
    }
    capture = replace(training, name="capture", steps=None, memory=takes)
    return [capture, training]


def _beside_a_capture(budget: Distillation) -> Losses:
    """The LLM's losses, its teacher's few tokens taken from nowhere."""
    import torch

    from stages.distillation.captures import as_batch, taught_losses
    from stages.training.losses import TopK

    def losses(logits: Mapping[str, Tensor], labels: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        count, vocabulary = logits["llm"].shape
        k = min(TOP_K, vocabulary)
        on: dict[str, Any] = {"device": labels.device}
        teacher = TopK(
            torch.ones(count, k, dtype=torch.long, **on),
            torch.ones(count, k + (k < vocabulary), **on),
            torch.ones(count, **on),
        )
        return taught_losses("llm", _whole(budget), vocabulary)({**logits, **as_batch(teacher)}, labels, tokens)

    return losses


def _training(
    name: str,
    party: str,
    here: _Here,
    budget: Budget,
    rows: Extent | None,
    losses: Losses,
    roles: tuple[Role, ...] = ("slm",),
) -> StagePlan:
    """A training stage, of these models."""
    wanted = {role: shape for role, shape in here.shapes.items() if role in roles}
    tokens = _length(here, budget, rows)
    answers = min((rows and rows.longest_answer) or ANSWER_TOKENS, tokens - 1)
    batch = here.workspace.machine.rows_at_once(budget)
    takes: dict[str, int] = {}
    if len(wanted) == len(roles):
        turns = ROLES if isinstance(budget, Distillation) and budget.order == "alternating" else (None,)
        sized = {"rows": batch, "length": tokens, "answers": answers}
        steps = [_step(here, wanted, losses, sized, turn) for turn in turns]
        takes = _of_training(here, wanted, max(steps, key=lambda one: one.activations + one.logits + one.transient))
    counted = (rows.fewest, rows.most) if rows else None
    fewest, most = counted or ((1, 1) if budget.steps else (None, None))  # a budget in steps is the same for any rows
    steps_of = (budget.steps_for(fewest), budget.steps_for(most)) if fewest and most else None
    return StagePlan(name, party, counted, steps_of, batch, tokens, answers, takes)


def _step(
    here: _Here, wanted: Mapping[Role, Shape], losses: Losses, sized: Mapping[str, int], turn: Role | None
) -> Step:
    import torch

    from stages.models import loading
    from stages.planning import memory

    computes = {role: loading.precision(here.workspace, role, here.device)[0] for role in wanted}
    return memory.training_step(
        {str(role): shape for role, shape in wanted.items()},
        losses,
        rows=sized["rows"],
        length=sized["length"],
        answers=sized["answers"],
        device=_counted_on(here.device),
        autocast={role: dtype == torch.bfloat16 for role, dtype in computes.items()},
        turn=turn,
    )


def _of_training(here: _Here, wanted: Mapping[Role, Shape], step: Step) -> dict[str, int]:
    from stages.models import loading, shapes

    computes = {role: loading.precision(here.workspace, role, here.device)[0] for role in wanted}
    unpacked = max(shapes.unpacked_bytes(shape, computes[role]) for role, shape in wanted.items())
    trained = sum(shape.adapter_parameters for shape in wanted.values())
    return {
        "weights": sum(shapes.weight_bytes(shape) for shape in wanted.values()),
        "adapters": shapes.FLOAT32_BYTES * trained,
        "gradients": shapes.FLOAT32_BYTES * trained,
        "optimiser": ADAM_BYTES * trained,
        "activations": step.activations,
        "logits": step.logits,
        "transient": step.transient + unpacked,
    }


def _aggregate(here: _Here) -> StagePlan:
    """The broadcast and two updates as bytes, one more twice while it is parsed; sums in float64. Never all clients.

    Another rule than the mean holds all of them; and of one tensor at a time, each client's in float64 and in order.
    """
    from stages.models import shapes

    takes = {}
    if "slm" in here.shapes:
        values = shapes.FLOAT32_BYTES * here.shapes["slm"].adapter_parameters
        takes = {"adapters": 5 * values, "sums": 2 * values}
        settings = here.workspace.agreement.aggregation
        if settings.rule != "mean":
            count = settings.min_clients or here.workspace.agreement.federation.clients
            largest = max(math.prod(shape) for shape in here.shapes["slm"].layout.values())
            ordered = count * largest * ORDERED_BYTES.get(settings.rule, 0)
            takes = {"adapters": (count + 3) * values, "sums": ordered or 8 * values}
    return StagePlan("aggregate", "server", memory=takes)


def _evaluate(here: _Here, role: Role, rows: Extent | None) -> StagePlan:
    from stages.models import shapes
    from stages.planning import memory

    batch = here.workspace.agreement.evaluation.batch_size
    tokens = _length(here, here.workspace.agreement.client_training, rows)
    takes = {}
    if shape := here.shapes.get(role):
        step = memory.scoring_step(shape, rows=batch, length=tokens, device=_counted_on(here.device))
        takes = {
            "weights": shapes.weight_bytes(shape),
            "adapters": shapes.FLOAT32_BYTES * shape.adapter_parameters,
            "logits": step.logits,
            "transient": step.transient,
        }
    party = "server" if role == "llm" else "server, clients"
    return StagePlan(f"evaluate {role}", party, batch=batch, length=tokens, memory=takes)


def _counted_on(device: torch.device) -> torch.device:
    """Where fake tensors pretend to be: torch has no such kernels for Apple's GPUs."""
    import torch

    return torch.device("cpu") if device.type == "mps" else device


# --- rows


def _tokenizer(workspace: Workspace) -> Any:
    """The SLM's tokenizer, or None where it is not here."""
    from stages.models.base_loading import load_tokenizer

    folder = base_folders.configuration(workspace, "slm")
    return load_tokenizer(folder, "the SLM") if folder and base_files.tokenizer_files(folder) else None


def _length(here: _Here, budget: Budget, rows: Extent | None) -> int:
    """Tokens of a row: as asked, or of the longest row here, or max_length; never more than is trained on."""
    most = min(budget.max_length, _context(here))
    return here.length or max(2, min(most, (rows and rows.longest) or most))


def _context(here: _Here) -> int:
    return min((shape.context for shape in here.shapes.values()), default=1 << 30)


# --- what travels, what stays


def _base_model(here: _Here, role: Role) -> BaseModel:
    from stages.models import loading, shapes

    shape = here.shapes[role]
    stored = shapes.DTYPE_BYTES.get(shape.stored_dtype or "")
    return BaseModel(
        role,
        name_of(here.workspace, role),
        shape.parameters,
        shape.adapter_parameters,
        shapes.file_bytes(shape.layout),
        stored * shape.parameters if stored else None,
        shape.came_from,
        str(loading.precision(here.workspace, role, here.device)[0]).removeprefix("torch."),
    )


def _sent(here: _Here) -> dict[str, int]:
    from stages.models import shapes

    if "slm" not in here.shapes:
        return {}
    size_bytes = shapes.file_bytes(here.shapes["slm"].layout)
    return {"client": size_bytes, "server": len(here.workspace.clients) * size_bytes}


def _disk(here: _Here) -> dict[str, int]:
    """exchange: a broadcast and K updates a round. server: aggregate, slm, llm. checkpoints: while co-distill runs."""
    from stages.models import shapes

    if len(here.shapes) < len(ROLES):
        return {}
    slm, llm = (shapes.file_bytes(here.shapes[role].layout) for role in ROLES)
    federation = here.workspace.agreement.federation
    trained = sum(shape.adapter_parameters for shape in here.shapes.values())
    return {
        "exchange": federation.rounds * (1 + federation.clients) * slm,
        "server": federation.rounds * (2 * slm + llm),
        "checkpoints": CHECKPOINTS * (shapes.FLOAT32_BYTES + ADAM_BYTES) * trained,
    }
