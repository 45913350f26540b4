"""How far what a student says is from what its teacher says, from the hidden states of both, and its gradient.

Logits are computed a few answers at a time, so that no matrix of all answers by the whole vocabulary is ever held; and
once: the gradient, whose formula is short, is found as soon as they are there, instead of from logits made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stages.training.losses import rows_at_once, wide
from stages.training.mutual import Said, forward_kl, forward_kl_by_logits

Head = Callable[[Tensor], Tensor]
"""What makes logits of hidden states: [answers, width] -> [answers, vocabulary]."""


class Heads(NamedTuple):
    """The output layers of both. weights: of the student's, those that train."""

    student: Head
    teacher: Head
    weights: Sequence[Tensor]


def divergence(hidden: Tensor, taught: Tensor, heads: Heads, *, at_once: int) -> Tensor:
    """KL(teacher || student) of the next token, in nats, summed over all answers.

    hidden, taught: what goes into the student's and the teacher's output layer, [answers, width]. Gradients reach
    hidden and the student's weights. at_once: for how many answers logits are held at a time.
    """
    found: Tensor = _Divergence.apply(heads, at_once, taught, hidden, *heads.weights)  # type: ignore[no-untyped-call]
    return found


FIRST = 3
"""The place of `hidden` among what is given to _Divergence; the weights come after it."""


class _Divergence(torch.autograd.Function):
    """The value, and, found beside it, its gradient by hidden and by each weight."""

    @staticmethod
    def forward(ctx: Any, heads: Heads, at_once: int, taught: Tensor, *learning: Tensor) -> Tensor:
        hidden, *weights = learning
        wanted = [place for place in range(len(learning)) if ctx.needs_input_grad[FIRST + place]]
        gradients = [torch.zeros_like(tensor) for tensor in learning] if wanted else []
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            inputs = [hidden[rows].detach().requires_grad_(), *weights]
            with torch.set_grad_enabled(bool(wanted)):
                said = heads.student(inputs[0])
            by_logits = torch.empty_like(said)
            total = total + _compare(said.detach(), heads.teacher(taught[rows]), by_logits)
            if wanted:
                found = torch.autograd.grad(said, [inputs[place] for place in wanted], by_logits)
                for place, gradient in zip(wanted, found, strict=True):
                    (gradients[0][rows] if place == 0 else gradients[place]).add_(gradient)
            del said, by_logits
        ctx.wanted = wanted
        ctx.save_for_backward(*(gradients[place] for place in wanted))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, gradient in zip(ctx.wanted, ctx.saved_tensors, strict=True):
            found[FIRST + place] = gradient * upstream
        return tuple(found)


def _compare(said: Tensor, wanted: Tensor, by_logits: Tensor) -> Tensor:
    """The divergence, summed; its derivative by the student's logits goes into by_logits.

    A few rows at a time: as many as the processor keeps at hand between one operation and the next.
    """
    total, step = said.new_zeros((), dtype=torch.promote_types(said.dtype, torch.float32)), rows_at_once(said.shape[-1])
    for one, other, into in zip(*(torch.split(part, step) for part in (said, wanted, by_logits)), strict=True):
        student, teacher = Said(wide(one)), Said(wide(other))
        total = total + forward_kl(student, teacher).sum()
        into.copy_(forward_kl_by_logits(student, teacher))
    return total
