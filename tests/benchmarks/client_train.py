"""client-train against what a user would pick in its place, on the same batches, and against bare matmuls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from stages.data.examples import Example
from stages.training import recipes, schedule, training
from stages.training.objective import Objective, task_loss
from stages.workspace.budgets import ClientTraining
from stages.workspace.machine import Machine
from tests.benchmarks import gpt2_on_arc as arc
from tests.benchmarks import trainers
from tests.benchmarks.repeats import shown

STEPS, LAYERS, RATE = 8, 12, 1e-3
WIDTH, VOCABULARY = 768, 50257
PRODUCTS = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
"""The matrices of a layer of GPT-2 small."""
FLATTENED, SFT, PACKS, PADDED = "flattened", "sft", "sft packs", "padded"
PEERS = {
    FLATTENED: "Trainer + PEFT with DataCollatorWithFlattening",
    SFT: "trl's SFTTrainer, padding-free",
    PACKS: "trl's SFTTrainer, packing, per token",
    PADDED: "a plain Trainer + PEFT, padded",
}
"""The honest ones first. All but the packing one see the same rows in each step."""
GOALS = {(FLATTENED, "bfloat16"): ">= 2", (SFT, "bfloat16"): ">= 1", (PACKS, "bfloat16"): ">= 1"}
NO_TRL = ("trl's SFTTrainer skipped: trl cannot be imported", "-", "-")


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    if not arc.available():
        return [("skipped: the real data is not beside the checkout", "-", "-")]
    examples = arc.examples(256)
    plan = schedule.schedule(len(examples), ClientTraining(steps=STEPS, batch_size=arc.BATCH), seed=1)
    steps = [[examples[i] for i in step] for step in plan]
    tokens = sum(len(example.input_ids) for step in steps[1:] for example in step)
    runs: dict[str, Callable[[], arc.Clock]] = {}
    for precision in arc.precisions():
        is_bfloat16 = precision == "bfloat16"
        runs[f"ours {precision}"] = partial(ours, examples, autocast=is_bfloat16)
        runs[f"matmuls {precision}"] = partial(matmuls, steps, getattr(torch, precision))
        runs[f"{FLATTENED} {precision}"] = partial(trainers.flattened, steps, LAYERS, RATE, bfloat16=is_bfloat16)
        if trainers.has_trl():
            runs[f"{SFT} {precision}"] = partial(trainers.sft, steps, LAYERS, RATE, bfloat16=is_bfloat16)
            runs[f"{PACKS} {precision}"] = partial(trainers.sft, steps, LAYERS, RATE, bfloat16=is_bfloat16, packs=True)
    runs[f"{PADDED} float32"] = partial(trainers.padded, steps, LAYERS, RATE)
    return rows_of(arc.in_turn(repeats, runs), tokens)


def rows_of(clocks: dict[str, list[arc.Clock]], tokens: int) -> list[tuple[str, str, str]]:
    """The table. tokens: of all steps but the first."""
    rows = [
        (f"times {what}, both in {precision}", times(clocks, peer, precision), GOALS.get((peer, precision), ""))
        for precision in arc.precisions()
        for peer, what in PEERS.items()
        if f"{peer} {precision}" in clocks
    ]
    fastest = arc.precisions()[0]
    if fastest == "bfloat16":
        across = arc.times_faster(clocks, "ours bfloat16", f"{PADDED} float32")
        rows.append((f"times {PEERS[PADDED]}, float32, ours in bfloat16", across, ">= 3"))
    else:
        rows.append(arc.NO_BFLOAT16)
    rows += [] if trainers.has_trl() else [NO_TRL]
    for peer in (FLATTENED, SFT, PADDED):
        if theirs := clocks.get(f"{peer} float32"):
            apart = difference(clocks["ours float32"][0], theirs[0])
            rows.append((f"largest difference of a step's loss to that of {PEERS[peer]}", f"{apart:.1e}", "<= 1e-4"))
    for precision in arc.precisions():
        goal = ">= 0.35 with AMX" if precision == "bfloat16" else ""
        share = arc.times_faster(clocks, f"ours {precision}", f"matmuls {precision}")
        rows.append((f"share of the step that bare matmuls take, {precision}", share, goal))
    speeds = [tokens / clock.seconds for clock in clocks[f"ours {fastest}"]]
    return [*rows, (f"tokens per second, {fastest} (this machine)", shown(speeds, ".0f"), "")]


def times(clocks: dict[str, list[arc.Clock]], peer: str, precision: str) -> str:
    """How many times faster than this peer, in the same precision."""
    return arc.times_faster(clocks, f"ours {precision}", f"{peer} {precision}")


def difference(one: arc.Clock, other: arc.Clock) -> float:
    """The largest of the losses of two runs, step by step."""
    return max(abs(a["slm_ft"] - b["slm_ft"]) for a, b in zip(one.losses, other.losses, strict=True))


def ours(examples: list[Example], *, autocast: bool) -> arc.Clock:
    """The stage's own loop."""
    clock = arc.Clock()
    recipe = recipes.Recipe(
        budget=ClientTraining(steps=STEPS, batch_size=arc.BATCH),
        learning_rates={"slm": RATE},
        clips={},
        warmup_steps=0,
        seed=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            Objective([arc.model("slm", LAYERS, autocast=autocast)], task_loss, {"slm_ft": 1.0}),
            examples,
            recipe,
            machine=Machine(device="cpu"),
            folder=Path(folder) / "work",
            inputs={},
            report=lambda event: clock.step(dict(event.values)) if event.kind == "step" else None,
        )
    return clock


def matmuls(steps: Sequence[Sequence[Example]], dtype: torch.dtype) -> arc.Clock:
    """As if the steps were nothing but their matrix products, forward and back to the activations.

    Each layer has weights of its own, as in a step, where none is found in a cache.
    """
    clock = arc.Clock()
    layers = [[torch.randn(shape).to(dtype) for shape in PRODUCTS] for _ in range(LAYERS)]
    head = torch.randn(WIDTH, VOCABULARY).to(dtype)
    for step in steps:
        tokens = sum(len(example.input_ids) for example in step)
        inputs = {width: torch.randn(tokens, width).to(dtype) for shape in PRODUCTS for width in shape}
        answers = inputs[WIDTH][: sum(example.answer_tokens for example in step)]
        for weights in layers:
            for weight in weights:
                torch.mm(inputs[weight.shape[0]], weight)
        torch.mm(torch.mm(answers, head), head.t())
        for weights in reversed(layers):
            for weight in reversed(weights):
                torch.mm(inputs[weight.shape[1]], weight.t())
        clock.step({})
    return clock
