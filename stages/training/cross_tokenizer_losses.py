"""The losses by which a student learns from a teacher of another tokenizer: pure functions of logits, in nats.

Three ways. `mapped_distillation` compares distributions over outcomes that both vocabularies have; `span_distillation`
compares what both give to the same bytes of a text; `sorted_distillation` compares how sure both are, never of what.
As in `losses`: logits of the answer positions alone, gradients to the student alone, float32 (float64 stays float64),
and a sum over positions or spans divided by `tokens`, the number of answers of the whole optimiser step.

Each is multiplied by the power of the temperature that keeps the size of the gradient: the square for a divergence of
distributions, as there; the first power for likelihoods of spans and for a distance of probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stages.training.losses import Divergence, rows_at_once, wide

FLOOR = math.log(torch.finfo(torch.float32).tiny)
"""What stands for the logarithm of a zero, -87.3, where one side alone is zero and a divergence may be infinite."""

NEARLY_CERTAIN = -16.0
"""Where log(1 - p) is below this, float32 has p = 1."""


# --- outcomes of two vocabularies


def mapped_distillation(
    student_logits: Tensor,
    outcomes: Tensor,
    log_probabilities: Tensor,
    tokens: Tensor | int,
    *,
    student_outcomes: Tensor | None = None,
    temperature: float,
    divergence: Divergence,
    weights: Tensor | None = None,
    min_confidence: float | None = None,
    confidence: Tensor | None = None,
) -> Tensor:
    """L_KD, Eq. 5, over outcomes: the divergence of two distributions over those that are told and "any other".

    student_logits: [n, vocabulary]. outcomes: int64 [n, k], no two alike in a row, -1 where there is none.
    log_probabilities: [n, k + 1], the teacher's at this temperature, minus infinity where it has none; the last is that
    of "any other". student_outcomes: int64 [vocabulary], the outcome of each of the student's ids, -1 for "any other";
    by default an outcome is the id itself. weights: [n], the share of each position, never negative; of zero, nothing
    is computed. confidence: [n], the teacher's at temperature 1: below min_confidence a position counts zero.

    The student's tokens of one outcome add up. An outcome that none of its tokens has counts as "any other" of the
    teacher. So both stay distributions, and to merge can only take away. Where no two tokens have one outcome this is,
    to the bit, `captured_distillation` of the same teacher in the student's ids. The other way round than forward, what
    the teacher gives nothing costs as if it gave e^FLOOR; forward, so does what the student cannot say.
    """
    columns, groups = _columns(outcomes, student_outcomes)
    teacher = _with_lost(log_probabilities, columns)
    columns, order = columns.sort(dim=-1)
    teacher = torch.cat([teacher[:, :-1].gather(-1, order), teacher[:, -1:]], dim=-1)

    is_taught = (columns >= 0).any(dim=-1)  # (n): elsewhere both are sure of "any other", which is no divergence
    if weights is not None:
        is_taught &= weights > 0
    if min_confidence is not None:
        if confidence is None:
            raise ValueError("min_confidence without the teacher's confidence")
        is_taught &= confidence >= min_confidence
    if not bool(is_taught.all()):
        student_logits, columns, teacher = student_logits[is_taught], columns[is_taught], teacher[is_taught]
        weights = None if weights is None else weights[is_taught]

    def over_outcomes(logits: Tensor, columns: Tensor) -> Tensor:
        return _chosen_and_others(torch.log_softmax(_merged(wide(logits) / temperature, groups), dim=-1), columns)

    # In parts only where no bit is promised: how a long sum is done may hang on the number of rows.
    student = (
        over_outcomes(student_logits, columns) if groups is None else _in_parts(over_outcomes, student_logits, columns)
    )
    return _summed(divergence, student, teacher, weights) * temperature**2 / tokens


def _columns(outcomes: Tensor, student_outcomes: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The column of the student in which each outcome is, -1 for none; and the column that each of its ids goes to.

    Where no two ids have one outcome nothing is merged: the column is the id, and there are no groups. Otherwise it is
    the outcome, and the last column is that of all ids without one.
    """
    if student_outcomes is None:
        return outcomes, None
    (ids,) = torch.nonzero(student_outcomes >= 0, as_tuple=True)
    found = student_outcomes[ids]
    size = int(found.max()) + 1 if len(found) else 1
    is_merged = bool((torch.bincount(found) > 1).any())
    table = outcomes.new_full((size,), -1).scatter(0, found, found if is_merged else ids)
    is_known = (outcomes >= 0) & (outcomes < size)
    columns = table[outcomes.where(is_known, 0)].where(is_known, -1)
    return columns, student_outcomes.where(student_outcomes >= 0, size) if is_merged else None


