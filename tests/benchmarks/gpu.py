"""The paper's three settings and a newer pair on a GPU: bases of their shapes, random weights, bfloat16, no download.

For client-train and for co-distill, in one phase and in two: tokens a second, the share of what the device's matrix
products could do, peak memory, and what `plan` says of it. Run only where there is CUDA.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from builders import examples
from stages.artefacts.manifest import BaseIdentity
from stages.data.examples import Example
from stages.distillation import captures, top_k_logits
from stages.models import adapters, packing, shapes
from stages.models.tuned import Tuned
from stages.paper import reported
from stages.planning import memory
from stages.planning.estimates import TOP_K, beside_a_capture
from stages.training import recipes, training
from stages.training.losses import top_k
from stages.training.objective import Losses, Objective, mutual_losses, task_loss
from stages.workspace.agreement import Lora, Model
from stages.workspace.budgets import Budget, Distillation
from stages.workspace.machine import Machine
from stages.workspace.settings import Role

ROWS, PROMPT, ANSWER, STEPS = 16, 120, 8, 8
SIZE = 8192
"""Of the matrices whose product is the ceiling."""
IDENTITY = BaseIdentity(architecture="random", weights_sha256="0" * 64, tokenizer_sha256="0" * 64)
WEIGHTS = dict.fromkeys(("slm_ft", "slm_kd", "llm_ft", "llm_kd"), 1.0)
BOTH: tuple[Role, ...] = ("slm", "llm")


@dataclass(frozen=True)
class Pair:
    """What a setting's two models are made of: their configurations, and one shape of adapter."""

    name: str
    configs: dict[Role, dict[str, Any]]
    settings: Model

    @staticmethod
    def of_paper(name: str) -> Pair:
        """One of s1, s2, s3."""
        preset = reported.SETTINGS[name]
        known = reported.checkpoints()
        lora = Lora(r=preset.rank, alpha=2 * preset.rank, target_modules=list(preset.target_modules))
        configs: dict[Role, dict[str, Any]] = {"slm": known[preset.slm].config, "llm": known[preset.llm].config}
        return Pair(name, configs, Model(model="random", lora=lora))

    def base(self, role: Role, device: torch.device | str, dtype: torch.dtype) -> Any:
        """A model of this shape with random weights."""
        config = AutoConfig.for_model(**self.configs[role])
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]


def of_qwen() -> Pair:
    """Qwen2.5-0.5B and 7B: one tokenizer, logits of 151,936 and 152,064 places."""

    def config(layers: int, width: int, inner: int, heads: int, keys: int, vocabulary: int) -> dict[str, Any]:
        return {
            "model_type": "qwen2",
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "vocab_size": vocabulary,
            "tie_word_embeddings": width < 1024,
        }

    configs: dict[Role, dict[str, Any]] = {
        "slm": config(24, 896, 4864, 14, 2, 151_936),
        "llm": config(28, 3584, 18_944, 28, 4, 152_064),
    }
    return Pair("qwen2.5", configs, Model(model="random", lora=Lora(r=8, alpha=16)))


@dataclass(frozen=True)
class Measured:
    """One stage: of how many tokens a second, at how many operations, and how many bytes at most, said and measured."""

    what: str
    tokens_per_s: float
    flops: float
    planned_bytes: int
    peak_bytes: int | None


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    if not torch.cuda.is_available():
        return [("skipped: there is no CUDA device here", "-", "-")]
    device = torch.device("cuda")
    ceiling = matmul_flops(device)
    name = torch.cuda.get_device_name(device)
    table = [(f"bfloat16 matrix products of {SIZE} x {SIZE}, {name}", f"{ceiling / 1e12:.0f} TFLOP/s", "")]
    for pair in (*map(Pair.of_paper, reported.SETTINGS), of_qwen()):
        for one in of_pair(pair, device, torch.bfloat16, rows=ROWS, steps=STEPS * repeats):
            said = f"{one.tokens_per_s:,.0f} tokens/s, {one.flops / ceiling:.2f} of the ceiling"
            assert one.peak_bytes
            said += f", peak {one.peak_bytes / 1e9:.2f} GB, plan says {one.planned_bytes / one.peak_bytes:.2f} of it"
            table.append((f"{pair.name}, {one.what}", said, ""))
    return table


def matmul_flops(device: torch.device) -> float:
    """Operations a second of one large product, the best of twenty."""
    a, b = (torch.randn(SIZE, SIZE, device=device).bfloat16() for _ in range(2))
    best = min(_seconds(lambda: torch.mm(a, b), device) for _ in range(20))
    return 2 * SIZE**3 / best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def of_pair(
    pair: Pair, device: torch.device, dtype: torch.dtype, *, rows: int = ROWS, steps: int = STEPS
) -> Iterator[Measured]:
    """Every stage of one setting, one after the other, each with no more in memory than it needs."""
    vocabulary = min(config["vocab_size"] for config in pair.configs.values())
    some = examples([(PROMPT, ANSWER)] * 4 * rows, vocabulary=vocabulary)
    budget = Distillation(steps=steps, batch_size=rows)
    yield _trained(pair, "client-train", ("slm",), task_loss, device, dtype, budget, some)
    yield _trained(pair, "co-distill", BOTH, mutual_losses(budget), device, dtype, budget, some)
    captured = []
    for role in BOTH:
        measured, found = _captured(pair, role, device, dtype, some, rows)
        captured.append(found)
        yield measured
    for role, teacher in zip(BOTH, reversed(captured), strict=True):
        yield _trained(pair, f"co-distill --phase train, {role}", (role,), None, device, dtype, budget, some, teacher)


