"""How well a model foretells text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from stages.runtime.events import Event, Report
from stages.training.losses import label_losses


@torch.no_grad()
def perplexity(model: Any, rows: Sequence[list[int]], *, autocast: bool, report: Report) -> float:
    """The exponential of the mean of -log p over the tokens of all rows, but for the first of each.

    autocast: whether the model computes in bfloat16; logarithms are taken in float64. The rows go through one by one.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for done, row in enumerate(rows, start=1):
        ids = torch.tensor([row], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(label_losses(logits, ids[0, 1:]).sum())
        count += len(row) - 1
        report(Event("step", step=done, total=len(rows)))
    model.train(was_training)
    return math.exp(min(total / count, LARGEST))


LARGEST = 700.0
"""Beyond it an exponential is no number of float64; a model that says so has nothing to do with the text."""