def _with_lost(log_probabilities: Tensor, columns: Tensor) -> Tensor:
    """A teacher's [n, k + 1], what it gives to outcomes that the student has nowhere moved to "any other"."""
    chosen, others = log_probabilities[:, :-1], log_probabilities[:, -1:]
    lost = chosen.masked_fill(columns >= 0, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([chosen.masked_fill(columns < 0, -math.inf), torch.logaddexp(others, lost)], dim=-1)


def _chosen_and_others(whole: Tensor, columns: Tensor) -> Tensor:
    """Of log-probabilities [n, vocabulary] those at some columns, minus infinity for -1, and last that of all others.

    Each row has one column at least.
    """
    is_absent = columns < 0
    index = columns.amax(dim=-1, keepdim=True).where(is_absent, columns)
    chosen = whole.gather(-1, index).masked_fill(is_absent, -math.inf)
    rest = whole.scatter(-1, index, -math.inf)
    # The gradient of logsumexp is NaN where there is nothing to add up.
    is_empty = rest.detach().amax(dim=-1, keepdim=True).isneginf()
    if bool(is_empty.any()):
        rest = rest.masked_fill(is_empty, 0.0)
    others = rest.logsumexp(dim=-1, keepdim=True).masked_fill(is_empty, -math.inf)
    return torch.cat([chosen, others], dim=-1)


# --- likelihoods of spans


def span_likelihoods(logits: Tensor, targets: Tensor, spans: Tensor, count: int) -> Tensor:
    """Log p of each span, [count], in nats at temperature 1: the teacher's part of span_distillation.

    logits: [answers, vocabulary]. targets: int64 [answers], token ids. spans: int64 [answers], the span that each is
    in, from 0; -1 for none, whose target is not looked at. A span without an answer has 0.
    """
    is_inside = spans >= 0
    return _likelihoods(_in_parts(_log_odds, logits[is_inside], targets[is_inside]), spans[is_inside], count)


def span_distillation(
    student_logits: Tensor,
    targets: Tensor,
    spans: Tensor,
    teacher: Tensor,
    tokens: Tensor | int,
    *,
    temperature: float,
    divergence: Divergence,
    weights: Tensor | None = None,
) -> Tensor:
    """The divergence of binarised likelihoods of spans: ALM, approximate likelihood matching (arXiv 2503.20083).

    With p_T and p_S what teacher and student give to all tokens of a span by the chain rule, and tau the temperature,
    the sum over spans of

        tau D( (p_T^(1/tau), 1 - p_T^(1/tau)) || (p_S^(1/tau), 1 - p_S^(1/tau)) )

    whose D in Minixhofer et al. is "forward" (as cross-entropy, which has the same gradient) and tau 100. tau is of the
    likelihoods of spans; the logits are at temperature 1. The factor tau is not theirs and keeps the size of the
    gradient: D falls as 1/tau, and forward, tau D tends to l_T - l_S - l_T log(l_T / l_S) with l = log p. At tau 1 a
    teacher that is sure of a text gives the cross-entropy of it.

    targets, spans: as in span_likelihoods; no span goes beyond one call. teacher: [spans], log p_T, at most 0. weights:
    [spans], the share of each, never negative. A span without an answer counts zero. Of their method two parts are left
    out, which both want more than a span's likelihood: that a token ends where the span does, and to merge spans by it.
    """
    is_inside = spans >= 0
    odds, spans = _in_parts(_log_odds, student_logits[is_inside], targets[is_inside]), spans[is_inside]
    found = torch.bincount(spans, minlength=len(teacher)) > 0
    told = teacher.detach().double() / temperature
    own = _likelihoods(odds, spans, len(teacher)) / temperature
    # 1 - p is the sum over tokens of 1 - p where that is little, and 1 - p^(1/tau) is 1/tau of it.
    missing = _log_sums(-F.softplus(odds), spans, len(teacher))
    is_certain = missing < NEARLY_CERTAIN
    not_own = torch.where(is_certain, missing - math.log(temperature), _log1mexp(own.masked_fill(is_certain, -1.0)))
    student = torch.stack([own, not_own], dim=-1)  # (spans, 2)
    both = torch.stack([told, _log1mexp(told)], dim=-1).to(student.dtype)
    if weights is not None:
        found &= weights > 0
        weights = weights[found]
    return _summed(divergence, student[found], both[found], weights) * temperature / tokens


def _log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) of each target, [answers]; it has digits of p and of 1 - p, however small."""
    logits = wide(logits)
    chosen = logits.gather(-1, targets[:, None])
    return (chosen - logits.scatter(-1, targets[:, None], -math.inf).logsumexp(dim=-1, keepdim=True)).squeeze(-1)


def _likelihoods(odds: Tensor, spans: Tensor, count: int) -> Tensor:
    """Log p of each span, [count], from the log-odds of its tokens."""
    return odds.new_zeros(count).index_add(0, spans, -F.softplus(-odds))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), x at most 0, by the formula that has digits (Maechler, 2012)."""
    is_large = x > -math.log(2)
    near_zero = (-torch.expm1(x.where(is_large, -1.0))).log()
    return torch.where(is_large, near_zero, torch.log1p(-x.masked_fill(is_large, -1.0).exp()))


