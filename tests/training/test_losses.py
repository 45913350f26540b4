"""losses: cross-entropy and KL of Eq. 3-6 at the answer tokens, against arithmetic and torch.nn.functional."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from plain_losses import P, Q, distillation, logits
from torch import Tensor
from torch.nn import functional as F

from stages.data.examples import NO_LABEL
from stages.training.losses import (
    DIVERGENCES,
    Divergence,
    TopK,
    captured_distillation,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    knows_better,
    reverse_kl,
    row_losses,
    top_k,
)

ALL = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def test_cross_entropy_is_minus_log_of_the_probability_of_the_target() -> None:
    # -(log 1/2 + log 1/4) over 2 tokens = (1 + 2)/2 log 2
    found = cross_entropy(torch.tensor([P, P]).log(), torch.tensor([0, 1]), 2)
    assert found.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_cross_entropy_of_a_model_without_opinion_is_log_of_the_vocabulary() -> None:
    assert cross_entropy(torch.zeros(3, 50), torch.tensor([0, 7, 49]), 3).item() == pytest.approx(math.log(50))


def test_cross_entropy_is_torchs_mean_over_the_answers() -> None:
    targets = torch.tensor([0, 6, 3, 3, 1])
    torch.testing.assert_close(cross_entropy(logits(), targets, 5), F.cross_entropy(logits(), targets))


def test_where_there_is_no_label_there_is_no_cross_entropy() -> None:
    # -(log 1/2) over 2 tokens; the second row counts zero, and gets no gradient.
    z = torch.tensor([P, Q]).log().requires_grad_()
    found = cross_entropy(z, torch.tensor([0, NO_LABEL]), 2)
    found.backward()
    assert found.item() == pytest.approx(0.5 * math.log(2))
    assert z.grad is not None
    assert z.grad[1].tolist() == [0, 0, 0]
    assert cross_entropy(z, torch.tensor([NO_LABEL, NO_LABEL]), 1).item() == 0


@ALL
def test_the_gradient_is_that_of_finite_differences(divergence: Divergence) -> None:
    student, teacher = logits(seed=1).double().requires_grad_(), torch.log_softmax(logits(seed=2).double(), -1)
    assert torch.autograd.gradcheck(lambda z: divergence(torch.log_softmax(z, -1), teacher), [student])


# --- a teacher in short: top k and the rest

EVERY_K = (1, 2, 3, 5, 6, 7)


def both_ways(student: Tensor, teacher: Tensor, k: int, **settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradient, from the teacher's logits and from its k likeliest tokens."""
    student = student.clone().requires_grad_()
    whole = distillation(student, teacher, 5, **settings)
    (gradient,) = torch.autograd.grad(whole, student)
    short = top_k(teacher, k, temperature=settings["temperature"])
    found = captured_distillation(student, short, 5, vocabulary=teacher.shape[-1], **settings)
    (found_gradient,) = torch.autograd.grad(found, student)
    return whole.detach(), gradient, found.detach(), found_gradient


@ALL
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("min_confidence", [None, 0.5])
def test_with_the_whole_vocabulary_a_teacher_in_short_is_the_teacher(
    divergence: Divergence, temperature: float, min_confidence: float | None
) -> None:
    settings = {"temperature": temperature, "divergence": divergence, "min_confidence": min_confidence}
    whole, gradient, found, found_gradient = both_ways(logits(seed=1), logits(seed=2), 7, **settings)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-6, atol=1e-9)
    assert gradient.abs().max() > 0.01


@ALL
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_merging_outcomes_only_takes_away_and_less_so_the_more_tokens_are_kept(
    divergence: Divergence, temperature: float
) -> None:
    for seed in range(20):
        student, teacher = logits(seed=seed), logits(seed=seed + 100)
        settings = {"temperature": temperature, "divergence": divergence}
        found = [float(both_ways(student, teacher, k, **settings)[2]) for k in EVERY_K]
        whole = float(both_ways(student, teacher, 7, **settings)[0])
        for fewer, more in itertools.pairwise([0.0, *found, whole]):
            assert fewer <= more * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("divergence", [forward_kl, jensen_shannon])
def test_the_gradient_approaches_that_of_the_whole_as_more_tokens_are_kept(divergence: Divergence) -> None:
    off = [gradient_off(divergence, k) for k in (4, 32, 128, 200)]
    assert off == sorted(off, reverse=True)
    assert off[0] > 0.2
    assert off[2] < 0.02
    assert off[3] < 1e-6


def test_the_reverse_gradient_needs_the_tokens_that_the_student_likes() -> None:
    # It weighs by the student, whose tokens are not among the teacher's where the two have nothing in common.
    assert gradient_off(reverse_kl, 64) > 0.5
    assert gradient_off(reverse_kl, 64, apart=0.1) < 0.02
    assert gradient_off(reverse_kl, 200) < 1e-6


def gradient_off(divergence: Divergence, k: int, *, apart: float = 1.0) -> float:
    """How far the gradient is off that of all 200 tokens, as a share of it; apart: how little the student is alike."""
    teacher = logits(vocabulary=200, seed=2)
    student = apart * logits(vocabulary=200, seed=1) + (1 - apart) * teacher
    _, gradient, _, found = both_ways(student, teacher, k, temperature=1.0, divergence=divergence)
    return float((found - gradient).norm() / gradient.norm())


