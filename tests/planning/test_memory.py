"""memory: what a step on fake tensors takes is what the step itself takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from builders import Family, tuned
from stages.data.examples import Example
from stages.models import adapters, packing
from stages.models.held import held_in_bfloat16
from stages.models.shapes import Shape
from stages.models.tuned import Tuned
from stages.planning import memory
from stages.planning.estimates import beside_a_capture
from stages.training import losses as training_losses
from stages.training.adversarial import objective_of
from stages.training.losses import top_k
from stages.training.objective import Losses, Tokens, mutual_losses, task_loss
from stages.workspace.attacks import Adversarial
from stages.workspace.budgets import Distillation

CPU = torch.device("cpu")
ROWS, LENGTH, ANSWERS = 4, 32, 5
INDICES, MASK = 16 * ROWS * ANSWERS, ROWS * (ANSWERS + 1)
"""Answers are picked from the logits by two int64 indices each, where a real batch has one mask of a byte a place."""


def shape_of(one: Tuned) -> Shape:
    return Shape(one.model, 0, adapters.layout(one.model), None, "")


def loss_of(models: list[Tuned], losses: Losses, autocast: dict[str, bool]) -> tuple[Tensor, int]:
    """The stage's own loss on a padded batch of equal rows, and the bytes of the logits that it is made of."""
    batch = packing.padded([Example([3] * LENGTH, LENGTH - ANSWERS)] * ROWS)
    batch["attention_mask"] = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)  # as rows of unequal length get it
    logits = {}
    for one in models:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast[one.role]):
            logits[one.role] = packing.answer_logits(one.model, batch)
    parts = losses(logits, batch["labels"], Tokens(ROWS * ANSWERS, ROWS * ANSWERS))
    return torch.stack(list(parts.values())).sum(), sum(one.nbytes for one in logits.values())


def saved_by(models: list[Tuned], forward: Callable[[], tuple[Tensor, int]]) -> int:
    """Bytes that autograd holds after a real forward pass, parameters and buffers not counted."""
    tensors = [tensor for one in models for tensor in (*one.model.parameters(), *one.model.buffers())]
    own, found = {tensor.data_ptr() for tensor in tensors}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in found.values())