# --- sorted distributions


def sorted_distillation(
    student_logits: Tensor,
    log_probabilities: Tensor,
    tokens: Tensor | int,
    *,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """The distance of two sorted distributions: ULD, universal logit distillation (arXiv 2402.12030).

    With p_(1) >= p_(2) >= ... the teacher's probabilities and q_(i) the student's, the shorter list filled up with
    zeros, the sum over positions of temperature * sum_i |p_(i) - q_(i)|: Wasserstein's at one cost for all pairs
    (Boizard et al.). A teacher tells the k likeliest and the rest r_p as one number, and so does the student:

        sum_(i <= k) |p_(i) - q_(i)| + |r_p - r_q|

    By the triangle inequality that is never more than the whole sum, and rises with k. It is the whole sum where k
    reaches the smaller of the two vocabularies, since beyond it one side is all zeros.

    It says how sure to be, never of what: a student that is sure of a wrong token is made surer of it. So it stands
    beside a term that names tokens, as theirs does.

    student_logits: [n, vocabulary]. log_probabilities: [n, k + 1], of the teacher's own tokens at this temperature, in
    any order, minus infinity for none; the last is that of the rest. weights: [n], the share of each position.
    """
    student = torch.softmax(wide(student_logits) / temperature, dim=-1)
    teacher = log_probabilities.detach().to(student.dtype).exp()
    told, k = teacher[:, :-1].sort(dim=-1, descending=True).values, teacher.shape[-1] - 1
    likeliest, ids = student.topk(min(k, student.shape[-1]), dim=-1)
    rest = student.scatter(-1, ids, 0.0).sum(dim=-1)
    each = (F.pad(likeliest, (0, k - likeliest.shape[-1])) - told).abs().sum(dim=-1) + (rest - teacher[:, -1]).abs()
    return (each if weights is None else each * weights).sum() * temperature / tokens


# --- parts of several


def _merged(values: Tensor, groups: Tensor | None) -> Tensor:
    return values if groups is None else _log_sums(values, groups, int(groups.max()) + 1)


def _in_parts(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, more: Tensor) -> Tensor:
    """What a function of rows makes of logits [n, vocabulary] and of more, [n, ...], a few rows at a time.

    Nothing of the size of the logits is kept for the gradient, it is computed again: beyond the logits there are two
    such matrices, the gradient and its parts, whatever the function does.
    """
    rows = rows_at_once(logits.shape[-1])
    parts = zip(torch.split(logits, rows), torch.split(more, rows), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def _log_sums(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """The log-sum-exp of each group along the last dimension, [..., count]; minus infinity for an empty one.

    values: [..., m]; groups: int64 [m]. Each group is shifted by its own largest member, so that an unlikely one keeps
    its digits, and one of a single member its value to the bit.
    """
    places = groups.expand_as(values)
    with torch.no_grad():
        largest = values.new_full((*values.shape[:-1], count), -math.inf).scatter_reduce(-1, places, values, "amax")
        is_empty = largest.isneginf()
        shift = largest.masked_fill(is_empty, 0.0)
    parts = (values - shift.gather(-1, places)).exp_()
    sums = torch.zeros_like(shift).scatter_add(-1, places, parts)
    return sums.masked_fill(is_empty, 1.0).log() + largest


def _summed(divergence: Divergence, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
    """The divergence of rows in log space, [rows, outcomes], each with its weight, above zero; summed.

    Where both are zero nothing is added; where one is, FLOOR stands for its logarithm. A divergence of w p and w q is w
    times that of p and q, for each in DIVERGENCES, so that a weight is a term of both logarithms.
    """
    teacher = teacher.detach().to(student.dtype)
    is_there = ~(student.isneginf() & teacher.isneginf()).all(dim=0)  # (outcomes)
    student, teacher = (x[:, is_there].masked_fill(x[:, is_there].isneginf(), FLOOR) for x in (student, teacher))
    if weights is not None:
        share = weights.to(student.dtype).log()[:, None]
        student, teacher = student + share, teacher + share
    return divergence(student, teacher)
