"""A co-distill step against its floor, two cross-entropy steps, and against mutual distillation as people write it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

from stages.data.rows import Example
from stages.models.tuned import Tuned
from stages.training import recipes, schedule, training
from stages.training.losses import cross_entropy
from stages.training.objective import Losses, Objective, mutual_losses, task_loss
from stages.workspace.budgets import Distillation
from stages.workspace.machine import Machine
from stages.workspace.settings import Role
from tests.benchmarks import gpt2_on_arc as arc

STEPS, RATE, LAYERS = 8, 1e-3, {"slm": 6, "llm": 12}
SETTINGS = Distillation(steps=STEPS, batch_size=arc.BATCH)


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    if not arc.available():
        return [("skipped: the real data is not beside the checkout", "-", "-")]
    examples = arc.examples(128)
    plan = schedule.schedule(len(examples), SETTINGS, seed=1)
    both: Sequence[Role] = ("slm", "llm")
    clocks = arc.in_turn(
        repeats,
        {
            "ours float32": lambda: ours(examples, both, autocast=False),
            "ours bfloat16": lambda: ours(examples, both, autocast=True),
            "slm float32": lambda: ours(examples, ["slm"], autocast=False),
            "llm float32": lambda: ours(examples, ["llm"], autocast=False),
            "slm bfloat16": lambda: ours(examples, ["slm"], autocast=True),
            "llm bfloat16": lambda: ours(examples, ["llm"], autocast=True),
            "usual float32": lambda: usual(examples, plan, autocast=False),
            "usual bfloat16": lambda: usual(examples, plan, autocast=True),
        },
    )
    return [
        *(
            (f"over two cross-entropy steps of the same models, {dtype}", _over_floor(clocks, dtype), "<= 1.10")
            for dtype in ("float32", "bfloat16")
        ),
        (
            "times the usual way in float32, ours in bfloat16",
            _times(clocks, "ours bfloat16", "usual float32"),
            ">= 2.5",
        ),
        ("times the usual way, both in float32", _times(clocks, "ours float32", "usual float32"), ""),
        ("times the usual way, both in bfloat16", _times(clocks, "ours bfloat16", "usual bfloat16"), ""),
    ]


def _over_floor(clocks: dict[str, list[arc.Clock]], dtype: str) -> str:
    """Median, least and most of the repeats."""
    laps = zip(*(clocks[f"{name} {dtype}"] for name in ("ours", "slm", "llm")), strict=True)
    over = [both.seconds / (slm.seconds + llm.seconds) for both, slm, llm in laps]
    return f"{median(over):.2f} ({min(over):.2f}-{max(over):.2f})"


def _times(clocks: dict[str, list[arc.Clock]], ours_name: str, theirs: str) -> str:
    return f"{arc.times_faster(clocks, ours_name, theirs):.2f}"


def ours(examples: list[Example], roles: Sequence[Role], *, autocast: bool) -> arc.Clock:
    """The stage's own loop with both models; or with one of them and its cross-entropy alone."""
    clock = arc.Clock()
    losses: dict[tuple[Role, ...], Losses] = {
        ("slm", "llm"): mutual_losses(SETTINGS),
        ("slm",): task_loss,
        ("llm",): lambda logits, labels, tokens: {"llm_ft": cross_entropy(logits["llm"], labels, tokens.labelled)},
    }
    names = ("slm_ft", "slm_kd", "llm_ft", "llm_kd")
    recipe = recipes.Recipe(
        budget=SETTINGS, learning_rates=dict.fromkeys(roles, RATE), clips={}, warmup_steps=0, seed=1
    )
    with tempfile.TemporaryDirectory() as folder:
        training.train(
            Objective(
                [arc.model(role, LAYERS[role], autocast=autocast) for role in roles],
                losses[tuple(roles)],
                dict.fromkeys(names, 1.0),
            ),
            examples,
            recipe,
            machine=Machine(device="cpu"),
            folder=Path(folder) / "work",
            inputs={},
            report=lambda event: clock.step(dict(event.values)) if event.kind == "step" else None,
        )
    return clock


def usual(examples: list[Example], plan: list[list[int]], *, autocast: bool) -> arc.Clock:
    """Mutual distillation as people write it: padded batches, full logits, KL over every position, then masked."""
    models: dict[Role, Tuned] = {role: arc.model(role, LAYERS[role], autocast=False) for role in ("slm", "llm")}
    slm, llm = models["slm"].model, models["llm"].model
    optimizer = torch.optim.AdamW([p for m in (slm, llm) for p in m.parameters() if p.requires_grad], lr=RATE)
    clock = arc.Clock()
    for step in plan:
        batch = arc.padded_as_usual([examples[i] for i in step])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            a, b = slm(**batch), llm(**batch)
            mask = batch["labels"][:, 1:] != -100
            log_a, log_b = (F.log_softmax(out.logits[:, :-1].float(), dim=-1) for out in (a, b))
            kd_a = (
                F.kl_div(log_a, log_b.detach(), reduction="none", log_target=True).sum(-1) * mask
            ).sum() / mask.sum()
            kd_b = (
                F.kl_div(log_b, log_a.detach(), reduction="none", log_target=True).sum(-1) * mask
            ).sum() / mask.sum()
            loss = a.loss + b.loss + kd_a + kd_b
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step({"loss": float(loss.detach())})
    return clock
