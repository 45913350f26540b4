"""cross_tokenizer_losses: each loss against a computation in float64 that is written another way, and by arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.distillation.alignment import Alignment, mapped
from stages.training import cross_tokenizer_losses, losses
from stages.training.cross_tokenizer_losses import (
    FLOOR,
    mapped_distillation,
    sorted_distillation,
    span_distillation,
    span_likelihoods,
)
from stages.training.losses import (
    DIVERGENCES,
    Divergence,
    captured_distillation,
    cross_entropy,
    forward_kl,
    reverse_kl,
    top_k,
)

ALL = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
NAMES = pytest.mark.parametrize("name", DIVERGENCES)
TEMPERATURES = pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])

ROWS, TOKENS = 5, 9
MERGING = torch.tensor([2, 0, -1, 2, 4, 0, 2, -1, 7])  # ids 0, 3, 6 say outcome 2; 1, 5 say 0; nobody says 1, 3, 5, 6
TOLD = torch.tensor([[0, 2, 4], [0, 7, -1], [2, 4, 7], [4, -1, -1], [0, 2, 7]])


def logits(rows: int = ROWS, vocabulary: int = TOKENS, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def taught(outcomes: Tensor = TOLD, seed: int = 9) -> Tensor:
    """Log-probabilities of a teacher for outcomes and "any other", of which absent ones have none."""
    z = logits(len(outcomes), outcomes.shape[-1] + 1, seed)
    z[:, :-1][outcomes < 0] = -math.inf
    return torch.log_softmax(z, -1)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, leaf)
    return found


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def divergence_by_hand(name: str, p: list[float], q: list[float]) -> float:
    """In probabilities, term by term; the logarithm of a zero is FLOOR where the other side has something."""

    def log(x: float) -> float:
        return math.log(x) if x else FLOOR

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * (log(a) - log(b)) for a, b in zip(p, q, strict=True) if a)

    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return {"forward": kl(p, q), "reverse": kl(q, p), "jensen-shannon": (kl(p, m) + kl(q, m)) / 2}[name]


def mapped_by_hand(
    name: str, student: Tensor, outcomes: Tensor, teacher: Tensor, of_student: list[int], temperature: float
) -> list[float]:
    """The divergence at each position, by walking through the tokens."""
    found = []
    for z, row, told in zip(student.double().numpy(), outcomes.tolist(), teacher.double().numpy(), strict=True):
        p: dict[int, float] = dict.fromkeys((*row, -1), 0.0)
        q = dict(p)
        for outcome, log_probability in zip([*row, -1], told, strict=True):
            p[outcome if outcome in of_student else -1] += math.exp(log_probability)
        for outcome, probability in zip(of_student, softmax(z / temperature), strict=True):
            q[outcome if outcome in row else -1] += float(probability)
        assert sum(p.values()) == pytest.approx(1)
        assert sum(q.values()) == pytest.approx(1)
        found.append(divergence_by_hand(name, list(p.values()), list(q.values())) * temperature**2)
    return found


# --- outcomes of two vocabularies


@NAMES
@TEMPERATURES
def test_over_outcomes_the_divergence_is_what_a_walk_through_the_tokens_finds(name: Any, temperature: float) -> None:
    settings = {"temperature": temperature, "divergence": DIVERGENCES[name]}
    student, teacher = logits(), taught()
    for of_student in (MERGING, torch.tensor([3, 0, 2, -1, 4, 1, 7, -1, 9]), None):
        as_list = list(range(TOKENS)) if of_student is None else of_student.tolist()
        expected = mapped_by_hand(name, student, TOLD, teacher, as_list, temperature)
        found = mapped_distillation(student, TOLD, teacher, 7, student_outcomes=of_student, **settings)
        assert found.item() == pytest.approx(sum(expected) / 7, rel=1e-5)


@ALL
@pytest.mark.parametrize("k", [1, 3, 8, 9])
@pytest.mark.parametrize("min_confidence", [None, 0.6])
def test_equal_tokenizers_give_the_captured_distillation_to_the_bit(
    divergence: Divergence, k: int, min_confidence: float | None
) -> None:
    student, settings = logits(seed=1).requires_grad_(), {"temperature": 2.0, "divergence": divergence}
    short = top_k(logits(seed=2), k, temperature=2.0)
    expected = captured_distillation(student, short, 5, vocabulary=TOKENS, min_confidence=min_confidence, **settings)
    pull = gradient(expected, student)
    log_probabilities = F.pad(short.log_probabilities, (0, k + 1 - short.log_probabilities.shape[-1]), value=-math.inf)
    for of_student in (None, torch.arange(TOKENS)):
        found = mapped_distillation(
            student,
            short.tokens,
            log_probabilities,
            5,
            student_outcomes=of_student,
            min_confidence=min_confidence,
            confidence=short.confidence,
            **settings,
        )
        assert torch.equal(found, expected)
        assert torch.equal(gradient(found, student), pull)
    assert expected > 0.01


@ALL
@pytest.mark.parametrize("k", [1, 3, 8, 9])
def test_the_same_tokenizer_with_permuted_ids_gives_the_same_bits(divergence: Divergence, k: int) -> None:
    student, settings = logits(seed=1).requires_grad_(), {"temperature": 2.0, "divergence": divergence}
    short = top_k(logits(seed=2), k, temperature=2.0)
    expected = captured_distillation(student, short, 5, vocabulary=TOKENS, **settings)
    teachers_id = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(k))
    # What the teacher with those ids tells, by the alignment's own arithmetic, in outcomes that are its ids.
    unsorted = teachers_id[short.tokens]
    order = unsorted.argsort(-1)
    tail = short.log_probabilities[:, k:]
    said = torch.cat([short.log_probabilities[:, :k].gather(-1, order), tail], -1)
    ids = np.arange(TOKENS, dtype=np.int32)
    told = mapped(Alignment("leading", ids, teachers_id.numpy()), unsorted.gather(-1, order).numpy(), said.numpy())
    found = mapped_distillation(
        student,
        torch.from_numpy(told.outcomes).long(),
        torch.from_numpy(told.log_probabilities),
        5,
        student_outcomes=teachers_id,
        **settings,
    )
    assert torch.equal(found, expected)
    assert torch.equal(gradient(found, student), gradient(expected, student))


@ALL
def test_probabilities_of_one_outcome_add_up(divergence: Divergence) -> None:
    # Ids 0 and 2 say outcome 5, with 1/8 + 3/8; the teacher gives it 1/4. Id 1 is "any other": 1/2 against 3/4.
    student = torch.tensor([[1 / 8, 1 / 2, 3 / 8]]).log()
    found = mapped_distillation(
        student,
        torch.tensor([[5]]),
        torch.tensor([[1 / 4, 3 / 4]]).log(),
        1,
        student_outcomes=torch.tensor([5, -1, 5]),
        temperature=1.0,
        divergence=divergence,
    )
    name = next(name for name, one in DIVERGENCES.items() if one is divergence)
    assert found.item() == pytest.approx(divergence_by_hand(name, [1 / 4, 3 / 4], [1 / 2, 1 / 2]), rel=1e-6)


@pytest.mark.parametrize("of_student", [None, MERGING, MERGING.where(MERGING != 2, -1)], ids=["own", "merged", "lost"])
@pytest.mark.parametrize("scale", [1, 100, 10_000])
def test_both_sides_of_a_divergence_are_distributions(of_student: Tensor | None, scale: int) -> None:
    def both_sum_to_one(student: Tensor, teacher: Tensor) -> Tensor:
        for side in (student, teacher):
            assert len(side) == ROWS
            torch.testing.assert_close(side.logsumexp(-1), torch.zeros(ROWS), rtol=0, atol=1e-6)
        return student.sum()

    settings: dict[str, Any] = {"temperature": 2.0, "divergence": both_sum_to_one}
    found = mapped_distillation(scale * logits(), TOLD, taught(), 5, student_outcomes=of_student, **settings)
    assert bool(found.isfinite())


def test_what_a_student_gives_to_outcomes_sums_to_one_however_unlikely_they_are() -> None:
    groups = MERGING.where(MERGING >= 0, 8)
    for scale in (1, 100, 10_000):
        whole = torch.log_softmax(scale * logits(), -1)
        merged = cross_tokenizer_losses._log_sums(whole, groups, 9)
        torch.testing.assert_close(merged.logsumexp(-1), torch.zeros(ROWS), rtol=0, atol=1e-6)
        # Each of its own size: no outcome is lost below what is beside it.
        expected = [[float(row[groups == outcome].logsumexp(-1)) for outcome in (0, 2, 4, 7, 8)] for row in whole]
        torch.testing.assert_close(merged[:, [0, 2, 4, 7, 8]], torch.tensor(expected), rtol=1e-6, atol=1e-6)
        assert bool(merged[:, [1, 3, 5, 6]].isneginf().all())


@ALL
def test_an_outcome_that_no_token_of_the_student_has_counts_as_any_other(divergence: Divergence) -> None:
    settings = {"student_outcomes": MERGING, "temperature": 1.0, "divergence": divergence}
    with_it = mapped_distillation(
        logits(1), torch.tensor([[0, 3, 99]]), torch.tensor([[0.2, 0.3, 0.1, 0.4]]).log(), 1, **settings
    )
    without = mapped_distillation(logits(1), torch.tensor([[0]]), torch.tensor([[0.2, 0.8]]).log(), 1, **settings)
    assert with_it.item() == pytest.approx(without.item(), rel=1e-6)


@ALL
@pytest.mark.parametrize("of_student", [None, MERGING], ids=["own ids", "merged"])
def test_over_outcomes_the_gradient_is_that_of_finite_differences(
    divergence: Divergence, of_student: Tensor | None
) -> None:
    teacher, shares = taught().double(), torch.tensor([1.0, 0.5, 0.25, 0.0, 1.0], dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return mapped_distillation(
            z, TOLD, teacher, 3, student_outcomes=of_student, temperature=2.0, divergence=divergence, weights=shares
        )

    assert torch.autograd.gradcheck(loss, [logits().double().requires_grad_()])


@ALL
def test_a_zero_on_one_side_leaves_value_and_gradient_finite(divergence: Divergence) -> None:
    student = logits(1, 3).requires_grad_()
    settings: dict[str, Any] = {"temperature": 1.0, "divergence": divergence}
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])  # of a told outcome and of "any other" nothing
    nothing_else = torch.tensor([[0.2, 0.3, 0.1, 0.4]]).log()  # a student that cannot say "any other"
    cases = (([0, 2], certain, [0, 1, 2]), ([0, 1, 2], nothing_else, [0, 1, 2]), ([0, 1, 2], nothing_else, [0, 2, 2]))
    for row, teacher, of_student in cases:
        outcomes = torch.tensor([row])
        found = mapped_distillation(
            student, outcomes, teacher, 1, student_outcomes=torch.tensor(of_student), **settings
        )
        name = next(name for name, one in DIVERGENCES.items() if one is divergence)
        expected = mapped_by_hand(name, student.detach(), outcomes, teacher, of_student, 1.0)
        assert found.item() == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
        assert bool(gradient(found, student).isfinite().all())


def test_in_reverse_a_student_leaves_what_the_teacher_gives_nothing() -> None:
    student = torch.zeros(1, 3).requires_grad_()
    settings: dict[str, Any] = {"temperature": 1.0, "divergence": reverse_kl}
    found = mapped_distillation(student, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5, 0.0]]).log(), 1, **settings)
    # 2/3 log (1/3)/(1/2) + 1/3 (log 1/3 - FLOOR)
    assert found.item() == pytest.approx(2 / 3 * math.log(2 / 3) + (math.log(1 / 3) - FLOOR) / 3, rel=1e-6)
    assert gradient(found, student)[0, 2] > 0


@pytest.mark.parametrize("of_student", [None, torch.tensor([4, 0, -1, 3, 1, 2, 7, 8, 6])], ids=["own ids", "others"])
def test_a_teacher_sure_of_the_answer_pulls_as_cross_entropy_does(of_student: Tensor | None) -> None:
    # The one-hot of what was just read, beside what comes next, would teach a student to repeat itself.
    answers, read = torch.tensor([1, 3, 4, 8, 0]), torch.tensor([0, 1, 3, 4, 8])
    outcomes = answers[:, None] if of_student is None else of_student[answers][:, None]
    student, sure = logits().requires_grad_(), torch.tensor([[0.0, -math.inf]]).expand(ROWS, 2)
    found = mapped_distillation(
        student, outcomes, sure, 5, student_outcomes=of_student, temperature=1.0, divergence=forward_kl
    )
    expected = cross_entropy(student, answers, 5)
    torch.testing.assert_close(found, expected)
    pull = gradient(found, student)
    torch.testing.assert_close(pull, gradient(expected, student))
    assert bool((pull.gather(-1, read[:, None]) > 0).all())


@ALL
def test_a_merged_outcome_pulls_its_tokens_and_pushes_every_other(divergence: Divergence) -> None:
    student = logits().requires_grad_()
    sure = torch.tensor([[math.log1p(-1e-6), math.log(1e-6)]]).expand(ROWS, 2)
    outcomes = torch.full((ROWS, 1), 2)
    found = mapped_distillation(
        student, outcomes, sure, 5, student_outcomes=MERGING, temperature=1.0, divergence=divergence
    )
    pull = gradient(found, student)
    assert bool((pull[:, MERGING == 2] < 0).all())
    assert bool((pull[:, MERGING != 2] > 0).all())


@ALL
@pytest.mark.parametrize("nothing", ["no rows", "weights", "outcomes", "confidence"])
def test_no_teaching_gives_no_loss_and_no_gradient(divergence: Divergence, nothing: str) -> None:
    student = logits(0 if nothing == "no rows" else ROWS).requires_grad_()
    outcomes, teacher = TOLD[: len(student)], taught()[: len(student)]
    settings: dict[str, Any] = {"temperature": 2.0, "divergence": divergence}
    if nothing == "weights":
        settings["weights"] = torch.zeros(ROWS)
    if nothing == "outcomes":
        outcomes, teacher = torch.full_like(TOLD, -1), taught(torch.full_like(TOLD, -1))
    if nothing == "confidence":
        settings |= {"min_confidence": 0.5, "confidence": torch.full((ROWS,), 0.4)}
    for of_student in (None, MERGING):
        found = mapped_distillation(student, outcomes, teacher, 5, student_outcomes=of_student, **settings)
        assert found.item() == 0
        assert torch.equal(gradient(found, student), torch.zeros_like(student))


@NAMES
def test_a_weight_is_the_share_of_its_position(name: Any) -> None:
    shares, settings = (
        torch.tensor([1.0, 0.5, 1 / 3, 0.0, 0.125]),
        {"temperature": 2.0, "divergence": DIVERGENCES[name]},
    )
    by_hand = mapped_by_hand(name, logits(), TOLD, taught(), MERGING.tolist(), 2.0)
    found = mapped_distillation(logits(), TOLD, taught(), 1, student_outcomes=MERGING, weights=shares, **settings)
    assert found.item() == pytest.approx(float(np.dot(shares, by_hand)), rel=1e-5)
    plain, ones = (
        mapped_distillation(logits(), TOLD, taught(), 1, weights=w, **settings) for w in (None, torch.ones(ROWS))
    )
    assert torch.equal(plain, ones)


@ALL
def test_over_outcomes_micro_batches_add_up_to_the_whole_step(divergence: Divergence) -> None:
    settings: dict[str, Any] = {"student_outcomes": MERGING, "temperature": 2.0, "divergence": divergence}
    whole = mapped_distillation(logits(), TOLD, taught(), 5, **settings)
    parts = [
        mapped_distillation(logits()[rows], TOLD[rows], taught()[rows], 5, **settings).item()
        for rows in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-6)


@ALL
def test_how_many_rows_are_merged_at_once_changes_nothing(
    divergence: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, settings = logits().requires_grad_(), {"temperature": 2.0, "divergence": divergence}
    found = []
    for at_once in (1, 2 * TOKENS, 2**20):
        monkeypatch.setattr(losses, "AT_ONCE", at_once)
        loss = mapped_distillation(student, TOLD, taught(), 5, student_outcomes=MERGING, **settings)
        found.append(torch.cat([loss.reshape(1), gradient(loss, student).flatten()]))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@ALL
@pytest.mark.parametrize("of_student", [None, MERGING], ids=["own ids", "merged"])
def test_extreme_logits_in_bfloat16_stay_finite(divergence: Divergence, of_student: Tensor | None) -> None:
    extreme = torch.tensor([1e4, -1e4, 0.0]).repeat(3)
    student = (
        torch.stack([extreme, -extreme, extreme.roll(1), -extreme.roll(1), 0 * extreme]).bfloat16().requires_grad_()
    )
    for teacher in (taught(), taught(seed=3), F.pad(torch.full((ROWS, 3), -math.inf), (0, 1))):
        found = mapped_distillation(
            student, TOLD, teacher, 5, student_outcomes=of_student, temperature=1.0, divergence=divergence
        )
        assert found.dtype == torch.float32
        assert bool(found.isfinite())
        assert bool(gradient(found, student).isfinite().all())


def test_a_least_confidence_needs_the_teacher_s() -> None:
    with pytest.raises(ValueError, match="without the teacher's confidence"):
        mapped_distillation(logits(), TOLD, taught(), 5, temperature=1.0, divergence=forward_kl, min_confidence=0.5)


# --- likelihoods of spans

TARGETS = torch.tensor([3, 0, 8, 2, 7, 5, 1])
SPANS = torch.tensor([0, 0, 1, -1, 2, 2, 2])
LIKELIHOODS = torch.tensor([-5.0, -0.4, -9.0], dtype=torch.float64)


def likely() -> Tensor:
    """Logits of seven answers, whose targets are likely ones."""
    return logits(7) + 4 * F.one_hot(TARGETS, TOKENS)


def spans_by_hand(student: Tensor, targets: Tensor, spans: Tensor) -> dict[int, float]:
    """The probability of each span, the product of those of its tokens, in float64."""
    found: dict[int, float] = {}
    for z, target, span in zip(student.double().numpy(), targets.tolist(), spans.tolist(), strict=True):
        if span >= 0:
            found[span] = found.get(span, 1.0) * float(softmax(z)[target])
    return found


@NAMES
@pytest.mark.parametrize("temperature", [1.0, 3.0, 100.0])
def test_of_spans_the_divergence_is_the_paper_s_in_probabilities(name: Any, temperature: float) -> None:
    shares = [1.0, 0.5, 0.25]
    by_hand = 0.0
    for span, q in spans_by_hand(likely(), TARGETS, SPANS).items():
        p, q = float(LIKELIHOODS[span].exp()) ** (1 / temperature), q ** (1 / temperature)
        by_hand += shares[span] * divergence_by_hand(name, [p, 1 - p], [q, 1 - q]) * temperature
    found = span_distillation(
        likely(), TARGETS, SPANS, LIKELIHOODS, 6,
        temperature=temperature, divergence=DIVERGENCES[name], weights=torch.tensor(shares),
    )  # fmt: skip
    assert found.item() == pytest.approx(by_hand / 6, rel=1e-4)


def test_forward_the_divergence_of_spans_tends_to_its_limit_as_the_temperature_grows() -> None:
    student = span_likelihoods(likely(), TARGETS, SPANS, 3).double()
    limit = (LIKELIHOODS - student - LIKELIHOODS * (LIKELIHOODS / student).log()).sum()
    off = []
    for temperature in (10.0, 100.0, 1000.0):
        found = span_distillation(
            likely().double(), TARGETS, SPANS, LIKELIHOODS, 1, temperature=temperature, divergence=forward_kl
        )
        off.append(abs(float(found - limit)))
    assert off == sorted(off, reverse=True)
    assert off[-1] < 0.01 * float(limit)


def test_the_likelihood_of_a_span_is_the_product_of_those_of_its_tokens() -> None:
    expected = spans_by_hand(likely(), TARGETS, SPANS)
    found = span_likelihoods(likely(), TARGETS, SPANS, 4)
    assert found.exp().tolist() == pytest.approx([expected[0], expected[1], expected[2], 1.0], rel=1e-5)


@ALL
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_a_student_that_gives_each_span_what_the_teacher_does_is_left_alone(
    divergence: Divergence, temperature: float
) -> None:
    student = likely().requires_grad_()
    teacher = span_likelihoods(student.detach(), TARGETS, SPANS, 3).double()
    settings: dict[str, Any] = {"temperature": temperature, "divergence": divergence}
    found = span_distillation(student, TARGETS, SPANS, teacher, 1, **settings)
    assert abs(found.item()) < 1e-6
    assert gradient(found, student).abs().max() < 2e-6
    other = span_distillation(student, TARGETS, SPANS, teacher - 1, 1, **settings)
    assert gradient(other, student).abs().max() > 0.01


@ALL
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_of_spans_the_gradient_is_that_of_finite_differences(divergence: Divergence, temperature: float) -> None:
    def loss(z: Tensor) -> Tensor:
        settings: dict[str, Any] = {"temperature": temperature, "divergence": divergence}
        return span_distillation(z, TARGETS, SPANS, LIKELIHOODS, 3, weights=torch.tensor([1.0, 0.5, 2.0]), **settings)

    assert torch.autograd.gradcheck(loss, [likely().double().requires_grad_()])


def test_a_teacher_sure_of_a_span_pulls_as_cross_entropy_does() -> None:
    student, targets = likely().requires_grad_(), TARGETS.where(SPANS >= 0, -100)
    found = span_distillation(student, TARGETS, SPANS, torch.zeros(3), 7, temperature=1.0, divergence=forward_kl)
    expected = cross_entropy(student, targets, 7)
    torch.testing.assert_close(found, expected)
    pull = gradient(found, student)
    torch.testing.assert_close(pull, gradient(expected, student))
    read = TARGETS.roll(1)[:, None]
    assert bool((pull.gather(-1, read)[SPANS >= 0] > 0).all())


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("gap", [14.0, 17.0, 40.0, 80.0, 500.0, 20_000.0])
def test_a_student_far_too_sure_of_a_span_is_pulled_back_however_sure(temperature: float, gap: float) -> None:
    # With u the log-odds of q and a = p^(1/tau) of the teacher, b = q^(1/tau): d(tau D)/du = (b - a) (1 - q)/(1 - b).
    # As q nears 1, 1 - b nears (1 - q)/tau: a pull of tau (1 - a), whatever the gap.
    student = torch.tensor([[gap, 0.0]]).requires_grad_()
    found = span_distillation(
        student, torch.tensor([0]), torch.tensor([0]), torch.tensor([-0.7]), 1,
        temperature=temperature, divergence=forward_kl,
    )  # fmt: skip
    a = math.exp(-0.7 / temperature)
    distance = a * math.log(a) + (1 - a) * (math.log(1 - a) + gap + math.log(temperature))
    assert found.item() == pytest.approx(temperature * distance, rel=1e-4)
    expected = temperature * (1 - a)
    assert gradient(found, student)[0].tolist() == pytest.approx([expected, -expected], rel=1e-4)


@ALL
def test_extreme_likelihoods_stay_finite(divergence: Divergence) -> None:
    extreme = torch.tensor([1e4, -1e4, 0.0]).repeat(3)
    student = torch.stack([extreme, -extreme, 0 * extreme, extreme, -extreme, extreme.roll(1), extreme]).bfloat16()
    student.requires_grad_()
    for teacher, temperature in itertools.product((0.0, -1e-30, -1e-7, -0.5, -50.0, -1e5), (1.0, 100.0)):
        found = span_distillation(
            student, TARGETS, SPANS, torch.full((3,), teacher), 5, temperature=temperature, divergence=divergence
        )
        assert found.dtype == torch.float32
        assert bool(found.isfinite())
        assert bool(gradient(found, student).isfinite().all())


@ALL
@pytest.mark.parametrize("nothing", ["no rows", "no spans", "weights"])
def test_no_span_to_learn_from_gives_no_loss_and_no_gradient(divergence: Divergence, nothing: str) -> None:
    student = logits(0 if nothing == "no rows" else 7).requires_grad_()
    spans = torch.full_like(SPANS, -1) if nothing == "no spans" else SPANS[: len(student)]
    weights = torch.zeros(3) if nothing == "weights" else None
    targets = torch.full_like(TARGETS, -100) if nothing == "no spans" else TARGETS[: len(student)]
    settings: dict[str, Any] = {"temperature": 1.0, "divergence": divergence, "weights": weights}
    found = span_distillation(student, targets, spans, LIKELIHOODS, 5, **settings)
    assert found.item() == 0
    assert torch.equal(gradient(found, student), torch.zeros_like(student))


@ALL
def test_of_spans_micro_batches_add_up_to_the_whole_step(divergence: Divergence) -> None:
    def loss(rows: slice) -> float:
        settings: dict[str, Any] = {"temperature": 100.0, "divergence": divergence}
        return span_distillation(likely()[rows], TARGETS[rows], SPANS[rows], LIKELIHOODS, 7, **settings).item()

    assert loss(slice(0, 2)) + loss(slice(2, 4)) + loss(slice(4, 7)) == pytest.approx(loss(slice(0, 7)), rel=1e-5)


# --- sorted distributions


def sorted_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """ULD of two whole vocabularies, the shorter filled up with zeros, by sorting in numpy and float64."""
    p, q = (np.stack([softmax(z / temperature) for z in x.double().numpy()]) for x in (teacher, student))
    width = max(p.shape[1], q.shape[1])
    p, q = (-np.sort(-np.pad(x, ((0, 0), (0, width - x.shape[1])))) for x in (p, q))
    return float(np.abs(p - q).sum())


def in_short(teacher: Tensor, k: int, temperature: float) -> Tensor:
    told = top_k(teacher, k, temperature=temperature).log_probabilities
    return F.pad(told, (0, k + 1 - told.shape[-1]), value=-math.inf)


@TEMPERATURES
@pytest.mark.parametrize(("of_student", "of_teacher", "k"), [(9, 9, 9), (9, 6, 6), (6, 9, 9), (6, 9, 6), (6, 9, 7)])
def test_sorted_it_is_that_of_the_whole_once_k_reaches_the_smaller_vocabulary(
    temperature: float, of_student: int, of_teacher: int, k: int
) -> None:
    student, teacher = logits(5, of_student, 1), logits(5, of_teacher, 2)
    found = sorted_distillation(student, in_short(teacher, k, temperature), 5, temperature=temperature)
    assert found.item() == pytest.approx(sorted_by_hand(student, teacher, temperature) * temperature / 5, rel=1e-5)


def test_sorted_it_is_never_more_than_that_of_the_whole_and_rises_with_k() -> None:
    for seed in range(20):
        student, teacher = logits(5, 9, seed), logits(5, 12, seed + 100)
        found = [
            sorted_distillation(student, in_short(teacher, k, 1.0), 1, temperature=1.0).item() for k in range(1, 12)
        ]
        for fewer, more in itertools.pairwise([*found, sorted_by_hand(student, teacher, 1.0)]):
            assert fewer <= more + 1e-5


def test_sorted_the_tail_is_one_number_on_both_sides() -> None:
    # Sorted, the teacher has 1/2 and the rest 1/2; the student 5/8, and 3/8: 1/8 + 1/8. Absent ones are nothing.
    student = torch.tensor([[1 / 8, 1 / 4, 5 / 8]]).log()
    for teacher in ([[0.5, 0.5]], [[0.0, 0.5, 0.5]]):
        found = sorted_distillation(student, torch.tensor(teacher).log(), 1, temperature=1.0)
        # With an absent outcome the student's second, 1/4, stands against 0, and its rest, 1/8, against 1/2.
        expected = 1 / 8 + 1 / 8 if len(teacher[0]) == 2 else 1 / 8 + 1 / 4 + 3 / 8
        assert found.item() == pytest.approx(expected)


def test_sorted_the_gradient_is_that_of_finite_differences() -> None:
    teacher, shares = in_short(logits(5, 12, 2), 4, 2.0).double(), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])

    def loss(z: Tensor) -> Tensor:
        return sorted_distillation(z, teacher, 3, temperature=2.0, weights=shares)

    assert torch.autograd.gradcheck(loss, [logits().double().requires_grad_()])


def test_sorted_a_high_temperature_keeps_the_size_of_the_gradient() -> None:
    # p nears (1 + (z - mean)/tau)/V: the distance falls as 1/tau.
    sizes = []
    for temperature in (1e2, 1e3):
        student = logits(seed=1).double().requires_grad_()
        teacher = torch.log_softmax(logits(seed=2).double() / temperature, -1)
        loss = sorted_distillation(student, F.pad(teacher, (0, 1), value=-math.inf), 5, temperature=temperature)
        sizes.append(float(gradient(loss, student).norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert sizes[1] > 0.01


def test_sorted_two_that_are_as_sure_are_no_distance_apart_whatever_they_say() -> None:
    student = logits().requires_grad_()
    same = in_short(student.detach().flip(-1), TOKENS, 1.0)
    found = sorted_distillation(student, same, 5, temperature=1.0)
    assert found.item() < 1e-6


def test_sorted_a_student_sure_of_a_wrong_token_is_made_surer_of_it() -> None:
    # The limit of the method, not a wish: it does not know what the teacher is sure of.
    student = torch.tensor([[2.0, 1.0, 0.0]]).requires_grad_()
    loss = sorted_distillation(student, torch.tensor([[0.0, -math.inf]]), 1, temperature=1.0)
    pull = gradient(loss, student)
    assert pull[0, 0] < 0 < pull[0, 1]


@pytest.mark.parametrize("nothing", ["no rows", "weights"])
def test_sorted_no_teaching_gives_no_loss_and_no_gradient(nothing: str) -> None:
    student = logits(0 if nothing == "no rows" else ROWS).requires_grad_()
    teacher = in_short(logits(seed=2), 4, 1.0)[: len(student)]
    found = sorted_distillation(student, teacher, 5, temperature=1.0, weights=torch.zeros(len(student)))
    assert found.item() == 0
    assert torch.equal(gradient(found, student), torch.zeros_like(student))


def test_sorted_micro_batches_add_up_and_extreme_logits_stay_finite() -> None:
    extreme = torch.tensor([1e4, -1e4, 0.0]).repeat(3)
    student = (
        torch.stack([extreme, -extreme, extreme.roll(1), -extreme.roll(1), 0 * extreme]).bfloat16().requires_grad_()
    )
    teacher = in_short(logits(seed=2), 4, 1.0)
    whole = sorted_distillation(student, teacher, 5, temperature=1.0)
    parts = sum(sorted_distillation(student[rows], teacher[rows], 5, temperature=1.0) for rows in ([0, 1], [2, 3, 4]))
    torch.testing.assert_close(whole, parts)
    assert whole.dtype == torch.float32
    assert bool(gradient(whole, student).isfinite().all())