def measured_peak(work: Callable[[], object]) -> int:
    """The most bytes that torch had allocated at any moment of the work, beyond what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def planned(model: Tuned, *, autocast: bool = False, is_attacked: bool = False) -> memory.Step:
    """What is said of a step of one model."""
    return memory.training_step(
        {"slm": shape_of(model)},
        task_loss,
        rows=ROWS,
        length=LENGTH,
        answers=ANSWERS,
        device=CPU,
        autocast={"slm": autocast},
        is_attacked=is_attacked,
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_what_is_kept_is_what_a_real_model_keeps_and_the_sum_is_its_peak(family: Family, autocast: bool) -> None:
    model = tuned("slm", family=family, width=64, vocabulary=500)
    model.model.train()

    def work() -> tuple[Tensor, int]:
        return loss_of([model], task_loss, {"slm": autocast})

    step = planned(model, autocast=autocast)
    # Cross-entropy keeps float32 log-probabilities; the logits that they are made of live until it has.
    with held_in_bfloat16(replace(model, autocast=autocast)):
        work()[0].backward()  # lays weights out for the way back, which count as weights
        model.model.zero_grad()
        logits = work()[1]
        assert step.logits == logits + 4 * ROWS * ANSWERS * 500 + 8 * ROWS * ANSWERS + 4
        assert step.activations + step.logits == saved_by([model], work) + logits + INDICES - MASK
        gradients = 4 * adapters.count(model.model)
        total = step.activations + step.logits + step.transient + gradients
        peak = measured_peak(lambda: work()[0].backward())
    assert peak <= total <= 1.3 * peak
    assert step.activations > 0.5 * peak


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_under_attack_takes_what_is_said_however_many_passes_it_has(family: Family, steps: int) -> None:
    model = tuned("slm", family=family, width=64, vocabulary=500)
    objective = objective_of(model, Adversarial(radius=0.1, steps=steps)).train()
    batch = objective.collate([Example([3] * LENGTH, LENGTH - ANSWERS)] * ROWS)
    step = planned(model, is_attacked=True)
    total = step.activations + step.logits + step.transient + 2 * 4 * adapters.count(model.model)
    peak = measured_peak(lambda: objective(**batch)["loss"].backward())
    assert 0.9 * peak <= total <= 1.3 * peak


def test_layers_that_training_may_leave_out_are_counted() -> None:
    model = tuned("slm", family="opt", width=64, vocabulary=500)
    whole = planned(model)
    next(module for module in model.model.modules() if hasattr(module, "layerdrop")).layerdrop = 0.5
    assert planned(model) == whole


def test_two_models_that_teach_each_other_keep_what_they_really_keep() -> None:
    models = [tuned("slm", vocabulary=500), tuned("llm", vocabulary=500, width=64)]
    losses = mutual_losses(Distillation(steps=1))
    for one in models:
        one.model.train()
    step = memory.training_step(
        {one.role: shape_of(one) for one in models},
        losses,
        rows=ROWS,
        length=LENGTH,
        answers=ANSWERS,
        device=CPU,
        autocast={"slm": False, "llm": True},
    )

    def work() -> tuple[Tensor, int]:
        return loss_of(models, losses, {"slm": False, "llm": True})

    with held_in_bfloat16(replace(models[1], autocast=True)):
        # The logits are among what is saved, and nothing else of their size is.
        assert step.activations + step.logits == saved_by(models, work) + 2 * INDICES - MASK
        assert step.logits == work()[1] + 8 * ROWS * ANSWERS
        total = step.activations + step.logits + step.transient + sum(4 * adapters.count(one.model) for one in models)
        peak = measured_peak(lambda: work()[0].backward())
        assert peak <= total <= 1.3 * peak


def test_beyond_the_logits_the_losses_of_two_models_take_the_same_for_any_number_of_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vocabulary, at_once = 1000, 4
    monkeypatch.setattr(training_losses, "AT_ONCE", at_once * vocabulary)

    def beyond(answers: int) -> int:
        leaves = torch.randn(2, answers, vocabulary, requires_grad=True)
        logits = {"slm": leaves[0] * 1, "llm": leaves[1] * 1}
        labels = torch.arange(answers)

        def work() -> None:
            parts = mutual_losses(Distillation(steps=1))(logits, labels, Tokens(answers, answers))
            torch.autograd.grad(torch.stack(list(parts.values())).sum(), list(logits.values()))

        return measured_peak(work)

    few, many = beyond(40), beyond(400)
    assert few < 12 * 4 * at_once * vocabulary  # of four answers: log-probabilities, probabilities, gradients
    assert many - few < 100 * 360  # numbers of each answer


def test_what_is_kept_grows_with_rows_and_with_their_length() -> None:
    one = shape_of(tuned("slm", family="llama", width=64))

    def kept(rows: int, length: int) -> int:
        return memory.training_step(
            {"slm": one}, task_loss, rows=rows, length=length, answers=2, device=CPU, autocast={"slm": False}
        ).activations

    assert kept(8, 16) > 1.9 * kept(4, 16)
    assert kept(4, 32) > 1.9 * kept(4, 16)


def test_gradient_checkpointing_keeps_less() -> None:
    one = tuned("slm", family="llama", width=64)

    def kept() -> int:
        return memory.training_step(
            {"slm": shape_of(one)}, task_loss, rows=4, length=32, answers=2, device=CPU, autocast={"slm": False}
        ).activations

    before = kept()
    one.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert kept() < before / 2


def test_scoring_takes_the_logits_of_every_position_twice_and_little_else() -> None:
    one = tuned("slm", family="llama", width=64, vocabulary=500)
    step = memory.scoring_step(shape_of(one), rows=ROWS, length=LENGTH, device=CPU)
    assert (step.activations, step.logits) == (0, 2 * 4 * ROWS * LENGTH * 500)

    @torch.no_grad()
    def work() -> None:
        ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
        torch.log_softmax(one.model(input_ids=ids, use_cache=False).logits, -1)

    peak = measured_peak(work)
    assert peak <= step.logits + step.transient <= 1.3 * peak


def test_a_student_beside_a_capture_takes_what_is_said() -> None:
    settings = Distillation(steps=1)
    model = tuned("llm", vocabulary=500)
    model.model.train()
    losses = beside_a_capture("llm", settings)
    step = memory.training_step(
        {"llm": shape_of(model)},
        losses,
        rows=ROWS,
        length=LENGTH,
        answers=ANSWERS,
        device=CPU,
        autocast={"llm": False},
    )
    total = step.activations + step.logits + step.transient + 4 * adapters.count(model.model)
    peak = measured_peak(lambda: loss_of([model], losses, {"llm": False})[0].backward())
    assert 0.9 * peak <= total <= 1.3 * peak


def test_a_capture_takes_what_is_said() -> None:
    one = tuned("llm", family="llama", width=64, vocabulary=500)

    def keep(logits: Tensor) -> object:
        return top_k(logits, 64, temperature=1.0)

    step = memory.capture_step(
        shape_of(one), keep, rows=ROWS, length=LENGTH, answers=ANSWERS, device=CPU, autocast=False
    )
    batch = packing.padded([Example([3] * LENGTH, LENGTH - ANSWERS)] * ROWS)
    batch["attention_mask"] = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool)

    @torch.no_grad()
    def work() -> None:
        keep(packing.answer_logits(one.model, batch))

    peak = measured_peak(work)
    assert step.activations == 0
    assert 0.9 * peak <= step.logits + step.transient <= 1.3 * peak
