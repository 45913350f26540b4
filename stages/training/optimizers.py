"""The optimisers of training, by the names that an agreement gives them: torch's own, new in every stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stages.workspace.budgets import Budget, Optimizer

CLASSES: Mapping[Optimizer, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
}


def optimizer_of(
    budget: Budget, groups: Sequence[Mapping[str, Any]], *, is_whole: bool = False
) -> torch.optim.Optimizer:
    """A new one, with a group of parameters for each learning rate; its other settings are torch's.

    is_whole: of a whole model in one pass over its weights, where AdamW has that: adapters are small.
    """
    fused = {"fused": True} if is_whole and budget.optimizer == "adamw" else {}
    return CLASSES[budget.optimizer](list(groups), weight_decay=budget.weight_decay, **fused)
