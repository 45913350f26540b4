"""client-train against plain Trainer and PEFT as people write it, on the same batches, and against bare matmuls."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from stages.data.rows import Example
from stages.training import recipes, schedule, training
from stages.training.objective import Objective, task_loss
from stages.workspace.budgets import ClientTraining
from stages.workspace.machine import Machine
from tests.benchmarks import gpt2_on_arc as arc

STEPS, LAYERS, RATE = 16, 12, 1e-3


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    if not arc.available():
        return [("skipped: the real data is not beside the checkout", "-", "-")]
    examples = arc.examples(256)
    plan = schedule.schedule(len(examples), ClientTraining(steps=STEPS, batch_size=arc.BATCH), seed=1)
    runs = {
        "plain": lambda: plain(examples, plan),
        "float32": lambda: ours(examples, autocast=False),
        "bfloat16": lambda: ours(examples, autocast=True),
    }
    clocks = arc.in_turn(repeats, runs)
    gap = max(
        abs(a["slm_ft"] - b["slm_ft"])
        for a, b in zip(clocks["float32"][0].losses, clocks["plain"][0].losses, strict=True)
    )
    tokens = sum(len(examples[i].input_ids) for step in plan[1:] for i in step)
    share = matmul_seconds(tokens, torch.bfloat16) / median(clock.seconds for clock in clocks["bfloat16"])
    share32 = matmul_seconds(tokens, torch.float32) / median(clock.seconds for clock in clocks["float32"])
    speed = tokens / median(clock.seconds for clock in clocks["bfloat16"])
    return [
        ("times a plain Trainer + PEFT, bfloat16", f"{arc.times_faster(clocks, 'bfloat16', 'plain'):.2f}", ">= 3"),
        ("times a plain Trainer + PEFT, float32", f"{arc.times_faster(clocks, 'float32', 'plain'):.2f}", ">= 1.5"),
        ("largest difference of a step's loss, float32", f"{gap:.1e}", "<= 1e-4"),
        ("share of the step that bare matmuls take, bfloat16", f"{share:.2f}", ""),
        ("share of the step that bare matmuls take, float32", f"{share32:.2f}", ""),
        ("tokens per second, bfloat16 (this machine)", f"{speed:.0f}", ""),
    ]


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


def plain(examples: list[Example], plan: list[list[int]]) -> arc.Clock:
    """Trainer and PEFT with a padding collator, full logits and the model's own loss, on the same batches."""
    clock = arc.Clock()

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                clock.step({"slm_ft": logs["loss"]})

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=arc.model("slm", LAYERS, autocast=False).model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=arc.BATCH,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=0,
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
                report_to=[],
                remove_unused_columns=False,
            ),
            train_dataset=[examples[i] for step in plan for i in step],
            data_collator=arc.padded_as_usual,
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock


def matmul_seconds(tokens: int, dtype: torch.dtype) -> float:
    """The matrix products of GPT-2 small that so many tokens need, forward and back to the activations, and no more.

    The logits are left out: at answer tokens alone they are a few per cent.
    """
    rows, width = 256, 768
    total = 0.0
    for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        x = torch.randn(rows, inputs).to(dtype)
        g, w = torch.randn(rows, outputs).to(dtype), torch.randn(inputs, outputs).to(dtype)
        laps = []
        for _ in range(20):
            start = time.perf_counter()
            torch.mm(x, w)
            torch.mm(g, w.t())
            laps.append(time.perf_counter() - start)
        total += median(laps)
    return total * LAYERS * tokens / rows
