"""mutual: Eq. 4 to 6 for two models at once: against arithmetic, and as they are written down, value and gradient."""

from __future__ import annotations

import math
from typing import Any

import plain_losses
import pytest
import torch
from plain_losses import KL_P_Q, TEMPERATURES, P, Q, R, logits
from torch import Tensor
from torch.nn import functional as F

from stages.data.examples import NO_LABEL
from stages.models.packing import ROWS
from stages.training import losses
from stages.training.losses import DIVERGENCES, cross_entropy
from stages.training.mutual import WITH_GRADIENT, mutual
from stages.training.objective import Tokens, mutual_losses
from stages.workspace.budgets import Distillation

ALL = pytest.mark.parametrize("divergence", DIVERGENCES)


def distillation(student: Tensor, teacher: Tensor, tokens: int, **settings: Any) -> Tensor:
    """L_KD of a model from another one's logits, Eq. 5, at answers without a label."""
    labels = torch.full((len(student),), NO_LABEL)
    found = mutual_losses(Distillation(steps=1, **settings))(
        {"slm": student, "llm": teacher}, labels, Tokens(1, tokens)
    )
    return found["slm_kd"]


def kl_by_hand(p: Tensor, q: Tensor) -> Tensor:
    """The definition, sum over everything of p log(p/q), from softmaxes of logits, in float64."""
    p, q = (torch.exp(x.double()) / torch.exp(x.double()).sum(-1, keepdim=True) for x in (p, q))
    return (p * torch.log(p / q)).sum()


def test_kl_is_what_the_definition_says_in_both_directions() -> None:
    p, q = torch.tensor([P]).log(), torch.tensor([Q]).log()
    for divergence in ("forward", "reverse"):
        assert distillation(q, p, 1, temperature=1.0, divergence=divergence).item() == pytest.approx(KL_P_Q, abs=1e-6)


def test_forward_weighs_by_the_teacher_and_reverse_by_the_student() -> None:
    # What the first gives no chance to costs nothing there: KL(R || P) = 1/2 log 1 + 1/2 log 2; KL(P || R) is infinite.
    r, p = torch.tensor([R]).log().clamp(min=-1e30), torch.tensor([P]).log()
    forward = distillation(p, r, 1, temperature=1.0, divergence="forward")
    reverse = distillation(r, p, 1, temperature=1.0, divergence="reverse")
    assert forward.item() == reverse.item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    assert distillation(r, p, 1, temperature=1.0, divergence="forward").item() > 1e6


@TEMPERATURES
def test_kl_is_torchs_of_softmaxes_by_hand(temperature: float) -> None:
    student, teacher = logits(seed=1), logits(seed=2)
    forward = distillation(student, teacher, 5, temperature=temperature, divergence="forward")
    reverse = distillation(student, teacher, 5, temperature=temperature, divergence="reverse")
    p, q = (F.softmax(x / temperature, -1) for x in (teacher, student))
    torch.testing.assert_close(forward, temperature**2 * F.kl_div(q.log(), p, reduction="batchmean"))
    torch.testing.assert_close(reverse, temperature**2 * F.kl_div(p.log(), q, reduction="batchmean"))
    by_hand = kl_by_hand(teacher / temperature, student / temperature) * temperature**2 / 5
    torch.testing.assert_close(forward.double(), by_hand, rtol=1e-5, atol=1e-6)


@ALL
@TEMPERATURES
def test_a_model_is_no_distance_from_itself(divergence: str, temperature: float) -> None:
    assert distillation(logits(), logits(), 5, temperature=temperature, divergence=divergence).item() == 0


@ALL
def test_kl_is_above_zero_for_two_models_that_differ(divergence: str) -> None:
    assert distillation(logits(seed=1), logits(seed=2), 5, temperature=1.0, divergence=divergence).item() > 0.1


@TEMPERATURES
def test_the_forward_gradient_is_tau_times_the_difference_of_the_probabilities(temperature: float) -> None:
    # d/dz of tau^2 sum p log(p/q), q = softmax(z/tau): tau^2 (1/tau) (q - p).
    student, teacher = logits(seed=1).requires_grad_(), logits(seed=2)
    distillation(student, teacher, 5, temperature=temperature, divergence="forward").backward()
    p, q = (F.softmax(x / temperature, -1) for x in (teacher, student.detach()))
    torch.testing.assert_close(student.grad, temperature * (q - p) / 5)


