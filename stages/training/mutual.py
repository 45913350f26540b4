"""Eq. 4 and Eq. 5 for two models that teach each other: values and gradients, a few answers at a time.

Autograd would hold eleven matrices of the size of the logits, two of them the logits themselves. Here the formulas of
the gradients stand beside those of the values, the backward pass computes the softmaxes anew, and gradients are written
where the logits were: beyond the logits there is what AT_ONCE allows, however many answers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stages.data.examples import NO_LABEL
from stages.training.losses import rows_at_once, wide


class Said:
    """What a model says at some answers, from its logits [answers, vocabulary]: each computed when it is needed."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @cached_property
    def log(self) -> Tensor:
        """Log-probabilities, [answers, vocabulary]."""
        return torch.log_softmax(self._logits, dim=-1)

    @cached_property
    def p(self) -> Tensor:
        """Probabilities, [answers, vocabulary]."""
        return torch.softmax(self._logits, dim=-1)


# --- the divergences of a student, of probabilities s and logits z, from a teacher, of probabilities t


class Divergence(NamedTuple):
    """At each answer: its value, [answers], and its derivative by the student's logits, [answers, vocabulary]."""

    value: Callable[[Said, Said], Tensor]
    by_logits: Callable[[Said, Said], Tensor]


def forward_kl(student: Said, teacher: Said) -> Tensor:
    """KL(t || s) = sum_i t_i log(t_i / s_i)."""
    return (teacher.log - student.log).mul_(teacher.p).sum(dim=-1)


def forward_kl_by_logits(student: Said, teacher: Said) -> Tensor:
    """d/dz_i KL(t || s) = s_i - t_i."""
    return student.p - teacher.p


def reverse_kl(student: Said, teacher: Said) -> Tensor:
    """KL(s || t) = sum_i s_i log(s_i / t_i)."""
    return forward_kl(teacher, student)


def reverse_kl_by_logits(student: Said, teacher: Said) -> Tensor:
    """d/dz_i KL(s || t) = s_i (log(s_i / t_i) - KL(s || t))."""
    return _by_logits(student, student.log - teacher.log)


def jensen_shannon(student: Said, teacher: Said) -> Tensor:
    """KL(t || m) / 2 + KL(s || m) / 2 with m = (s + t) / 2."""
    # The larger of the two has log(p / m) = log 2 - log(1 + e^-|r|), r = log(s / t), and the smaller |r| less.
    ratio = student.log - teacher.log
    both = _log_over_mean(ratio.abs()).mul_(student.p + teacher.p)
    both.addcmul_(ratio.clamp(max=0), student.p).addcmul_(ratio.clamp_(min=0), teacher.p, value=-1)
    return both.sum(dim=-1) / 2


def jensen_shannon_by_logits(student: Said, teacher: Said) -> Tensor:
    """d/dz_i of it = s_i (log(s_i / m_i) - KL(s || m)) / 2: what m changes cancels out."""
    return _by_logits(student, _log_over_mean(student.log - teacher.log)).div_(2)


def _by_logits(student: Said, by_probability: Tensor) -> Tensor:
    """The derivative by z of what has this derivative d by s, s = softmax(z): s_i (d_i - sum_j s_j d_j)."""
    mean = (student.p * by_probability).sum(dim=-1, keepdim=True)
    return by_probability.sub_(mean).mul_(student.p)


def _log_over_mean(ratio: Tensor) -> Tensor:
    """log(p / m), m the mean of p and q, from log(p / q): log 2 - log(1 + q / p), which is zero to the bit at p = q."""
    return F.softplus(-ratio).neg_().add_(math.log(2))


WITH_GRADIENT = {
    "forward": Divergence(forward_kl, forward_kl_by_logits),
    "reverse": Divergence(reverse_kl, reverse_kl_by_logits),
    "jensen-shannon": Divergence(jensen_shannon, jensen_shannon_by_logits),
}
"""Those of losses.DIVERGENCES."""


# --- the losses of both models


class Each(NamedTuple):
    """The losses of one of two models at each answer, [answers], in nats and float32 (float64 stays float64).

    cross_entropy: -log p(target), Eq. 4; zero where there is no label. divergence: from the other model, Eq. 5, times
    the square of the temperature. confidence: the model's own as a teacher, which has no gradient: the probability of
    its likeliest token at temperature 1, among those that both models have.
    """

    cross_entropy: Tensor
    divergence: Tensor
    confidence: Tensor


def mutual(
    first: Tensor, second: Tensor, targets: Tensor, *, divergence: Divergence, temperature: float
) -> tuple[Each, Each]:
    """Eq. 4 and Eq. 5 of two models, each the other's teacher; a loss has its gradient in its own model's logits alone.

    first, second: logits, [answers, vocabulary]. The two vocabularies are one tokenizer's; rows that only one of them
    has are padding, which Eq. 5 cuts off. targets: [answers], token ids or NO_LABEL. The backward pass leaves the
    gradient where the logits were, unless they are a leaf of the graph: nobody may look at them after it.
    """
    found = _Mutual.apply(targets, divergence, temperature, first, second)  # type: ignore[no-untyped-call]
    return Each(*found[:3]), Each(*found[3:])


