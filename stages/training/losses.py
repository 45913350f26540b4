"""The losses of Eq. 3-6 at the answer tokens: pure functions of logits, in nats, computed in float32.

All take logits of the answer positions alone, [answers, vocabulary], and divide by `tokens`, their number in the whole
optimiser step, so that gradient accumulation changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.data.examples import NO_LABEL

Divergence = Callable[[Tensor, Tensor], Tensor]

AT_ONCE = 2**19
"""Of how many logits, of whole answers, copies are held at a time where that saves memory: few enough for a cache."""


def rows_at_once(vocabulary: int) -> int:
    """How many answers are AT_ONCE logits; one at least."""
    return max(1, AT_ONCE // vocabulary)


def wide(logits: Tensor) -> Tensor:
    """In float32 at least: float64 stays float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy(logits: Tensor, targets: Tensor, tokens: Tensor | int) -> Tensor:
    """L_FT, Eq. 4 (and the task loss of Eq. 3): -log p(target), summed over answers, over tokens.

    logits: [answers, vocabulary]; targets: [answers], token ids, or NO_LABEL, which counts zero.
    """
    return F.cross_entropy(wide(logits), targets, ignore_index=NO_LABEL, reduction="sum") / tokens


def label_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each answer's own token, [answers], in nats and float64; NaN where there is none.

    logits: [answers, vocabulary]; targets: [answers], token ids or NO_LABEL.
    """
    rows = rows_at_once(logits.shape[-1])
    parts = zip(torch.split(logits.detach(), rows), torch.split(targets, rows), strict=True)
    found = [F.cross_entropy(one.double(), wanted, ignore_index=NO_LABEL, reduction="none") for one, wanted in parts]
    return torch.where(targets == NO_LABEL, torch.nan, torch.cat(found))


def row_losses(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """-log p of each row's whole completion, [number of rows], in nats and float64; NaN for an unlabelled row.

    logits: [answers, vocabulary]; targets: [answers]; rows: [answers], the row that each answer belongs to, from 0 in
    rising order. Summed, not averaged, over the whole vocabulary at temperature 1: what a model knows of a text does
    not hang on how its tokenizer cuts it.
    """
    return by_row(label_losses(logits, targets), rows)


def by_row(each: Tensor, rows: Tensor) -> Tensor:
    """The sums of what belongs to each row, [number of rows]; each, rows: [answers], rows rising from 0."""
    return each.new_zeros(int(rows[-1]) + 1).index_add(0, rows, each)


def knows_better(teacher: Tensor, student: Tensor, rows: Tensor) -> Tensor:
    """At which answers a teacher may teach: [answers], those of rows that it knows better (DualMinCE of FedMKT).

    teacher, student: of row_losses. Neither teaches a row that both know alike, or that has no answer.
    """
    return (teacher < student)[rows]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed. Both in log space, [answers, vocabulary]."""
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher), summed. Both in log space, [answers, vocabulary]."""
    return F.kl_div(teacher, student, reduction="sum", log_target=True)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Half KL(teacher || m) and half KL(student || m), m the mean of the two, summed: at most log 2 an answer.

    Both in log space, [answers, vocabulary].
    """
    # With p the teacher's and q the student's: log(p/m) = log 2 - log(1 + q/p), which is zero to the bit where p = q.
    ratio = student - teacher
    teacher_over_mean = math.log(2) - F.softplus(ratio)
    student_over_mean = math.log(2) - F.softplus(-ratio)
    return (teacher.exp() * teacher_over_mean + student.exp() * student_over_mean).sum() / 2


DIVERGENCES: dict[str, Divergence] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jensen-shannon": jensen_shannon,
}


class TopK(NamedTuple):
    """What a teacher says at each answer, in short: its k likeliest tokens, and all others together as one outcome.

    tokens: [answers, k], ids in rising order. log_probabilities: [answers, k + 1], at the temperature of the
    distillation, the last that of the others together; [answers, k] where there are no others, k being the whole
    vocabulary. confidence: [answers], the probability of the likeliest token, at temperature 1.
    """

    tokens: Tensor
    log_probabilities: Tensor
    confidence: Tensor


def top_k(logits: Tensor, k: int, *, temperature: float) -> TopK:
    """The teacher's part of captured_distillation, from its logits [answers, vocabulary]."""
    whole = torch.log_softmax(logits.float() / temperature, dim=-1)
    tokens = whole.topk(min(k, whole.shape[-1]), dim=-1).indices.sort(dim=-1).values
    confidence = torch.softmax(logits.float(), dim=-1).amax(dim=-1)
    return TopK(tokens, _with_tail(whole, tokens), confidence)


def captured_distillation(
    student_logits: Tensor,
    teacher: TopK,
    tokens: Tensor | int,
    *,
    vocabulary: int,
    temperature: float,
    divergence: Divergence,
    min_confidence: float | None = None,
    taught: Tensor | None = None,
) -> Tensor:
    """L_KD, Eq. 5, from a teacher in short: the divergence of the two distributions over k tokens and "any other".

    vocabulary: how many ids the two models share, of which the teacher's k are; further rows of the student are padding
    and are cut off. With k = vocabulary it is what `mutual` has, value and gradient. Below, it is never more than that
    and rises with k, since to merge outcomes can only take away (the data processing inequality, which holds for all
    three divergences). The gradient reaches every logit of the student, also of tokens that are not among the k,
    through the probability of "any other".

    With a temperature the term is multiplied by its square, which keeps the size of the gradient (Hinton et al., 2015).
    min_confidence: only where the teacher gives its likeliest token at least this probability, at temperature 1, does
    it teach; the sum is divided by all the tokens as ever, so that each token left out counts zero. taught: [answers],
    at which the teacher may teach at all, by default everywhere; the others count zero too.
    """
    student_logits = student_logits[..., :vocabulary]
    if taught is not None:
        student_logits, teacher = student_logits[taught], TopK(*(part[taught] for part in teacher))
    if min_confidence is not None:
        is_sure = teacher.confidence >= min_confidence  # (answers)
        student_logits, teacher = student_logits[is_sure], TopK(*(part[is_sure] for part in teacher))
    whole = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    return divergence(_with_tail(whole, teacher.tokens), teacher.log_probabilities) * temperature**2 / tokens


def _with_tail(whole: Tensor, tokens: Tensor) -> Tensor:
    """Of log-probabilities [answers, vocabulary], those of some tokens, and that of all others together."""
    chosen = whole.gather(-1, tokens)
    if tokens.shape[-1] == whole.shape[-1]:
        return chosen
    # Added up, not taken as what the chosen leave of 1: that would have no digits where they leave little.
    others = whole.scatter(-1, tokens, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([chosen, others], dim=-1)
