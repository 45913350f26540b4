"""private_training: the traps of DP-SGD, one by one, and a run that is stopped and goes on."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from builders import Family, examples, tuned
from stages.accounting.accountant import Charge
from stages.accounting.noise import SecretRandom
from stages.artefacts.checkpoints import own
from stages.data.examples import Example
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.privacy.dp_sgd import NoisyOptimizer, draw, gradients, loss_of_examples, take_step, train
from stages.runtime.errors import BadNumbers
from stages.runtime.events import Event
from stages.training.objective import Objective
from stages.training.recipes import Outcome, Recipe
from stages.workspace.budgets import ClientTraining
from stages.workspace.machine import Machine

CHANCE = 1e-9
FAMILIES: list[Family] = ["gpt2", "opt", "llama"]
ROWS = examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6), (4, 16)])


class Bench:
    """A tiny model under Opacus's hooks, with an optimizer that leaves the adapter alone (learning rate 0)."""

    def __init__(
        self, family: Family = "gpt2", *, clip: float = 1e3, noise: float = 1e-15, rows: int = 6, autocast: bool = False
    ) -> None:
        from dataclasses import replace

        from opacus.grad_sample import GradSampleHooks

        self.slm = replace(tuned("slm", family=family), autocast=autocast)
        self.objective = Objective([self.slm], loss_of_examples, {"slm_ft": 1.0})
        self.objective.train()
        GradSampleHooks(self.slm.model, loss_reduction="sum", strict=True)
        still = torch.optim.SGD(self.objective.adapter_parameters("slm"), lr=0.0)
        self.optimizer = NoisyOptimizer(still, Charge(noise, 1.0, 1), clip=clip, examples=rows)
        self.seen: list[np.ndarray] = []
        self.optimizer.attach_step_hook(lambda one: self.seen.append(self._gradient()))

    def _gradient(self) -> np.ndarray:
        return np.concatenate([p.grad.double().numpy().ravel() for p in self.optimizer.params])

    def each(self, rows: list[Example]) -> np.ndarray:
        """The gradient of each example, [examples, parameters], all in one batch."""
        gradients(self.objective, self.optimizer.params, rows)
        found = [p.grad_sample.reshape(len(rows), -1).double().numpy() for p in self.optimizer.params]
        self.optimizer.zero_grad()
        return np.concatenate(found, axis=1)

    def step(self, rows: list[Example], *, at_once: int = 100) -> np.ndarray:
        """What a step gives to the optimizer."""
        take_step(self.objective, self.optimizer, rows, at_once)
        return self.seen[-1]


