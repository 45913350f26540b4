"""adversarial: Eq. 3 under attack is what a plain loop makes of it, however its batches are cut."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from builders import Family, examples, tuned
from stages.artefacts.adapter_files import Tensors
from stages.data.examples import Example
from stages.models import adapters
from stages.models.held import held_in_bfloat16
from stages.models.tuned import Tuned
from stages.runtime.events import Event
from stages.training.adversarial import objective_of
from stages.training.objective import Objective, Tokens, task_loss
from stages.training.recipes import Outcome, Recipe
from stages.training.schedule import schedule
from stages.training.training import train
from stages.workspace.attacks import Adversarial
from stages.workspace.budgets import ClientTraining
from stages.workspace.machine import Machine

ROWS = examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6), (4, 3), (7, 2), (2, 2)])
RATE = 0.01


def trained_of(one: Tuned) -> list[Tensor]:
    return [parameter for parameter in one.model.parameters() if parameter.requires_grad]


def gradients(objective: Objective, rows: Sequence[Example] = ROWS) -> Tensor:
    objective(**objective.collate(rows))["loss"].backward()
    found = torch.cat([one.grad.ravel() for one in objective.adapter_parameters("slm") if one.grad is not None])
    objective.zero_grad()
    return found


def loss_of(one: Tuned, row: Example, embedded: Tensor) -> Tensor:
    answers = one.model(inputs_embeds=embedded).logits[0, row.prompt_tokens - 1 : -1]
    return F.cross_entropy(answers, torch.tensor(row.input_ids[row.prompt_tokens :]), reduction="sum")


def losses_by_hand(one: Tuned, rows: Sequence[Example], settings: Adversarial) -> tuple[Tensor, Tensor]:
    """The plain loss and that under attack, per answer token, row by row and token by token."""
    plain, attacked = torch.zeros(()), torch.zeros(())
    assert settings.radius
    step = settings.step_size or 2 * settings.radius / (settings.steps + 1)
    for row in rows:
        embedded = one.model.get_input_embeddings()(torch.tensor([row.input_ids])).detach()
        plain = plain + loss_of(one, row, embedded)
        moved = torch.zeros_like(embedded)
        for _ in range(settings.steps):
            at = (embedded + moved).requires_grad_()
            (way,) = torch.autograd.grad(loss_of(one, row, at), at)
            for token in range(row.prompt_tokens):
                moved[0, token] += step * embedded[0, token].norm() * way[0, token] / way[0, token].norm()
                share = float(moved[0, token].norm() / embedded[0, token].norm())
                moved[0, token] *= min(1.0, settings.radius / share)
        attacked = attacked + loss_of(one, row, embedded + moved)
    tokens = sum(row.answer_tokens for row in rows)
    return plain / tokens, attacked / tokens


@pytest.mark.parametrize("family", get_args(Family))
@pytest.mark.parametrize("steps", [1, 3])
def test_both_losses_and_the_gradient_are_those_of_a_plain_loop(family: Family, steps: int) -> None:
    one, settings = tuned("slm", family=family, width=16), Adversarial(radius=0.2, steps=steps, weight=0.3)
    objective = objective_of(one, settings)
    plain, attacked = losses_by_hand(one, ROWS, settings)
    found = objective(**objective.collate(ROWS))["loss"]
    said = objective.pop_losses()
    told = {"slm_ft": float(plain.detach()), "slm_adv": float(attacked.detach())}
    assert said == pytest.approx(told, rel=1e-4)
    assert said["slm_adv"] > said["slm_ft"] + 1e-3
    torch.testing.assert_close(found, 0.7 * plain + 0.3 * attacked, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(0.7 * plain + 0.3 * attacked, trained_of(one))
    torch.testing.assert_close(gradients(objective), torch.cat([g.ravel() for g in expected]), rtol=1e-3, atol=1e-5)


def test_with_all_the_weight_on_the_attack_the_plain_loss_is_told_and_moves_nothing() -> None:
    one, settings = tuned("slm", width=16), Adversarial(radius=0.2, weight=1.0)
    objective = objective_of(one, settings)
    plain, attacked = losses_by_hand(one, ROWS, settings)
    expected = torch.autograd.grad(attacked, trained_of(one))
    torch.testing.assert_close(gradients(objective), torch.cat([g.ravel() for g in expected]), rtol=1e-3, atol=1e-5)
    assert objective.pop_losses()["slm_ft"] == pytest.approx(float(plain.detach()), rel=1e-4)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_radius_near_zero_is_the_plain_training(weight: float) -> None:
    one = tuned("slm", width=16)
    plain = Objective([one], task_loss, {"slm_ft": 1.0})
    objective = objective_of(one, Adversarial(radius=1e-7, weight=weight))
    torch.testing.assert_close(gradients(objective), gradients(plain), rtol=1e-4, atol=1e-6)
    said = objective.pop_losses()
    assert said["slm_ft"] == plain.pop_losses()["slm_ft"] == pytest.approx(said["slm_adv"], rel=1e-5)


def test_each_row_is_read_once_more_than_there_are_steps() -> None:
    one, passes = tuned("slm", width=16), []
    settings = Adversarial(radius=0.2, steps=3)
    objective = objective_of(one, settings)
    one.model.register_forward_pre_hook(lambda *_: passes.append(1))
    gradients(objective)
    assert len(passes) == settings.passes == 4


def test_what_is_measured_is_what_is_trained_on_and_leaves_no_gradient() -> None:
    objective = objective_of(tuned("slm", width=16), Adversarial(radius=0.2, steps=2))
    measured = objective.measure(ROWS, 3)
    assert all(one.grad is None for one in objective.parameters())
    found = objective.parts(objective.collate(ROWS), Tokens.of(ROWS))
    assert measured == pytest.approx({name: float(loss.detach()) for name, loss in found.items()}, rel=1e-5)


def test_bfloat16_sees_nearly_the_same_losses_and_gradient() -> None:
    one = tuned("slm", family="llama", width=32)
    settings = Adversarial(radius=0.2, steps=2)
    expected, there = gradients(objective_of(one, settings)), objective_of(one, settings)
    there.measure(ROWS, 8)
    short = dataclasses.replace(one, autocast=True)
    with held_in_bfloat16(short):
        found = gradients(objective_of(short, settings))
    assert float(F.cosine_similarity(found, expected, dim=0)) > 0.99


def recipe(**changed: Any) -> Recipe:
    budget = ClientTraining(steps=6, batch_size=4, gradient_accumulation=changed.pop("accumulation", 1))
    return Recipe(budget=budget, learning_rates={"slm": RATE}, clips={"slm": None}, warmup_steps=0, seed=5, **changed)


class Run:
    """A client's training under attack, of a fresh model, and what came of it."""

    def __init__(
        self,
        folder: Path,
        *,
        stop_at: int | None = None,
        dropout: float = 0.0,
        machine: Machine | None = None,
        **more: Any,
    ) -> None:
        self.slm = tuned("slm", width=16, dropout=dropout)
        self.outcome: Outcome | None = None

        def report(event: Event) -> None:
            if event.kind == "step" and event.step == stop_at:
                raise KeyboardInterrupt

        objective = objective_of(self.slm, Adversarial(radius=0.2, steps=2))
        machine = machine or Machine(checkpoint_steps=2)
        try:
            self.outcome = train(
                objective, ROWS, recipe(**more), machine=machine, folder=folder, inputs={}, report=report
            )
        except KeyboardInterrupt:
            assert stop_at

    @property
    def adapter(self) -> np.ndarray:
        tensors: Tensors = adapters.take(self.slm.model)
        return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


