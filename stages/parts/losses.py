"""The losses of Eq. 3-6 at the answer tokens: pure functions of logits, in nats, computed in float32.

All take logits of the answer positions alone, [answers, vocabulary], and divide by `tokens`, the number of answer
tokens in the whole optimiser step, so that gradient accumulation changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Divergence = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, targets: Tensor, tokens: Tensor | int) -> Tensor:
    """L_FT, Eq. 4 (and the task loss of Eq. 3): -log p(target), summed over answers, over tokens.

    logits: [answers, vocabulary]; targets: [answers], token ids.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum") / tokens


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed. Both in log space, [answers, vocabulary]."""
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), summed. Both in log space, [answers, vocabulary]."""
    return F.kl_div(teacher, student, reduction="sum", log_target=True)


DIVERGENCES: dict[Literal["forward", "reverse"], Divergence] = {"forward": forward_kl, "reverse": reverse_kl}


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor | int, *, temperature: float, divergence: Divergence
) -> Tensor:
    """L_KD, Eq. 5: the divergence of the student from the teacher; gradients reach the student only.

    The two vocabularies are one tokenizer's; rows that only one of them has are padding and are cut off. With a
    temperature the term is multiplied by its square, which keeps the size of the gradient (Hinton et al., 2015).
    """
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student = torch.log_softmax(student_logits[..., :shared].float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_logits.detach()[..., :shared].float() / temperature, dim=-1)
    return divergence(student, teacher) * temperature**2 / tokens