@TEMPERATURES
def test_the_reverse_gradient_is_tau_q_times_the_excess_of_log_q_over_p(temperature: float) -> None:
    # d/dz of tau^2 sum q log(q/p): tau q (log(q/p) - KL(q || p)), row by row.
    student, teacher = logits(seed=1).requires_grad_(), logits(seed=2)
    distillation(student, teacher, 5, temperature=temperature, divergence="reverse").backward()
    p, q = (F.softmax(x / temperature, -1) for x in (teacher, student.detach()))
    ratio = (q / p).log()
    expected = temperature * q * (ratio - (q * ratio).sum(-1, keepdim=True)) / 5
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_high_temperature_keeps_the_size_of_the_gradient() -> None:
    # tau (q - p) tends to (z_s - z_t)/V for logits of mean zero (Hinton et al., 2015), whatever tau.
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (logits(seed=1), logits(seed=2)))
    for temperature in (1e3, 2e3):
        leaf = student.clone().requires_grad_()
        distillation(leaf, teacher, 1, temperature=temperature, divergence="forward").backward()
        torch.testing.assert_close(leaf.grad, (student - teacher) / 7, rtol=0.02, atol=1e-3)


@ALL
def test_gradients_reach_the_student_and_never_the_teacher(divergence: str) -> None:
    student, teacher = logits(seed=1).requires_grad_(), logits(seed=2).requires_grad_()
    distillation(student, teacher, 5, temperature=2.0, divergence=divergence).backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0.01
    assert teacher.grad is None


@ALL
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_rows_of_the_vocabulary_that_only_one_model_has_count_for_nothing(divergence: str, padded: str) -> None:
    student, teacher = logits(seed=1).requires_grad_(), logits(seed=2)
    expected = distillation(student, teacher, 5, temperature=2.0, divergence=divergence)
    padding = torch.full((5, 3), 50.0).requires_grad_()
    long_student = torch.cat([student, padding], -1) if padded == "student" else student
    long_teacher = torch.cat([teacher, padding.detach()], -1) if padded == "teacher" else teacher
    found = distillation(long_student, long_teacher, 5, temperature=2.0, divergence=divergence)
    assert found.item() == expected.item()
    found.backward()
    assert padding.grad is None or padding.grad.abs().max() == 0


@ALL
def test_losses_of_micro_batches_add_up_to_that_of_the_whole_step(divergence: str) -> None:
    student, teacher, targets = logits(seed=1), logits(seed=2), torch.tensor([0, 6, 3, 3, 1])

    def both(rows: slice) -> tuple[float, float]:
        kl = distillation(student[rows], teacher[rows], 5, temperature=1.0, divergence=divergence)
        return kl.item(), cross_entropy(student[rows], targets[rows], 5).item()

    in_parts = torch.tensor([both(slice(0, 1)), both(slice(1, 5))]).sum(0)
    assert in_parts.tolist() == pytest.approx(both(slice(0, 5)), rel=1e-6)


def test_losses_of_bfloat16_logits_are_computed_in_float32() -> None:
    student, teacher = logits(seed=1).bfloat16(), logits(seed=2).bfloat16()
    found = distillation(student, teacher, 5, temperature=2.0, divergence="forward")
    assert found.dtype == torch.float32
    assert torch.equal(found, distillation(student.float(), teacher.float(), 5, temperature=2.0, divergence="forward"))
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert cross_entropy(student, targets, 5).item() == cross_entropy(student.float(), targets, 5).item()


# --- Jensen-Shannon


def jensen_shannon_by_hand(p: Tensor, q: Tensor) -> Tensor:
    """The definition in probabilities, in float64: 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q)/2."""
    p, q = (torch.exp(x.double()) / torch.exp(x.double()).sum(-1, keepdim=True) for x in (p, q))
    m = (p + q) / 2
    return ((p * torch.log(p / m)).sum() + (q * torch.log(q / m)).sum()) / 2