@pytest.mark.parametrize("proximal", [0.0, 0.7])
@pytest.mark.parametrize("machine", [Machine(), Machine(micro_batch=1)])
def test_training_is_what_a_bare_loop_does_with_and_without_a_proximal_term(
    tmp_path: Path, proximal: float, machine: Machine
) -> None:
    by_hand = tuned("slm", width=16)
    start, plan = copy.deepcopy([one.detach() for one in trained_of(by_hand)]), recipe()
    stepper = torch.optim.AdamW(trained_of(by_hand), lr=RATE, weight_decay=0.0)
    for step in schedule(len(ROWS), plan.budget, plan.seed):
        rows = [ROWS[i] for i in step]
        plain, attacked = losses_by_hand(by_hand, rows, Adversarial(radius=0.2, steps=2))
        pairs = zip(trained_of(by_hand), start, strict=True)
        apart = torch.stack([((one - begun) ** 2).sum() for one, begun in pairs]).sum()
        ((plain + attacked) / 2 + proximal / 2 * apart).backward()
        stepper.step()
        stepper.zero_grad()
    run = Run(tmp_path, proximal=proximal, machine=machine)
    expected = adapters.take(by_hand.model)
    np.testing.assert_allclose(
        run.adapter, np.concatenate([expected[name].ravel() for name in sorted(expected)]), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_run_gives_the_same_bytes_and_so_does_one_that_was_stopped(tmp_path: Path, dropout: float) -> None:
    unbroken, again = Run(tmp_path / "1", dropout=dropout), Run(tmp_path / "2", dropout=dropout)
    assert unbroken.adapter.tobytes() == again.adapter.tobytes()
    Run(tmp_path / "3", dropout=dropout, stop_at=5)
    resumed = Run(tmp_path / "3", dropout=dropout)
    assert resumed.adapter.tobytes() == unbroken.adapter.tobytes()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path, checkpointing: bool) -> None:
    one, other = tuned("slm", width=16), tuned("slm", width=16)
    if checkpointing:
        other.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        other.model.enable_input_require_grads()
    settings = Adversarial(radius=0.2, steps=2)
    whole = gradients(objective_of(one, settings))
    objective, step = objective_of(other, settings), Tokens.of(ROWS)
    other.model.train()
    for start in (0, 2, 4, 6):
        objective(**objective.collate(ROWS[start : start + 2], step))["loss"].backward()
    found = torch.cat([p.grad.ravel() for p in objective.adapter_parameters("slm") if p.grad is not None])
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-5)


