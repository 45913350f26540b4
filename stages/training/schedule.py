"""Which rows each optimiser step sees, and how a step comes to Trainer.

The order is a list made beforehand from a seed, so that it depends neither on the process nor on when it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from stages.data.examples import Example
from stages.runtime.errors import UsageProblem
from stages.training.objective import Objective, Tokens
from stages.workspace.budgets import Budget


def schedule(examples: int, budget: Budget, seed: int) -> list[list[int]]:
    """Which examples each optimiser step sees, [steps][rows_per_step] indices.

    Shuffled passes one after the other, cut into steps of equal size; the last is filled from one more pass.
    """
    rows, steps = budget.rows_per_step, budget.steps_for(examples)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * rows:
        order += torch.randperm(examples, generator=generator).tolist()
    return [order[start * rows : (start + 1) * rows] for start in range(steps)]


class MicroBatches(Dataset[dict[str, Any]]):
    """A schedule as Trainer's dataset: micro-batch after micro-batch, the same number for every step.

    Each carries the Tokens of its whole step, which alone can say what share of the step's loss is its own. Of several
    processes, each takes every so-manyth, and all the same number. Raises UsageProblem if a step's rows are too few.
    """

    def __init__(
        self,
        steps: list[list[int]],
        examples: Sequence[Example],
        rows: int,
        objective: Objective,
        *,
        alternating: bool,
        processes: int = 1,
    ) -> None:
        self.per_step = processes * math.ceil(len(steps[0]) / rows / processes)
        if self.per_step > len(steps[0]):
            count = len(steps[0])
            message = f"a step's {count} rows in micro-batches of {rows} cannot be shared among {processes} processes"
            larger = f", or set micro_batch = {math.ceil(count / processes)}" if count >= processes else ""
            raise UsageProblem(message, mend=f"start fewer processes{larger}")
        turns = ("slm", "llm") if alternating else (None,)
        self._items = [
            (number, turn, chunk)
            for number, step in enumerate(steps)
            for turn in turns
            for chunk in _even_chunks(step, self.per_step)
        ]
        self._tokens = [Tokens.of([examples[i] for i in step]) for step in steps]
        self._examples = examples
        self._objective = objective

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, turn, chunk = self._items[index]
        batch = self._objective.collate([self._examples[i] for i in chunk], self._tokens[step])
        return {**batch, **({"turn": turn} if turn else {})}


def _even_chunks(items: list[int], count: int) -> list[list[int]]:
    bounds = [round(i * len(items) / count) for i in range(count + 1)]
    return [items[bounds[i] : bounds[i + 1]] for i in range(count)]