def test_jensen_shannon_of_two_simple_distributions_is_what_arithmetic_says() -> None:
    # m = (3/8, 1/4, 3/8): each half is 1/2 (1/2 log 4/3 + 1/4 log 1 + 1/4 log 2/3), and the halves are alike.
    found = distillation(
        torch.tensor([Q]).log(), torch.tensor([P]).log(), 1, temperature=1.0, divergence="jensen-shannon"
    )
    assert found.item() == pytest.approx(0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3), abs=1e-7)


@TEMPERATURES
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_jensen_shannon_is_the_definition_in_probabilities(temperature: float, scale: float) -> None:
    student, teacher = scale * logits(seed=1), scale * logits(seed=2)
    found = distillation(student, teacher, 5, temperature=temperature, divergence="jensen-shannon")
    expected = jensen_shannon_by_hand(teacher / temperature, student / temperature) * temperature**2 / 5
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_jensen_shannon_is_the_same_whoever_teaches() -> None:
    a, b = logits(seed=1), logits(seed=2)
    there, back = (distillation(x, y, 5, temperature=2.0, divergence="jensen-shannon") for x, y in ((a, b), (b, a)))
    torch.testing.assert_close(there, back, rtol=1e-6, atol=0)


def test_jensen_shannon_is_never_above_log_2_an_answer_and_reaches_it_for_opposites() -> None:
    certain = 100 * torch.eye(5, 7)
    opposite = distillation(certain, certain.roll(1, dims=1), 5, temperature=1.0, divergence="jensen-shannon")
    assert opposite.item() == pytest.approx(math.log(2))
    for seed in range(20):
        found = distillation(
            5 * logits(seed=seed), 5 * logits(seed=99), 5, temperature=1.0, divergence="jensen-shannon"
        )
        assert 0 < found.item() < math.log(2)


@ALL
def test_two_models_that_agree_leave_each_other_alone(divergence: str) -> None:
    student = logits().requires_grad_()
    distillation(student, logits(), 5, temperature=1.0, divergence=divergence).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


# --- confidence

SURE, UNSURE = [0.9, 0.05, 0.05], [0.4, 0.3, 0.3]


@ALL
def test_only_where_the_teacher_is_sure_does_it_teach_and_the_mean_is_over_all_tokens(divergence: str) -> None:
    teacher, student = torch.tensor([SURE, UNSURE, SURE]).log(), torch.tensor([P, SURE, Q]).log().requires_grad_()
    found = distillation(student, teacher, 3, temperature=2.0, divergence=divergence, min_confidence=0.8)
    found.backward()
    # The same two rows alone, and still over three tokens; whether the student is sure does not matter.
    kept = student.detach()[[0, 2]].requires_grad_()
    expected = distillation(kept, teacher[[0, 2]], 3, temperature=2.0, divergence=divergence)
    expected.backward()
    assert found.item() == expected.item()
    assert student.grad is not None
    assert kept.grad is not None
    assert torch.equal(student.grad[[0, 2]], kept.grad)
    assert student.grad[1].tolist() == [0, 0, 0]


@ALL
def test_where_no_token_is_sure_the_loss_and_its_gradient_are_zero(divergence: str) -> None:
    student = logits(seed=1).requires_grad_()
    found = distillation(student, logits(seed=2), 5, temperature=1.0, divergence=divergence, min_confidence=1.0)
    found.backward()
    assert found.item() == 0
    assert torch.equal(student.grad, torch.zeros(5, 7))


@TEMPERATURES
def test_confidence_is_that_of_temperature_one(temperature: float) -> None:
    # 0.4 at temperature 1; at 1/2 it would be 0.16/0.34 = 0.47, at 4 nearer to 1/3.
    student, teacher = torch.tensor([P]).log(), torch.tensor([UNSURE]).log()
    for min_confidence, acts in ((0.39, True), (0.41, False)):
        found = distillation(
            student, teacher, 1, temperature=temperature, divergence="forward", min_confidence=min_confidence
        )
        assert (found.item() > 0) == acts


def test_a_token_that_only_the_teacher_has_makes_it_no_less_sure() -> None:
    student, teacher = torch.tensor([P]).log(), torch.tensor([[*SURE, 50.0]]).log()
    found = distillation(student, teacher, 1, temperature=1.0, divergence="forward", min_confidence=0.89)
    assert found.item() > 0