def test_both_losses_are_told_before_after_and_in_each_step(tmp_path: Path) -> None:
    outcome = Run(tmp_path).outcome
    assert outcome is not None
    assert outcome.metrics.keys() == {f"slm_{name}_{when}" for name in ("ft", "adv") for when in ("before", "after")}
    assert outcome.metrics["slm_adv_after"] < outcome.metrics["slm_adv_before"]
    steps = [line for line in outcome.log if "step" in line]
    assert all(line.keys() == {"step", "slm_ft", "slm_adv"} and line["slm_adv"] > line["slm_ft"] for line in steps)


@pytest.mark.parametrize("seed", [1, 2])
def test_who_trained_under_attack_loses_far_less_to_a_stronger_one(tmp_path: Path, seed: int) -> None:
    under_attack, plain = {}, {}
    for name, settings in {"plain": Adversarial(), "attacked": Adversarial(radius=0.3, weight=1.0)}.items():
        slm = tuned("slm", layers=["c_attn", "c_proj", "c_fc"])
        plan = Recipe(ClientTraining(steps=80, batch_size=8), {"slm": 0.02}, {"slm": None}, 0, seed)
        objective = objective_of(slm, settings)
        train(objective, ROWS, plan, machine=Machine(), folder=tmp_path / name, inputs={}, report=lambda _: None)
        found = objective_of(slm, Adversarial(radius=0.3, steps=5)).measure(ROWS, 8)
        plain[name], under_attack[name] = found["slm_ft"], found["slm_adv"]
    assert under_attack["attacked"] < under_attack["plain"] / 3
    assert plain["attacked"] < 1.5 * plain["plain"]