def alone(slm: Tuned, example: Example) -> np.ndarray:
    """The gradient of one example's loss by transformers and autograd, without any part of ours."""
    model = slm.model.train()
    labels = torch.tensor([[-100] * example.prompt_tokens + example.input_ids[example.prompt_tokens :]])
    model(input_ids=torch.tensor([example.input_ids]), labels=labels).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = np.concatenate([p.grad.double().numpy().ravel() for p in trained])
    for parameter in trained:
        parameter.grad = None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_example_has_the_gradient_that_it_has_alone(family: Family) -> None:
    together, separate = Bench(family).each(ROWS), [alone(tuned("slm", family=family), row) for row in ROWS]
    np.testing.assert_allclose(together, separate, rtol=1e-3, atol=1e-5 * np.abs(separate).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_does_not_feel_its_neighbours(family: Family) -> None:
    bench = Bench(family)
    short, long = bench.each([ROWS[0], ROWS[1]])[0], bench.each([ROWS[0], ROWS[5]])[0]
    np.testing.assert_allclose(short, long, rtol=1e-3, atol=1e-6 * np.abs(short).max())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_no_example_counts_for_more_than_the_clip(autocast: bool) -> None:
    clip = 0.05
    bench = Bench(clip=clip, rows=1, autocast=autocast)
    sizes = np.linalg.norm(bench.each(ROWS), axis=1)
    assert sizes.min() > clip
    for row in ROWS:
        assert clip * 0.999 < np.linalg.norm(bench.step([row])) <= clip * (1 + 1e-6)


def test_a_gradient_below_the_clip_is_left_as_it_is() -> None:
    bench = Bench(clip=1e3, rows=1)
    np.testing.assert_allclose(bench.step([ROWS[0]]), bench.each([ROWS[0]])[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("left_out", range(len(ROWS)))
def test_leaving_one_example_out_changes_the_sum_by_at_most_the_clip(left_out: int) -> None:
    clip = 0.3
    bench = Bench(clip=clip, rows=1)  # divided by one: the sum itself
    change = bench.step(ROWS) - bench.step([row for i, row in enumerate(ROWS) if i != left_out])
    assert 0 < np.linalg.norm(change) <= clip * (1 + 1e-5)


def test_a_step_in_small_portions_is_the_same_step() -> None:
    bench = Bench(clip=0.3)
    np.testing.assert_allclose(bench.step(ROWS, at_once=2), bench.step(ROWS), rtol=1e-4, atol=1e-7)


def test_noise_has_the_deviation_that_the_accountant_counts_with() -> None:
    clip, noise, rows = 0.7, 1.3, 4
    bench = Bench(clip=clip, noise=noise, rows=rows)
    drawn = np.concatenate([bench.step([]) for _ in range(30)]) * rows / (noise * clip)  # an empty step is noise alone
    assert len(drawn) > 20_000
    assert stats.kstest(drawn, "norm").pvalue > CHANCE
    squares = (drawn**2).sum()
    assert min(stats.chi2.sf(squares, len(drawn)), stats.chi2.cdf(squares, len(drawn))) > CHANCE


def test_noise_is_added_to_the_sum_and_both_are_divided_by_the_expected_number() -> None:
    quiet, noisy = Bench(clip=0.3, rows=6), Bench(clip=0.3, noise=2.0, rows=6)
    difference = (noisy.step(ROWS) - quiet.step(ROWS)) * 6 / (2.0 * 0.3)
    assert stats.kstest(difference, "norm").pvalue > CHANCE


def test_every_example_is_drawn_by_itself_with_the_same_probability() -> None:
    secret, rate, steps, rows = SecretRandom(), 0.2, 3000, 50
    sizes, times = [], np.zeros(rows)
    for _ in range(steps):
        drawn = draw(secret, rows, rate)
        assert len(set(drawn)) == len(drawn)
        sizes.append(len(drawn))
        times[drawn] += 1
    assert stats.binomtest(sum(sizes), steps * rows, rate).pvalue > CHANCE
    assert min(stats.binomtest(int(count), steps, rate).pvalue for count in times) > CHANCE / rows
    spread = np.var(sizes) * (steps - 1) / (rows * rate * (1 - rate))  # of a binomial: sizes vary as they should
    assert min(stats.chi2.sf(spread, steps - 1), stats.chi2.cdf(spread, steps - 1)) > CHANCE
    assert draw(secret, rows, 1.0) == list(range(rows))


# --- whole runs

STEPS, EVERY = 6, 2


class Run:
    """One process's private training: a fresh model, what it asked for and reported, the adapter it ended with."""

    def __init__(self, folder: Path, *, stop_at: int | None = None, noise: float = 1e-15, **changed: Any) -> None:
        slm = tuned("slm", dropout=changed.pop("dropout", 0.0))
        self.before = adapters.take(slm.model)
        self.reported: list[int] = []
        self.asked: list[tuple[str, int]] = []
        self.held: list[str] = []
        self.finished: list[tuple[str, str]] = []
        self.said: str | None = None
        self.outcome: Outcome | None = None

        def reserve(*, attempt: str, step: int, adapter: str) -> Charge:
            self.held.append(adapter)
            self.asked.append((attempt, step))
            return Charge(noise, changed.get("rate", 1.0), STEPS)

        def report(event: Event) -> None:
            self.reported.append(event.step)
            if event.step == stop_at:
                raise KeyboardInterrupt
            changed.get("after_step", lambda _: None)(event.step)

        learning_rate, decay = changed.get("learning_rate", 0.01), changed.get("weight_decay", 0.1)
        recipe = Recipe(
            budget=ClientTraining(
                steps=STEPS,
                batch_size=changed.get("batch_size", 6),
                weight_decay=decay,
                optimizer=changed.get("optimizer", "adamw"),
            ),
            learning_rates={"slm": learning_rate},
            clips={"slm": None},
            warmup_steps=changed.get("warmup_steps", 0),
            seed=5,
            schedule=changed.get("schedule", "constant"),
            rounds_done=2,
            rounds=4,
        )
        try:
            self.outcome = train(
                slm,
                ROWS,
                recipe,
                clip=changed.get("clip", 1e3),
                reserve=reserve,
                finish=lambda *, attempt, adapter: self.finished.append((attempt, adapter)),
                machine=Machine(checkpoint_steps=changed.get("every", EVERY), micro_batch=changed.get("micro_batch")),
                folder=folder,
                inputs={"data": "a"},
                overwrite=changed.get("overwrite", False),
                report=report,
            )
        except KeyboardInterrupt as stop:
            self.said = str(stop)
        self.slm, taken = slm, adapters.take(slm.model)
        self.adapter = np.concatenate([taken[name].ravel() for name in sorted(taken)])


def by_hand(
    steps: int, *, warmup: int = 0, falls: bool = False, by: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
) -> np.ndarray:
    """Steps on the mean over examples of each one's own loss, by autograd, without Opacus."""
    slm = tuned("slm")
    trained = [p for p in slm.model.parameters() if p.requires_grad]
    optimizer = by(trained, lr=0.01, weight_decay=0.1)
    for step in range(steps):
        mean = torch.from_numpy(np.mean([alone(slm, row) for row in ROWS], axis=0)).float()
        for parameter, part in zip(trained, mean.split([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, step / warmup if warmup else 1.0)
        if falls:  # in a line, from a half after two rounds of four to a quarter after three
            optimizer.param_groups[0]["lr"] *= 1 / 2 - step / steps / 4
        optimizer.step()
        optimizer.zero_grad()
    taken = adapters.take(slm.model)
    return np.concatenate([taken[name].ravel() for name in sorted(taken)])


def test_a_schedule_over_all_rounds_holds_with_noise_too(tmp_path: Path) -> None:
    run = Run(tmp_path, schedule="linear")
    np.testing.assert_allclose(run.adapter, by_hand(STEPS, falls=True), rtol=0, atol=2e-4)
    assert np.abs(run.adapter - by_hand(STEPS)).max() > 5e-3


def test_another_optimiser_takes_the_noisy_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, optimizer="adagrad")
    np.testing.assert_allclose(run.adapter, by_hand(STEPS, by=torch.optim.Adagrad), rtol=0, atol=2e-4)
    assert np.abs(run.adapter - by_hand(STEPS)).max() > 5e-3


@pytest.mark.parametrize("warmup", [0, 3])
def test_without_noise_and_clip_it_is_plain_training_by_the_same_recipe(warmup: int, tmp_path: Path) -> None:
    run = Run(tmp_path, warmup_steps=warmup)
    np.testing.assert_allclose(run.adapter, by_hand(STEPS, warmup=warmup), rtol=0, atol=2e-4)


def test_the_adapter_moves_and_the_outcome_counts_what_was_expected(tmp_path: Path) -> None:
    run = Run(tmp_path, noise=0.5, clip=1.0, batch_size=2, rate=1 / 3)
    norms = adapters.check_trained(run.before, adapters.take(run.slm.model))
    assert norms["update_norm"] > 0
    assert run.outcome is not None
    assert (run.outcome.steps, run.outcome.examples, run.outcome.tokens) == (STEPS, STEPS * 2, 0)
    assert math.isfinite(run.outcome.metrics["slm_ft_after"])


def test_steps_without_any_example_are_noise_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, noise=0.5, clip=1.0, rate=1e-12)
    assert run.reported == [1, 2, 3, 4, 5, 6]
    assert adapters.check_trained(run.before, adapters.take(run.slm.model))["update_norm"] > 0


def test_two_runs_with_one_seed_differ_by_their_noise(tmp_path: Path) -> None:
    one, other = (Run(tmp_path / name, noise=0.5, clip=1.0) for name in ("one", "other"))
    assert not np.array_equal(one.adapter, other.adapter)


def test_nothing_of_opacus_stays_in_the_model(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not any(
        hasattr(p, "grad_sample") or getattr(p, "summed_grad", None) is not None for p in run.slm.model.parameters()
    )
    assert not any(module._forward_hooks or module._backward_hooks for module in run.slm.model.modules())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_goes_on_from_its_checkpoint_with_its_own_reservation(dropout: float, tmp_path: Path) -> None:
    stopped = Run(tmp_path / "work", stop_at=5, dropout=dropout, warmup_steps=6)
    resumed = Run(tmp_path / "work", dropout=dropout, warmup_steps=6)
    assert resumed.reported == [5, 6]
    assert resumed.asked == [(stopped.asked[0][0], 4)]
    assert (len(stopped.finished), len(resumed.finished)) == (0, 1)
    assert resumed.outcome is not None
    assert [line["step"] for line in resumed.outcome.log if "step" in line] == [1, 2, 3, 4, 5, 6]
    if not dropout:  # without noise, it is the very run that was not stopped
        np.testing.assert_allclose(resumed.adapter, Run(tmp_path / "whole", warmup_steps=6).adapter, rtol=0, atol=1e-5)


def test_a_signal_ends_it_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    def tell(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    told, resumed = Run(tmp_path, after_step=tell), Run(tmp_path)
    assert told.said == "stopped after step 3 of 6: the same command goes on from there"
    assert resumed.asked == [(told.asked[0][0], 3)]
    assert told.reported + resumed.reported == [1, 2, 3, 4, 5, 6]


def test_a_run_stopped_before_its_first_checkpoint_goes_on_with_its_reservation_too(tmp_path: Path) -> None:
    stopped, resumed = Run(tmp_path, stop_at=1), Run(tmp_path)
    assert resumed.asked == [(stopped.asked[0][0], 0)]
    assert resumed.reported == [1, 2, 3, 4, 5, 6]


def test_a_run_that_ended_but_was_not_published_draws_no_second_adapter(tmp_path: Path) -> None:
    first, second = (Run(tmp_path, noise=0.5, clip=1.0, every=4) for _ in range(2))
    assert second.reported == []
    assert second.finished == first.finished == [(first.asked[0][0], second.held[0])]
    assert second.held != first.held
    np.testing.assert_array_equal(first.adapter, second.adapter)


def test_overwriting_asks_anew(tmp_path: Path) -> None:
    stopped, other = Run(tmp_path, stop_at=5), Run(tmp_path, overwrite=True)
    assert other.asked[0][1] == 0
    assert other.asked[0][0] != stopped.asked[0][0]


def test_a_checkpoint_holds_no_state_of_any_generator(tmp_path: Path) -> None:
    Run(tmp_path, stop_at=5)
    state = torch.load(own(tmp_path) / "checkpoint-4" / "state.pt", weights_only=True)
    assert set(state) == {"step", "attempt", "log", "adapter", "optimizer", "schedule"}
    assert not [path for path in tmp_path.rglob("*") if re.search("rng|seed|random", path.name)]


def test_a_loss_that_breaks_ends_the_run_and_its_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(BadNumbers, match="slm_ft became"):
        Run(tmp_path / "work", learning_rate=1e30, noise=1.0, clip=1.0)
    assert not (tmp_path / "work").exists()


def test_an_adapter_that_ran_away_is_no_result_whatever_its_loss(tmp_path: Path) -> None:
    with pytest.raises(BadNumbers, match="adapter has moved a weight by"):
        Run(tmp_path / "work", learning_rate=300.0, weight_decay=0.0, noise=1.0, clip=1.0)
    assert not (tmp_path / "work").exists()
