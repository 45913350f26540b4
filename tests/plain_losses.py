"""Eq. 4 and 5 as they are written down, with whole matrices and autograd's gradients: `mutual` is held against them.

And what the tests of both draw on: distributions whose divergences are known, and random logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from stages.models.packing import ROWS
from stages.training.losses import DIVERGENCES, Divergence, cross_entropy, knows_better, row_losses, wide
from stages.training.objective import Losses, Tokens
from stages.workspace.budgets import Distillation

TEMPERATURES = pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])

P, Q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
# KL(p || q) = 1/2 log 2 + 1/4 log 1 + 1/4 log 1/2 = 1/4 log 2; KL(q || p) too, since q is p read backwards.
KL_P_Q = 0.25 * math.log(2)
R = [0.5, 0.5, 0.0]


def logits(rows: int = 5, vocabulary: int = 7, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor | int,
    *,
    temperature: float,
    divergence: Divergence,
    min_confidence: float | None = None,
    taught: Tensor | None = None,
) -> Tensor:
    """L_KD, Eq. 5: the divergence of the student from the teacher; gradients reach the student only.

    The two vocabularies are one tokenizer's; rows that only one of them has are padding and are cut off. With a
    temperature the term is multiplied by its square, which keeps the size of the gradient (Hinton et al., 2015).
    min_confidence: only where the teacher gives its likeliest token at least this probability, at temperature 1, does
    it teach; the sum is divided by all the tokens as ever, so that each token left out counts zero. taught: [answers],
    at which the teacher may teach at all, by default everywhere; the others count zero too.
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_logits, teacher_logits = student_logits[..., :shared], teacher_logits.detach()[..., :shared]
    if taught is not None:
        student_logits, teacher_logits = student_logits[taught], teacher_logits[taught]
    if min_confidence is not None:
        is_sure = torch.softmax(wide(teacher_logits), dim=-1).amax(dim=-1) >= min_confidence  # (answers)
        student_logits, teacher_logits = student_logits[is_sure], teacher_logits[is_sure]
    student = torch.log_softmax(wide(student_logits) / temperature, dim=-1)
    teacher = torch.log_softmax(wide(teacher_logits) / temperature, dim=-1)
    return divergence(student, teacher) * temperature**2 / tokens


def mutual_losses(settings: Distillation) -> Losses:
    """Eq. 4 and Eq. 5 for both models, each by itself."""

    def losses(logits: Mapping[str, Tensor], labels: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        found = {}
        for role, other in (("slm", "llm"), ("llm", "slm")):
            student, teacher, taught = logits[role], logits[other], None
            if settings.select == "min-ce":
                rows = logits[ROWS]
                taught = knows_better(row_losses(teacher, labels, rows), row_losses(student, labels, rows), rows)
                found[f"{role}_taught"] = taught.sum() / tokens.distilled
            found[f"{role}_ft"] = cross_entropy(student, labels, tokens.labelled)
            found[f"{role}_kd"] = distillation(
                student,
                teacher,
                tokens.distilled,
                temperature=settings.temperature,
                divergence=DIVERGENCES[settings.divergence],
                min_confidence=settings.min_confidence,
                taught=taught,
            )
        return found

    return losses