# --- both models at once, against the losses as they are written down

LABELS = torch.tensor([0, 6, NO_LABEL, 3, 1])
OWNERS = torch.tensor([0, 0, 1, 2, 2])
"""The row of each answer."""
WEIGHTS = {"slm_ft": 1.0, "slm_kd": 0.5, "llm_ft": 0.25, "llm_kd": 2.0}
SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0},
        {"min_confidence": 0.6},
        {"temperature": 0.5, "min_confidence": 0.6},
        {"select": "min-ce"},
    ],
    ids=str,
)
WIDTHS = pytest.mark.parametrize("widths", [(7, 7), (7, 10), (9, 7)], ids=str)


def pair(widths: tuple[int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The logits of two models, as leaves."""
    return {
        role: logits(vocabulary=width, seed=seed).to(dtype).requires_grad_()
        for seed, (role, width) in enumerate(zip(("slm", "llm"), widths, strict=True), 1)
    }


def found_by(
    make: Any, leaves: dict[str, Tensor], turn: str = "", **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each named loss of Eq. 6, and the gradient of their weighted sum; of one model's alone with a turn."""
    computed = {role: z * 1 for role, z in leaves.items()}  # what a model has computed is no leaf
    parts = make(Distillation(steps=1, **settings))({**computed, ROWS: OWNERS}, LABELS, Tokens(4, 5))
    total = sum(weight * parts[name] for name, weight in WEIGHTS.items() if name.startswith(turn))
    wanted = {role: z for role, z in leaves.items() if role.startswith(turn)}
    gradients = torch.autograd.grad(total, list(wanted.values()))  # type: ignore[arg-type]
    return {name: part.detach() for name, part in parts.items()}, dict(zip(wanted, gradients, strict=True))


@ALL
@SETTINGS
@WIDTHS
def test_values_and_gradients_are_those_of_the_plain_losses(
    divergence: str, settings: dict[str, Any], widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, by_logits = found_by(plain_losses.mutual_losses, pair(widths), divergence=divergence, **settings)
    for at_once in (1, 2 * max(widths), 2**20):
        monkeypatch.setattr(losses, "AT_ONCE", at_once)
        found, gradients = found_by(mutual_losses, pair(widths), divergence=divergence, **settings)
        assert list(found) != []
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(gradients, by_logits, rtol=1e-5, atol=2e-7)


@ALL
@SETTINGS
@WIDTHS
def test_gradients_are_those_of_finite_differences(
    divergence: str, settings: dict[str, Any], widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "AT_ONCE", 2 * max(widths))
    leaves = pair(widths, torch.float64)
    make = mutual_losses(Distillation(steps=1, divergence=divergence, **settings))

    def total(of_slm: Tensor, of_llm: Tensor, slm: Tensor, llm: Tensor) -> Tensor:
        as_slm = make({"slm": slm, "llm": of_slm, ROWS: OWNERS}, LABELS, Tokens(4, 5))
        as_llm = make({"slm": of_llm, "llm": llm, ROWS: OWNERS}, LABELS, Tokens(4, 5))
        parts = {**as_llm, **{name: part for name, part in as_slm.items() if name.startswith("slm")}}
        return torch.stack([weight * parts[name] for name, weight in WEIGHTS.items()]).sum()

    slm, llm = leaves.values()
    fixed = llm.detach().clone(), slm.detach().clone()  # a teacher stays where it is while its student moves
    assert torch.autograd.gradcheck(lambda a, b: total(*fixed, a, b), [slm, llm])


def test_the_divergences_with_gradients_are_all_that_there_are() -> None:
    assert WITH_GRADIENT.keys() == DIVERGENCES.keys()


@ALL
def test_gradients_of_bfloat16_logits_are_rounded_once(divergence: str) -> None:
    leaves = pair((7, 7), torch.bfloat16)
    found, gradients = found_by(mutual_losses, leaves, divergence=divergence)
    exact = {role: z.detach().float().requires_grad_() for role, z in leaves.items()}
    expected, by_logits = found_by(plain_losses.mutual_losses, exact, divergence=divergence)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    for role, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), by_logits[role], rtol=2**-8, atol=1e-6)


@ALL
@pytest.mark.parametrize("turn", ["slm", "llm"])
def test_in_its_turn_only_one_model_s_gradient_is_computed(divergence: str, turn: str) -> None:
    asked: list[int] = []

    def counted(student: Any, teacher: Any) -> Tensor:
        asked.append(1)
        return WITH_GRADIENT[divergence].by_logits(student, teacher)

    leaves = pair((7, 7))
    _, expected = found_by(mutual_losses, leaves, divergence=divergence)
    _, found = found_by(mutual_losses, leaves, turn, divergence=divergence)
    assert torch.equal(found[turn], expected[turn])
    watched = WITH_GRADIENT[divergence]._replace(by_logits=counted)
    for student, teacher in ((leaves["slm"], leaves["llm"].detach()), (leaves["slm"].detach(), leaves["llm"])):
        each = mutual(student, teacher, LABELS, divergence=watched, temperature=1.0)
        torch.stack([one.divergence.sum() for one in each]).sum().backward()
        assert len(asked) == 1
        asked.clear()


def test_the_gradients_are_where_the_logits_were_and_a_leaf_stays_as_it_is() -> None:
    leaves, settings = pair((7, 10)), Distillation(steps=1)
    before = {role: z.detach().clone() for role, z in leaves.items()}
    computed = {role: z * 1 for role, z in leaves.items()}
    places = {role: z.data_ptr() for role, z in computed.items()}
    reached = {}
    for role, z in computed.items():
        z.register_hook(lambda gradient, role=role: reached.update({role: gradient.data_ptr()}))
    total = sum(mutual_losses(settings)(computed, LABELS, Tokens(4, 5)).values())
    total.backward(retain_graph=True)  # type: ignore[union-attr]
    assert reached == places
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # and never a wrong gradient
        total.backward()  # type: ignore[union-attr]
    first = {role: z.grad.clone() for role, z in leaves.items() if z.grad is not None}
    for z in leaves.values():
        z.grad = None
    sum(mutual_losses(settings)(leaves, LABELS, Tokens(4, 5)).values()).backward()  # type: ignore[union-attr]
    for role, z in leaves.items():
        assert torch.equal(z, before[role])
        assert z.grad is not None
        assert torch.equal(z.grad, first[role])


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("role", ["slm", "llm"])
def test_a_logit_that_is_no_number_makes_every_loss_that_it_takes_part_in_nan(
    divergence: str, bad: float, role: str
) -> None:
    leaves = {name: z.detach() for name, z in pair((7, 7)).items()}
    leaves[role][2, 4] = bad  # at an answer without a label
    found = mutual_losses(Distillation(steps=1, divergence=divergence))(leaves, LABELS, Tokens(4, 5))
    assert math.isnan(found["slm_kd"])
    assert math.isnan(found["llm_kd"])
    leaves[role][0, 4] = bad
    found = mutual_losses(Distillation(steps=1, divergence=divergence))(leaves, LABELS, Tokens(4, 5))
    assert math.isnan(found[f"{role}_ft"])


@ALL
def test_without_any_answer_all_losses_and_gradients_are_zero(divergence: str) -> None:
    leaves = {role: z.detach()[:0].requires_grad_() for role, z in pair((7, 7)).items()}
    found = mutual_losses(Distillation(steps=1, divergence=divergence))(leaves, LABELS[:0], Tokens(1, 1))
    assert [float(loss.detach()) for loss in found.values()] == [0, 0, 0, 0]
    sum(found.values()).backward()  # type: ignore[union-attr]
    assert all(z.grad is not None and z.grad.shape == (0, 7) for z in leaves.values())


@ALL
def test_infinite_logits_where_nobody_is_taught_reach_no_gradient(divergence: str) -> None:
    # As a model has them that rules a token out. The second row is known alike by both: nobody teaches it.
    leaves = pair((7, 7))
    with torch.no_grad():
        for z in leaves.values():
            z[2, 4] = -math.inf
    settings = {"divergence": divergence, "select": "min-ce"}
    expected, by_logits = found_by(plain_losses.mutual_losses, leaves, **settings)
    found, gradients = found_by(mutual_losses, leaves, **settings)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradients, by_logits, rtol=1e-5, atol=2e-7)
