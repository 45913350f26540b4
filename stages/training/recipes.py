"""How long and how a model is trained, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.workspace.budgets import Budget, Schedule


@dataclass(frozen=True)
class Recipe:
    """How to train: everything that decides the numbers, but for the data.

    learning_rates, clips: by role; a clip is the largest gradient norm of that model alone, absent for none.
    alternating: each step trains the SLM, then the LLM against the SLM so trained (lines 16 and 17 in that order).
    proximal: mu of FedProx (Li et al., 2020): what is minimised has mu/2 |theta - theta_t|^2 beside the losses, theta_t
    being the adapters as they are given; 0 for none.
    schedule: how the rates go over all of rounds, of which rounds_done are over: it never begins anew in a round.
    decays: after the warm-up the learning rates fall to zero as half a cosine, instead of staying.
    """

    budget: Budget
    learning_rates: Mapping[str, float]
    clips: Mapping[str, float | None]
    warmup_steps: int
    seed: int
    alternating: bool = False
    decays: bool = False
    proximal: float = 0.0
    schedule: Schedule = "constant"
    rounds_done: int = 0
    rounds: int = 1

    @property
    def turns(self) -> int:
        """How many of Trainer's steps are one step of ours."""
        return 2 if self.alternating else 1

    def factor(self, turn: int, turns: int) -> float:
        """By what the learning rates are multiplied at a turn of this round, counted from 0, of so many."""
        gone = (self.rounds_done + turn / turns) / self.rounds
        falling = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * gone)) / 2, "linear": 1 - gone}[self.schedule]
        rising = self.warmup_steps * self.turns
        return falling * (turn / rising if turn < rising else 1.0)


@dataclass(frozen=True)
class Outcome:
    """What training did: counts, losses per answer token before and after, and a record of each step."""

    steps: int
    examples: int
    tokens: int
    metrics: dict[str, float]
    log: list[dict[str, Any]] = field(repr=False)

    @property
    def change(self) -> str:
        """Each loss before and after, in words."""
        names = [name.removesuffix("_before") for name in self.metrics if name.endswith("_before")]
        return "  ".join(
            f"{name} {self.metrics[f'{name}_before']:.4g} -> {self.metrics[f'{name}_after']:.4g}" for name in names
        )


def change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Each loss before and after a training, as metrics."""
    return {f"{name}_before": loss for name, loss in before.items()} | {
        f"{name}_after": loss for name, loss in after.items()
    }