class _Mutual(torch.autograd.Function):
    """The tensors of two Each, one after the other, from the logits of both models."""

    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, divergence: Divergence, temperature: float, *logits: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(targets, *logits)
        ctx.set_materialize_grads(False)
        ctx.divergence, ctx.temperature = divergence, temperature
        ctx.is_leaf = [z.is_leaf for z in logits]
        # Filled in, not collected: small tensors that stay would break up the memory that the large ones come from.
        losses = tuple(wide(logits[0].new_empty(len(targets))) for _ in range(6))
        for few in _parts(logits, targets, temperature):
            for one, (cross_entropy, divergences, confidence) in enumerate((losses[:3], losses[3:])):
                cross_entropy[few.rows] = few.cross_entropy(one)
                value = divergence.value(few.shared(one), few.shared(1 - one))
                divergences[few.rows] = value * temperature**2
                confidence[few.rows] = few.confidence(one)
        ctx.mark_non_differentiable(losses[2], losses[5])
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        targets, *logits = ctx.saved_tensors
        by_losses = upstream[:2], upstream[3:5]
        gradients: list[Tensor | None] = [None, None]
        for one, z in enumerate(logits):
            if ctx.needs_input_grad[3 + one] and any(by is not None for by in by_losses[one]):
                gradients[one] = torch.empty_like(z) if ctx.is_leaf[one] else z.detach()
        for few in _parts(logits, targets, ctx.temperature):
            # Both before either is written, since that may be where the logits are.
            learns = [(into, one) for one, into in enumerate(gradients) if into is not None]
            found = [few.gradient(one, ctx.divergence, *by_losses[one]) for _, one in learns]
            for (into, _), part in zip(learns, found, strict=True):
                into[few.rows] = part
        return None, None, None, *gradients


class _Few:
    """Some of the answers, and what both models say there: no softmax is computed twice."""

    def __init__(self, rows: slice, logits: Sequence[Tensor], targets: Tensor, temperature: float) -> None:
        self.rows = rows
        self._logits = tuple(wide(z[rows]) for z in logits)
        self._width = min(z.shape[-1] for z in logits)
        self._is_labelled = targets[rows] != NO_LABEL
        self._targets = targets[rows].where(self._is_labelled, 0)[:, None]
        self._temperature = temperature
        self._said: dict[tuple[int, int, float], Said] = {}

    def _of(self, one: int, width: int, temperature: float) -> Said:
        if (one, width, temperature) not in self._said:
            logits = self._logits[one][:, :width]
            self._said[one, width, temperature] = Said(logits if temperature == 1 else logits / temperature)
        return self._said[one, width, temperature]

    def own(self, one: int) -> Said:
        """Of a model, over its whole vocabulary, at temperature 1."""
        return self._of(one, self._logits[one].shape[-1], 1.0)

    def shared(self, one: int) -> Said:
        """Over what both vocabularies have, at the temperature of the distillation."""
        return self._of(one, self._width, self._temperature)

    def confidence(self, one: int) -> Tensor:
        return self._of(one, self._width, 1.0).p.amax(dim=-1)

    def cross_entropy(self, one: int) -> Tensor:
        return -self.own(one).log.gather(-1, self._targets)[:, 0].where(self._is_labelled, 0.0)

    def gradient(
        self, one: int, divergence: Divergence, by_cross_entropy: Tensor | None, by_divergence: Tensor | None
    ) -> Tensor:
        """By the logits of a model, from the derivatives by both of its losses, [all answers]."""
        if by_cross_entropy is None:
            found = torch.zeros_like(self._logits[one])
        else:  # p - 1 at the target, p elsewhere
            share = by_cross_entropy[self.rows].where(self._is_labelled, 0.0)[:, None]
            found = (self.own(one).p * share).scatter_add_(-1, self._targets, -share)
        if by_divergence is not None:
            # The square of the temperature, over the temperature by which the logits are divided.
            share = by_divergence[self.rows, None] * self._temperature
            by_logits = divergence.by_logits(self.shared(one), self.shared(1 - one))
            by_logits.masked_fill_(share == 0, 0.0)  # where nobody teaches there may be infinities
            found[:, : self._width].addcmul_(by_logits, share)
        return found


def _parts(logits: Sequence[Tensor], targets: Tensor, temperature: float) -> Iterator[_Few]:
    step = rows_at_once(max(z.shape[-1] for z in logits))
    for start in range(0, len(targets), step):
        yield _Few(slice(start, start + step), logits, targets, temperature)
