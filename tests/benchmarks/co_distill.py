"""A co-distill step against its floor, two cross-entropy steps, and against mutual distillation as people write it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from stages.data.examples import Example
from stages.training import recipes, schedule, training
from stages.training.losses import cross_entropy
from stages.training.objective import Losses, Objective, mutual_losses, task_loss
from stages.workspace.budgets import Distillation
from stages.workspace.machine import Machine
from stages.workspace.settings import Role
from tests.benchmarks import gpt2_on_arc as arc
from tests.benchmarks.repeats import shown

STEPS, RATE, LAYERS = 8, 1e-3, {"slm": 6, "llm": 12}
SETTINGS = Distillation(steps=STEPS, batch_size=arc.BATCH)


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    if not arc.available():
        return [("skipped: the real data is not beside the checkout", "-", "-")]
    examples = arc.examples(128)
    plan = schedule.schedule(len(examples), SETTINGS, seed=1)
    both: Sequence[Role] = ("slm", "llm")
    precisions = arc.precisions()
    clocks = arc.in_turn(
        repeats,
        {
            **{f"ours {one}": partial(ours, examples, both, autocast=one == "bfloat16") for one in precisions},
            **{f"slm {one}": partial(ours, examples, ["slm"], autocast=one == "bfloat16") for one in precisions},
            **{f"llm {one}": partial(ours, examples, ["llm"], autocast=one == "bfloat16") for one in precisions},
            **{f"usual {one}": partial(usual, examples, plan, autocast=one == "bfloat16") for one in precisions},
        },
    )
    rows = []
    for one in precisions:
        floor, faster = _over_floor(clocks, one), arc.times_faster(clocks, f"ours {one}", f"usual {one}")
        rows.append((f"over two cross-entropy steps of the same models, {one}", floor, "<= 1.10"))
        rows.append((f"times the usual way, both in {one}", faster, ""))
    if "bfloat16" not in precisions:
        return [*rows, arc.NO_BFLOAT16]
    across = arc.times_faster(clocks, "ours bfloat16", "usual float32")
    return [*rows, ("times the usual way in float32, ours in bfloat16", across, ">= 2.5")]


def _over_floor(clocks: dict[str, list[arc.Clock]], precision: str) -> str:
    laps = zip(*(clocks[f"{name} {precision}"] for name in ("ours", "slm", "llm")), strict=True)
    return shown([both.seconds / (slm.seconds + llm.seconds) for both, slm, llm in laps])


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
    roles: tuple[Role, ...] = ("slm", "llm")
    slm, llm = (arc.model(role, LAYERS[role], autocast=False, as_loaded=False).model for role in roles)
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
