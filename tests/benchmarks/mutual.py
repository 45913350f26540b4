"""The losses of two models that teach each other, forward and backward, against the same as they are written down."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import plain_losses
import torch
from torch import Tensor

from stages.training.objective import Tokens, mutual_losses
from stages.workspace.budgets import Distillation
from stages.workspace.settings import ROLES

TOKENS, ANSWERS = 262_144, 512
LOGITS_BYTES = 4 * TOKENS * ANSWERS
WAYS = {"ours": mutual_losses, "plain": plain_losses.mutual_losses}
WARM_UP = 4
"""Answers of a first pass, which is not counted."""


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    rows = []
    for threads in sorted({1, os.cpu_count() or 1}):
        laps = {way: [] for way in WAYS}  # type: dict[str, list[tuple[float, float]]]
        for _ in range(repeats):
            for way, found in laps.items():
                found.append(_apart(way, threads))
        seconds, matrices = ({way: median(lap[i] for lap in laps[way]) for way in WAYS} for i in (0, 1))
        what = f"losses of two models, {TOKENS:,} tokens x {ANSWERS} answers in float32, threads: {threads}"
        rows += [
            (f"{what}: s; as written down", f"{seconds['ours']:.1f}; {seconds['plain']:.1f}", "<= 3"),
            (
                "the most memory, in matrices of logits, two of them the logits; as written down",
                f"{matrices['ours']:.1f}; {matrices['plain']:.1f}",
                "<= 3",
            ),
        ]
    return rows


def _apart(way: str, threads: int) -> tuple[float, float]:
    """Seconds and matrices of one forward and backward pass, in a process of its own."""
    code = "import sys; sys.path.insert(0, 'tests')\n"  # as tests.benchmarks itself does
    code += f"from tests.benchmarks import mutual; mutual.once({way!r}, {threads})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    seconds, matrices = map(float, done.stdout.split()[-2:])
    return seconds, matrices


def once(way: str, threads: int) -> None:
    """Print seconds and matrices of logits."""
    torch.set_num_threads(threads)
    before = 0
    for answers in (WARM_UP, ANSWERS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        labels = torch.randint(TOKENS, (answers,), generator=torch.Generator().manual_seed(0))
        logits = {
            role: _Computed.apply(torch.ones(1, requires_grad=True), answers, seed) for seed, role in enumerate(ROLES)
        }
        started = time.perf_counter()
        losses = WAYS[way](Distillation(steps=1))(logits, labels, Tokens(answers, answers))
        del logits  # as the stage does, which hands the losses on alone
        torch.stack(list(losses.values())).sum().backward()
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(seconds, (peak - before) / LOGITS_BYTES)


class _Computed(torch.autograd.Function):
    """Logits as from a model that takes no time and no memory."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, answers: int, seed: int) -> Tensor:
        return torch.empty(answers, TOKENS).normal_(std=3, generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient[0, :1].clone(), None, None