def _trained(
    pair: Pair,
    what: str,
    roles: Sequence[Role],
    losses: Losses | None,
    device: torch.device,
    dtype: torch.dtype,
    budget: Distillation,
    some: list[Example],
    teacher: top_k_logits.Captured | None = None,
) -> Measured:
    """A training stage, by the stage's own loop. losses: None for those beside a capture."""
    _begin(device)
    models = [_tuned(pair, role, device, dtype) for role in roles]
    if teacher is None:
        assert losses
        objective, rows = Objective(models, losses, WEIGHTS), some
    else:
        objective = captures.TaughtObjective(models[0], teacher, budget, WEIGHTS)
        rows = list(captures.taught(some, teacher))
    ends: list[float] = []

    def clock(event: Any) -> None:
        if event.kind == "step":
            _wait(device)
            ends.append(time.perf_counter())

    rate = dict.fromkeys(roles, 1e-4)
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            objective,
            rows,
            recipes.Recipe(budget, rate, {}, warmup_steps=0, seed=1),
            machine=Machine(device=device.type),
            folder=Path(folder) / "work",
            inputs={},
            report=clock,
        )
    seconds = median(after - before for before, after in itertools.pairwise(ends))
    tokens = budget.batch_size * (PROMPT + ANSWER)
    # Forward, and back to the activations: the weights are frozen and have no gradient. 2 operations a weight each.
    operations = sum(4 * tokens * _linear(one) for one in models)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    counted = {role: _in_form(pair, role, dtype) for role in roles}
    of_capture = None if losses else _of_capture(budget, roles[0])
    planned = _planned(counted, losses or of_capture, device, dtype, budget.batch_size)  # type: ignore[arg-type]
    return Measured(what, tokens / seconds, operations / seconds, planned, peak)


def _of_capture(budget: Distillation, role: Role) -> Losses:
    """What plan counts, for either model."""
    losses = beside_a_capture("llm", budget)
    return lambda logits, labels, tokens: losses({"llm": logits[role]}, labels, tokens)


def _captured(
    pair: Pair, role: Role, device: torch.device, dtype: torch.dtype, some: list[Example], rows: int
) -> tuple[Measured, top_k_logits.Captured]:
    _begin(device)
    teacher = _tuned(pair, role, device, dtype)
    vocabulary = min(config["vocab_size"] for config in pair.configs.values())
    source = top_k_logits.Source("0" * 64, top_k_logits.rows_sha256(some), 1.0, vocabulary, TOP_K)
    found = []

    def once() -> None:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "work"
            found.append(
                captures.capture(
                    teacher, some, source, rows=rows, every=100, folder=place, inputs={}, report=lambda event: None
                )
            )

    once()
    seconds = _seconds(once, device)
    tokens = len(some) * (PROMPT + ANSWER)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    form = _in_form(pair, role, dtype)
    step = memory.capture_step(
        form,
        lambda logits: top_k(logits, TOP_K, temperature=1.0),
        rows=rows,
        length=PROMPT + ANSWER,
        answers=ANSWER,
        device=device,
        autocast=dtype == torch.bfloat16,
    )
    held = shapes.weight_bytes(form) + shapes.FLOAT32_BYTES * form.adapter_parameters
    planned = held + step.logits + step.transient
    rate = 2 * tokens * _linear(teacher) / seconds
    return Measured(f"co-distill --phase capture, {role}", tokens / seconds, rate, planned, peak), found[-1]


def _planned(
    counted: dict[Role, shapes.Shape], losses: Losses, device: torch.device, dtype: torch.dtype, rows: int
) -> int:
    """As `plan` adds it up."""
    step = memory.training_step(
        {str(role): shape for role, shape in counted.items()},
        losses,
        rows=rows,
        length=PROMPT + ANSWER,
        answers=ANSWER,
        device=device,
        autocast=dict.fromkeys(map(str, counted), dtype == torch.bfloat16),
    )
    trained = sum(shape.adapter_parameters for shape in counted.values())
    held = sum(shapes.weight_bytes(shape) for shape in counted.values())
    adapters = shapes.FLOAT32_BYTES * (2 + Budget(steps=1).remembered) * trained
    return held + adapters + step.activations + step.logits + step.transient


def _in_form(pair: Pair, role: Role, dtype: torch.dtype) -> shapes.Shape:
    base = pair.base(role, "meta", dtype)
    with torch.device("meta"):
        model = adapters.attach(base, pair.settings)
    return shapes.Shape(model, 0, adapters.layout(model), None, "")


def _tuned(pair: Pair, role: Role, device: torch.device, dtype: torch.dtype) -> Tuned:
    torch.manual_seed(1)
    base = pair.base(role, device, dtype)
    base.config.use_cache = False
    longest_packed = packing.packs(base)
    model = adapters.attach(base, pair.settings)
    adapters.make_fresh(model, 1)
    no_tokenizer: Any = None
    return Tuned(role, model, no_tokenizer, IDENTITY, autocast=dtype == torch.bfloat16, longest_packed=longest_packed)


def _linear(one: Tuned) -> int:
    """The weights that every token is multiplied by: not embeddings; the output layer acts on answers alone."""
    output = one.model.get_output_embeddings()
    layers = [layer for layer in one.model.modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    return sum(layer.weight.numel() for layer in layers if layer is not output)


def _begin(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