def test_a_teacher_in_short_is_what_arithmetic_says() -> None:
    # Of P = (1/2, 1/4, 1/4) the likeliest and the rest: (1/2, 1/2); the student Q = (1/4, 1/4, 1/2) has (1/4, 3/4).
    # KL = 1/2 log 2 + 1/2 log 2/3.
    short = top_k(torch.tensor([P]).log(), 1, temperature=1.0)
    assert short.tokens.tolist() == [[0]]
    assert short.log_probabilities.exp().tolist() == [pytest.approx([0.5, 0.5])]
    assert short.confidence.tolist() == pytest.approx([0.5])
    student = torch.tensor([Q]).log().requires_grad_()
    found = captured_distillation(student, short, 1, vocabulary=3, temperature=1.0, divergence=forward_kl)
    assert found.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    found.backward()
    # Softmax's gradient, q - p with the rest's p divided among its tokens as the student divides its own:
    # q = (1/4, 1/4, 1/2), p = (1/2, 1/2 * 1/3, 1/2 * 2/3). It reaches the tokens that were not kept.
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([1 / 4 - 1 / 2, 1 / 4 - 1 / 6, 1 / 2 - 1 / 3], abs=1e-7)


@ALL
def test_the_gradient_of_a_teacher_in_short_is_that_of_finite_differences(divergence: Divergence) -> None:
    whole = torch.log_softmax(logits(seed=2).double(), -1)
    tokens = whole.topk(3).indices.sort(-1).values
    kept = whole.gather(-1, tokens)
    short = TopK(tokens, torch.cat([kept, torch.log1p(-kept.exp().sum(-1, keepdim=True))], -1), whole.exp().amax(-1))

    def loss(z: Tensor) -> Tensor:
        whole = torch.log_softmax(z, -1)
        chosen = whole.gather(-1, tokens)
        return divergence(torch.cat([chosen, torch.log1p(-chosen.exp().sum(-1, keepdim=True))], -1), short[1])

    student = logits(seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, [student])
    (expected,) = torch.autograd.grad(loss(student), student)
    found = captured_distillation(
        student, TopK(tokens, short[1].float(), short[2]), 1, vocabulary=7, temperature=1.0, divergence=divergence
    )
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@ALL
def test_a_teacher_who_leaves_almost_nothing_to_the_rest_gives_sound_numbers(divergence: Divergence) -> None:
    teacher = torch.tensor([[60.0, 0.0, 0.0, 0.0]])  # 1 - p is 3e-26, of which float32's 1 - p has no digit
    for student in (torch.zeros(1, 4), teacher, -teacher):
        student = student.clone().requires_grad_()
        short = top_k(teacher, 1, temperature=1.0)
        assert short.log_probabilities[0, 1].item() == pytest.approx(math.log(3) - 60)
        found = captured_distillation(student, short, 1, vocabulary=4, temperature=1.0, divergence=divergence)
        (gradient,) = torch.autograd.grad(found, student)
        assert math.isfinite(found.item())
        assert bool(gradient.isfinite().all())


def test_rows_that_only_the_student_has_take_no_part_beside_a_teacher_in_short() -> None:
    short = top_k(logits(seed=2), 3, temperature=2.0)
    student = logits(seed=1)
    long = torch.cat([student, torch.full((5, 2), 9.0)], -1).requires_grad_()
    found = captured_distillation(long, short, 5, vocabulary=7, temperature=2.0, divergence=forward_kl)
    expected = captured_distillation(student, short, 5, vocabulary=7, temperature=2.0, divergence=forward_kl)
    assert found.item() == expected.item()
    found.backward()
    assert long.grad is not None
    assert long.grad[:, 7:].abs().max() == 0


def test_what_a_model_knows_of_a_row_is_the_sum_over_its_answer_in_float64() -> None:
    own, targets = logits(seed=3).to(torch.float32), torch.tensor([2, 0, NO_LABEL, 4, 1])
    rows = torch.tensor([0, 0, 1, 2, 2])[: len(own)]
    found = row_losses(own[:5], targets, rows)
    whole = -torch.log_softmax(own[:5].double(), -1)
    expected = [float(whole[0, 2] + whole[1, 0]), math.nan, float(whole[3, 4] + whole[4, 1])]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_rows_of_more_answers_than_are_held_at_once_count_whole() -> None:
    torch.manual_seed(0)
    own, targets, rows = torch.randn(200, 7), torch.randint(7, (200,)), torch.arange(200) // 50
    expected = -torch.log_softmax(own.double(), -1)[range(200), targets].view(4, 50).sum(-1)
    torch.testing.assert_close(row_losses(own, targets, rows), expected)


@pytest.mark.parametrize(
    ("apart", "teaches"), [(1e-6, True), (1e-12, True), (0.0, False), (-1e-6, False), (math.nan, False)]
)
def test_only_who_knows_a_row_better_teaches_it_however_little(apart: float, teaches: bool) -> None:
    student = torch.tensor([3.0, 2.0], dtype=torch.float64)
    teacher = student - torch.tensor([apart, -1.0], dtype=torch.float64)
    assert knows_better(teacher, student, torch.tensor([0, 0, 1])).tolist() == [teaches, teaches, False]
