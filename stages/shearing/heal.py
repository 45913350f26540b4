"""heal: how long a cut model is trained, and the training, which goes on from its last checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report
from stages.shearing.healing import Healing, as_examples, check_head
from stages.shearing.whole import Whole
from stages.training.recipes import Recipe
from stages.training.training import train
from stages.workspace.budgets import Budget
from stages.workspace.machine import Machine

CLIP = 1.0
"""The largest norm of a step's gradient."""

WARMUP = 10
"""One in so many steps is warm-up."""


class Healed(TypedDict):
    """How a cut model was trained, as its record says."""

    steps: int
    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class Heal:
    """How a cut model is to be trained. steps: None for one pass over the text."""

    steps: int | None = None
    learning_rate: float = 3e-4
    batch_size: int = 8

    def on(self, rows: int) -> Healed:
        """The same for a text of so many rows. Raises UsageProblem for a learning rate that teaches nothing."""
        if not 0 < self.learning_rate < math.inf:
            mend = "give a number above 0, such as 3e-4"
            raise UsageProblem(f"the learning rate is {self.learning_rate:g}", mend=mend)
        steps = self.steps or max(1, rows // self.batch_size)
        return Healed(steps=steps, learning_rate=self.learning_rate, batch_size=self.batch_size)


def heal(
    cut: Any,
    model: Any,
    rows: Sequence[list[int]],
    how: Healed,
    *,
    whole: Whole,
    machine: Machine,
    seed: int,
    folder: Path,
    inputs: Mapping[str, Any],
    report: Report,
) -> None:
    """Train a cut model in place, in float32. model: the whole one, which is frozen.

    rows: of the text to train on. folder: of the checkpoints; inputs: what they are of. Raises as train does, and
    UsageProblem for an architecture whose output layer is not known.
    """
    check_head(model, rows[0][:8])
    report(Event("stage", f"heal, {how['steps']} steps"))
    steps = how["steps"]
    budget = Budget(steps=steps, batch_size=how["batch_size"], warmup_steps=steps // WARMUP, max_length=len(rows[0]))
    recipe = Recipe(
        budget,
        learning_rates={"slm": how["learning_rate"]},
        clips={"slm": CLIP},
        warmup_steps=budget.warmup_steps,
        seed=seed,
        decays=True,
    )
    cut.float().requires_grad_(True)
    model.requires_grad_(False)
    for one in (cut, model):
        one.config.use_cache = False
    if machine.gradient_checkpointing:
        cut.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = Healing(whole.tuned(cut), whole.tuned(model))
    outcome = train(objective, as_examples(rows), recipe, machine=machine, folder=folder, inputs=inputs, report=report)
    report(Event("note", outcome.change))
