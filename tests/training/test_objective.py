"""objective: Eq. 3 and Eq. 6 over one or two models; which loss moves which model, and by how much."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from builders import examples, tuned
from stages.data.examples import Example
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers
from stages.training.objective import LOSS_SAMPLE, Objective, Tokens, mutual_losses, task_loss
from stages.training.schedule import MicroBatches
from stages.workspace.budgets import Distillation

ROLES = pytest.mark.parametrize("role", ["slm", "llm"])
ROWS = examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6), (4, 3), (7, 2)])
ANSWERS = sum(row.answer_tokens for row in ROWS)
TOKENS = Tokens.of(ROWS)
WEIGHTS = {"slm_ft": 1.0, "slm_kd": 1.0, "llm_ft": 1.0, "llm_kd": 1.0, "slm_taught": 0.0, "llm_taught": 0.0}


@pytest.fixture
def pair() -> tuple[Tuned, Tuned]:
    return tuned("slm", width=16), tuned("llm", width=32)


def mutual(pair: tuple[Tuned, Tuned], weights: dict[str, float] = WEIGHTS, **settings: Any) -> Objective:
    return Objective(pair, mutual_losses(Distillation(steps=1, **settings)), weights)


def gradients(objective: Objective, role: str) -> list[Tensor]:
    """The gradient of every adapter tensor of one model; zeros where there is none."""
    return [
        torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()
        for tensor in objective.adapter_parameters(role)
    ]


def size(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def logits_by_hand(one: Tuned, rows: list[Example]) -> Tensor:
    """Logits before each answer token, one row at a time, without any batching of ours."""
    return torch.cat(
        [one.model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_tokens - 1 : -1] for row in rows]
    )


def answers(rows: list[Example]) -> Tensor:
    return torch.tensor([token for row in rows for token in row.input_ids[row.prompt_tokens :]])


def test_a_client_minimises_cross_entropy_alone(pair: tuple[Tuned, Tuned]) -> None:
    slm = pair[0]
    objective = Objective([slm], task_loss, {"slm_ft": 1.0})
    found = objective(**objective.collate(ROWS))["loss"]
    torch.testing.assert_close(found, F.cross_entropy(logits_by_hand(slm, ROWS), answers(ROWS)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("lambda_slm", "lambda_llm"), [(1.0, 1.0), (0.0, 0.0), (0.5, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_server_minimises_equation_six(
    pair: tuple[Tuned, Tuned], lambda_slm: float, lambda_llm: float, temperature: float
) -> None:
    objective = mutual(pair, WEIGHTS | {"slm_kd": lambda_slm, "llm_kd": lambda_llm}, temperature=temperature)
    found = objective(**objective.collate(ROWS))["loss"]
    g, f = (logits_by_hand(one, ROWS) for one in pair)
    p, q = (F.softmax(x / temperature, -1) for x in (f, g))
    kl_g = temperature**2 * (p * (p / q).log()).sum() / ANSWERS  # L_KD of the SLM: from f to g
    kl_f = temperature**2 * (q * (q / p).log()).sum() / ANSWERS  # and of the LLM: from g to f
    task = F.cross_entropy(g, answers(ROWS)) + F.cross_entropy(f, answers(ROWS))
    torch.testing.assert_close(found, task + lambda_slm * kl_g + lambda_llm * kl_f, rtol=1e-4, atol=1e-5)


@ROLES
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen-shannon"])
def test_the_gradient_of_kl_is_not_zero_and_reaches_exactly_one_model(
    pair: tuple[Tuned, Tuned], role: str, divergence: str
) -> None:
    objective = mutual(pair, divergence=divergence)
    objective.parts(objective.collate(ROWS), TOKENS)[f"{role}_kd"].backward()
    other = {"slm": "llm", "llm": "slm"}[role]
    assert size(gradients(objective, role)) > 1e-3
    assert all(tensor.grad is not None for tensor in objective.adapter_parameters(role))
    assert all(tensor.grad is None for tensor in objective.adapter_parameters(other))


def test_no_gradient_reaches_the_frozen_bases(pair: tuple[Tuned, Tuned]) -> None:
    objective = mutual(pair)
    objective(**objective.collate(ROWS))["loss"].backward()
    with_gradient = {name for name, tensor in objective.named_parameters() if tensor.grad is not None}
    assert with_gradient == {name for name, _ in objective.named_parameters() if "lora_" in name}


@ROLES
def test_in_its_turn_a_model_gets_the_gradient_of_the_simultaneous_order_and_the_other_none(
    pair: tuple[Tuned, Tuned], role: str
) -> None:
    objective = mutual(pair)
    batch = objective.collate(ROWS)
    objective(**batch)["loss"].backward()
    expected = gradients(objective, role)
    objective.zero_grad()
    objective(**batch, turn=role)["loss"].backward()
    torch.testing.assert_close(gradients(objective, role), expected)
    other = {"slm": "llm", "llm": "slm"}[role]
    assert all(tensor.grad is None for tensor in objective.adapter_parameters(other))


def test_with_lambda_zero_each_model_trains_as_if_alone(pair: tuple[Tuned, Tuned]) -> None:
    objective = mutual(pair, WEIGHTS | {"slm_kd": 0.0, "llm_kd": 0.0})
    objective(**objective.collate(ROWS))["loss"].backward()
    together = gradients(objective, "slm")
    objective.zero_grad()
    alone = Objective(pair[:1], task_loss, {"slm_ft": 1.0})
    alone(**alone.collate(ROWS))["loss"].backward()
    torch.testing.assert_close(together, gradients(alone, "slm"))


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_a_step_in_micro_batches_has_the_gradient_of_the_whole(pair: tuple[Tuned, Tuned], rows: int) -> None:
    objective, step = mutual(pair), list(range(len(ROWS)))
    objective(**objective.collate(ROWS))["loss"].backward()
    whole = {role: gradients(objective, role) for role in ("slm", "llm")}
    losses = objective.pop_losses()
    objective.zero_grad()
    micro = MicroBatches([step], ROWS, rows, objective, alternating=False)
    items = [micro[i] for i in range(len(micro))]
    assert len(items) == micro.per_step > 1
    for item in items:  # unequal answers: a mean of means would be another number
        objective(**item)["loss"].backward()
    for role, expected in whole.items():
        torch.testing.assert_close(gradients(objective, role), expected, rtol=1e-4, atol=1e-6)
    assert objective.pop_losses() == pytest.approx(losses, rel=1e-5)
    assert objective.pop_losses() == {}


def test_an_llm_with_padded_vocabulary_rows_teaches_and_learns_as_one_without(pair: tuple[Tuned, Tuned]) -> None:
    slm, llm = pair
    objective = mutual(pair)
    expected = {name: loss.item() for name, loss in objective.parts(objective.collate(ROWS), TOKENS).items()}
    llm.model.get_base_model().resize_token_embeddings(40 + 24, mean_resizing=False)
    wide = mutual((slm, llm)).parts(objective.collate(ROWS), TOKENS)
    for name in ("slm_ft", "slm_kd", "llm_kd"):
        assert wide[name].item() == pytest.approx(expected[name], rel=1e-5)
    assert wide["llm_ft"].item() > expected["llm_ft"]  # the model's own loss counts all that it believes possible


def test_bfloat16_autocast_leaves_adapters_and_losses_in_float32(pair: tuple[Tuned, Tuned]) -> None:
    exact = mutual(pair)
    cast = mutual(tuple(Tuned(**(vars(one) | {"autocast": True})) for one in pair))  # type: ignore[arg-type]
    parts = {
        name: (exact.parts(exact.collate(ROWS), TOKENS)[name], loss)
        for name, loss in cast.parts(cast.collate(ROWS), TOKENS).items()
    }
    for expected, found in parts.values():
        assert found.dtype == torch.float32
        assert found.item() != expected.item()
        assert found.item() == pytest.approx(expected.item(), rel=0.05)
    sum(loss for _, loss in parts.values()).backward()  # type: ignore[union-attr]
    assert {grad.dtype for role in ("slm", "llm") for grad in gradients(cast, role)} == {torch.float32}


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_measured_loss_is_per_answer_token_however_it_is_batched(pair: tuple[Tuned, Tuned], rows: int) -> None:
    found = mutual(pair).measure(ROWS, rows)
    for one, name in zip(pair, ("slm_ft", "llm_ft"), strict=True):
        expected = F.cross_entropy(logits_by_hand(one, ROWS), answers(ROWS))
        assert found[name] == pytest.approx(expected.item(), rel=1e-4)


def test_measuring_is_without_dropout_and_leaves_the_mode_as_it_was() -> None:
    slm = tuned("slm", dropout=0.5)
    objective = Objective([slm], task_loss, {"slm_ft": 1.0}).train()
    torch.manual_seed(0)
    assert objective.measure(ROWS, 4) == objective.measure(ROWS, 4)
    assert objective.training
    batch = objective.collate(ROWS)
    assert objective.parts(batch, TOKENS)["slm_ft"].item() != objective.parts(batch, TOKENS)["slm_ft"].item()


@pytest.mark.parametrize("count", [LOSS_SAMPLE + 1, 2 * LOSS_SAMPLE - 1, 2 * LOSS_SAMPLE])
def test_the_loss_of_much_data_is_measured_on_an_even_sample_of_all_of_it(count: int) -> None:
    objective = Objective([tuned("slm", width=16)], task_loss, {"slm_ft": 1.0})
    losses = {token: objective.measure([Example([2, token], 1)], 1)["slm_ft"] for token in range(2, 40)}
    easy, hard = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    assert losses[hard] > losses[easy] + 1
    sorted_data = [Example([2, easy], 1)] * (count // 2) + [Example([2, hard], 1)] * (count - count // 2)
    found = objective.measure(sorted_data, 64)["slm_ft"]
    assert found == pytest.approx((losses[easy] + losses[hard]) / 2, rel=0.01)


def test_the_state_is_the_adapters_alone_and_comes_back_exactly(pair: tuple[Tuned, Tuned]) -> None:
    objective = mutual(pair)
    state = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    assert all("lora_" in name for name in state)
    assert sum(tensor.numel() for tensor in state.values()) == sum(
        tensor.numel() for tensor in itertools.chain(*map(objective.adapter_parameters, ("slm", "llm")))
    )
    with torch.no_grad():
        for tensor in objective.adapter_parameters("slm"):
            tensor.add_(1)
    objective.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in objective.state_dict().items())


def test_the_state_of_other_models_is_refused(pair: tuple[Tuned, Tuned]) -> None:
    with pytest.raises(BadNumbers, match="another model") as caught:
        mutual(pair).load_state_dict(Objective(pair[:1], task_loss, {"slm_ft": 1.0}).state_dict())
    assert "--overwrite" in str(caught.value.mend)


# --- unlabelled rows

UNLABELLED = [Example(row.input_ids, len(row.input_ids)) for row in examples([(4, 0), (8, 0), (1, 0)], seed=1)]
MIXED = [ROWS[0], UNLABELLED[0], ROWS[2], ROWS[4], UNLABELLED[1], UNLABELLED[2], ROWS[1]]


def distilled_by_hand(student: Tuned, teacher: Tuned, rows: list[Example]) -> Tensor:
    """KL(teacher || student) summed over the positions before each answer token, or at the end of the prompt."""
    found = torch.zeros(())
    for row in rows:
        kept = slice(row.prompt_tokens - 1, -1 if row.answer_tokens else None)
        z, t = (one.model(input_ids=torch.tensor([row.input_ids])).logits[0, kept] for one in (student, teacher))
        p = F.softmax(t, -1).detach()
        found = found + (p * (p.log() - F.log_softmax(z, -1))).sum()
    return found


def test_cross_entropy_is_over_labelled_tokens_and_distillation_over_unlabelled_positions_too(
    pair: tuple[Tuned, Tuned],
) -> None:
    labelled = [row for row in MIXED if row.answer_tokens]
    objective = mutual(pair)
    found = objective.parts(objective.collate(MIXED), Tokens.of(MIXED))
    assert Tokens.of(MIXED) == (13, 16)  # 2 + 4 + 6 + 1 answer tokens; three positions more
    for student, teacher in (pair, pair[::-1]):
        ft = F.cross_entropy(logits_by_hand(student, labelled), answers(labelled))
        kd = distilled_by_hand(student, teacher, MIXED) / 16
        torch.testing.assert_close(found[f"{student.role}_ft"], ft, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"{student.role}_kd"], kd, rtol=1e-4, atol=1e-5)


@ROLES
def test_without_any_label_a_model_learns_from_the_other_alone(pair: tuple[Tuned, Tuned], role: str) -> None:
    objective = mutual(pair)
    objective(**objective.collate(UNLABELLED))["loss"].backward()
    found, losses = gradients(objective, role), objective.pop_losses()
    assert (losses["slm_ft"], losses["llm_ft"]) == (0, 0)
    objective.zero_grad()
    student, teacher = pair if role == "slm" else pair[::-1]
    (distilled_by_hand(student, teacher, UNLABELLED) / 3).backward()
    assert size(found) > 1e-3
    torch.testing.assert_close(found, gradients(objective, role), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("step", [MIXED, UNLABELLED], ids=["mixed", "unlabelled"])
def test_a_step_with_unlabelled_rows_is_the_same_in_micro_batches(
    pair: tuple[Tuned, Tuned], rows: int, step: list[Example]
) -> None:
    # Some micro-batches have no label at all, others nothing else.
    objective = mutual(pair)
    objective(**objective.collate(step))["loss"].backward()
    expected = {role: gradients(objective, role) for role in ("slm", "llm")}
    losses = objective.pop_losses()
    objective.zero_grad()
    micro = MicroBatches([list(range(len(step)))], step, rows, objective, alternating=False)
    for i in range(len(micro)):
        objective(**micro[i])["loss"].backward()
    for role, gradient in expected.items():
        torch.testing.assert_close(gradients(objective, role), gradient, rtol=1e-4, atol=1e-6)
    assert objective.pop_losses() == pytest.approx(losses, rel=1e-5)
    assert objective.measure(step, rows) == pytest.approx(losses, rel=1e-4)


@ROLES
def test_of_each_row_only_the_model_that_knows_it_better_teaches(pair: tuple[Tuned, Tuned], role: str) -> None:
    student, teacher = pair if role == "slm" else pair[::-1]
    labels = torch.tensor([token for row in ROWS for token in row.input_ids[row.prompt_tokens :]])
    owner = torch.tensor([i for i, row in enumerate(ROWS) for _ in range(row.answer_tokens)])
    logits = [logits_by_hand(one, ROWS).detach().double() for one in (teacher, student)]
    each = [-F.log_softmax(one, -1)[range(ANSWERS), labels] for one in logits]
    sums = [torch.stack([one[owner == i].sum() for i in range(len(ROWS))]) for one in each]
    taught = (sums[0] < sums[1])[owner]
    assert 0 < taught.sum() < ANSWERS
    p, q = (F.softmax(one, -1) for one in logits)
    expected = (p * (p / q).log()).sum(-1)[taught].sum() / ANSWERS
    objective = mutual(pair, select="min-ce")
    for rows in (1, len(ROWS)):  # whichever rows come together
        parts = [objective.parts(objective.collate(ROWS[i : i + rows]), TOKENS) for i in range(0, len(ROWS), rows)]
        found = sum(float(one[f"{role}_kd"].detach()) for one in parts)
        assert found == pytest.approx(float(expected), rel=1e-4)
        assert sum(float(one[f"{role}_taught"]) for one in parts) == pytest.approx(float(taught.sum()) / ANSWERS)


def test_a_model_that_nobody_can_teach_learns_from_the_answers_alone_to_the_bit(pair: tuple[Tuned, Tuned]) -> None:
    twin = tuned("llm", width=16)
    twin.model.load_state_dict(pair[0].model.state_dict())
    for one in (pair[0], twin):
        one.model.train()
    found = []
    for weight in (1.0, 0.0):
        objective = mutual((pair[0], twin), WEIGHTS | {"slm_kd": weight, "llm_kd": weight}, select="min-ce")
        objective.zero_grad()
        objective(**objective.collate(ROWS))["loss"].backward()
        assert float(objective.last["slm_taught"]) == float(objective.last["llm_taught"]) == 0
        found.append(gradients(objective, "slm"))
    assert size(found[0]) > 0
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@ROLES
def test_confidence_is_each_teachers_own(pair: tuple[Tuned, Tuned], role: str) -> None:
    student, teacher = pair if role == "slm" else pair[::-1]
    sureness = F.softmax(logits_by_hand(teacher, ROWS), -1).amax(-1)
    threshold = float(sureness.detach().median()) + 1e-4
    p, q = (F.softmax(logits_by_hand(one, ROWS), -1) for one in (teacher, student))
    expected = (p * (p / q).log()).sum(-1)[sureness >= threshold].sum() / ANSWERS
    objective = mutual(pair, min_confidence=threshold)
    found = objective.parts(objective.collate(ROWS), TOKENS)[f"{role}_kd"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
