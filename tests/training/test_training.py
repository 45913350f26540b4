"""training: the steps are those of Algorithm 1, in the order of the schedule."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from builders import examples, tuned
from stages.artefacts.adapter_files import Tensors
from stages.data.examples import Example
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers
from stages.runtime.events import Event, ignore
from stages.training.objective import Objective, mutual_losses
from stages.training.recipes import Outcome, Recipe
from stages.training.schedule import schedule
from stages.training.stopping import FARTHEST, refuse_runaway, snapshot
from stages.training.training import train
from stages.workspace.budgets import Distillation
from stages.workspace.machine import Machine

ROWS = examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6), (4, 3), (7, 2), (2, 2)])
UNLABELLED = [Example(row.input_ids, len(row.input_ids)) for row in ROWS]
MIXED = [row if i % 3 else UNLABELLED[i] for i, row in enumerate(ROWS)]
RATE = 0.01
Pair = tuple[Tuned, Tuned]


def fresh_pair() -> Pair:
    """An SLM and an LLM, the same in every call."""
    return tuned("slm", width=16), tuned("llm", width=32)


def objective_of(pair: Pair) -> Objective:
    return Objective(
        pair, mutual_losses(Distillation(steps=1)), dict.fromkeys(["slm_ft", "slm_kd", "llm_ft", "llm_kd"], 1.0)
    )


def recipe(**changed: Any) -> Recipe:
    budget = Distillation(steps=changed.pop("steps", 1), batch_size=changed.pop("batch_size", len(ROWS)))
    given = {"clips": {}, "warmup_steps": 0, "seed": 5, "learning_rates": {"slm": RATE, "llm": RATE / 2}} | changed
    return Recipe(budget=budget, **given)


def taken(pair: Pair) -> dict[str, Tensors]:
    return {one.role: adapters.take(one.model) for one in pair}


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def assert_same(found: dict[str, Tensors], expected: dict[str, Tensors], *, atol: float) -> None:
    for role, tensors in expected.items():
        np.testing.assert_allclose(flat(found[role]), flat(tensors), rtol=0, atol=atol, err_msg=role)


@pytest.fixture
def do(tmp_path: Path) -> Callable[..., Outcome]:
    """Train a pair, by default from scratch in a folder of its own."""
    numbers = itertools.count()

    def call(pair: Pair | Objective, plan: Recipe, **changed: Any) -> Outcome:
        objective = pair if isinstance(pair, Objective) else objective_of(pair)
        given = {"machine": Machine(), "folder": tmp_path / str(next(numbers)), "inputs": {}, "report": ignore}
        return train(objective, changed.pop("examples", ROWS), plan, **(given | changed))

    return call


@pytest.fixture
def batches_seen() -> Iterator[tuple[Objective, list[dict[str, Any]]]]:
    """An objective, and every batch that it is trained on as it comes."""
    objective, seen = objective_of(fresh_pair()), []
    handle = objective.register_forward_pre_hook(lambda _, __, batch: seen.append(batch), with_kwargs=True)
    yield objective, seen
    handle.remove()


def rows_in(batch: dict[str, Any]) -> list[list[int]]:
    """The token ids of each example of a batch of either layout."""
    if batch["attention_mask"].dim() == 2:
        return [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    starts = (batch["position_ids"][0] == 0).nonzero().ravel().tolist()
    return [part.tolist() for part in batch["input_ids"][0].tensor_split(starts[1:])]


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_rows_are_trained_on_in_the_order_of_the_schedule(
    batches_seen: tuple[Objective, list[dict[str, Any]]],
    do: Callable[..., Outcome],
    alternating: bool,
    micro_batch: int | None,
) -> None:
    objective, seen = batches_seen
    plan = recipe(steps=5, batch_size=3, alternating=alternating)
    do(objective, plan, machine=Machine(micro_batch=micro_batch))
    turns = ("slm", "llm") if alternating else (None,)
    expected = [
        (turn, ROWS[i].input_ids) for step in schedule(len(ROWS), plan.budget, 5) for turn in turns for i in step
    ]
    assert [(batch.get("turn"), ids) for batch in seen for ids in rows_in(batch)] == expected


def adamw_by_hand(parameters: list[Tensor], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def loss_by_hand(student: Tuned, teacher: Tuned, rows: Sequence[Any]) -> Tensor:
    """L_FT + L_KD of Eq. 4 and 5, row by row, from logits of whole sequences."""
    found, tokens = torch.zeros(()), 0
    for row in rows:
        ids, kept = torch.tensor([row.input_ids]), slice(row.prompt_tokens - 1, -1)
        z = student.model(input_ids=ids).logits[0, kept]
        p = F.softmax(teacher.model(input_ids=ids).logits[0, kept], -1).detach()
        found = found + F.cross_entropy(z, ids[0, row.prompt_tokens :], reduction="sum")
        found = found + (p * (p.log() - F.log_softmax(z, -1))).sum()
        tokens += row.answer_tokens
    return found / tokens


@pytest.mark.parametrize("alternating", [False, True])
def test_training_is_what_a_bare_loop_of_algorithm_1_does(do: Callable[..., Outcome], alternating: bool) -> None:
    pair, by_hand = fresh_pair(), fresh_pair()
    plan = recipe(steps=3, batch_size=4, alternating=alternating)
    do(pair, plan)
    slm, llm = by_hand
    steppers = {
        one.role: adamw_by_hand([p for p in one.model.parameters() if p.requires_grad], plan.learning_rates[one.role])
        for one in by_hand
    }
    for step in schedule(len(ROWS), plan.budget, plan.seed):
        rows = [ROWS[i] for i in step]
        for turns in (("slm",), ("llm",)) if alternating else (("slm", "llm"),):
            for student, teacher in ((slm, llm), (llm, slm)):
                if student.role in turns:
                    loss_by_hand(student, teacher, rows).backward()
            for role in turns:
                steppers[role].step()
                steppers[role].zero_grad()
    assert_same(taken(pair), taken(by_hand), atol=1e-4)  # a hundredth of the learning rate


@pytest.mark.parametrize(
    ("name", "by_hand_of"),
    [("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad), ("adafactor", torch.optim.Adafactor)],
)
def test_another_optimiser_takes_the_steps_that_torchs_own_takes(
    do: Callable[..., Outcome], name: str, by_hand_of: Callable[..., torch.optim.Optimizer]
) -> None:
    pair, by_hand, usual = fresh_pair(), fresh_pair(), fresh_pair()
    plan = recipe(steps=3, batch_size=4)
    do(usual, plan)
    do(pair, replace(plan, budget=plan.budget.model_copy(update={"optimizer": name, "weight_decay": 0.1})))
    slm, llm = by_hand
    steppers = [
        by_hand_of(
            [p for p in one.model.parameters() if p.requires_grad], lr=plan.learning_rates[one.role], weight_decay=0.1
        )
        for one in by_hand
    ]
    for step in schedule(len(ROWS), plan.budget, plan.seed):
        rows = [ROWS[i] for i in step]
        for student, teacher in ((slm, llm), (llm, slm)):
            loss_by_hand(student, teacher, rows).backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
    assert_same(taken(pair), taken(by_hand), atol=1e-4)
    assert np.abs(flat(taken(pair)["slm"]) - flat(taken(usual)["slm"])).max() > RATE / 10


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_proximal_term_is_what_a_bare_loop_makes_of_fedprox(
    do: Callable[..., Outcome], micro_batch: int | None
) -> None:
    pair, by_hand, free = fresh_pair(), fresh_pair(), fresh_pair()
    plan = recipe(steps=4, batch_size=4)
    do(pair, recipe(steps=4, batch_size=4, proximal=0.7), machine=Machine(micro_batch=micro_batch))
    do(free, plan)
    slm, llm = by_hand
    trained = {one.role: [p for p in one.model.parameters() if p.requires_grad] for one in by_hand}
    start = {role: [p.detach().clone() for p in parameters] for role, parameters in trained.items()}
    steppers = {role: adamw_by_hand(parameters, plan.learning_rates[role]) for role, parameters in trained.items()}
    for step in schedule(len(ROWS), plan.budget, plan.seed):
        rows = [ROWS[i] for i in step]
        for student, teacher in ((slm, llm), (llm, slm)):
            pairs = zip(trained[student.role], start[student.role], strict=True)
            apart = torch.stack([((p - begun) ** 2).sum() for p, begun in pairs]).sum()
            (loss_by_hand(student, teacher, rows) + 0.7 / 2 * apart).backward()
        for stepper in steppers.values():
            stepper.step()
            stepper.zero_grad()
    assert_same(taken(pair), taken(by_hand), atol=1e-4)
    assert np.abs(flat(taken(pair)["slm"]) - flat(taken(free)["slm"])).max() > RATE / 10


@pytest.fixture
def snapshots() -> Iterator[list[dict[str, Any]]]:
    """Gradients of the two parameter groups, SLM and LLM, before every optimiser step."""
    seen: list[dict[str, Any]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        norms = [float(torch.stack([g.norm() for g in grads]).norm()) if grads else None for grads in groups]
        seen.append(dict(zip(("slm", "llm"), norms, strict=True)))

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


def test_in_alternating_order_the_slm_moves_in_its_turn_and_the_llm_in_its_own(do: Callable[..., Outcome]) -> None:
    pair, at_the_start_of = fresh_pair(), {}
    objective = objective_of(pair)

    def look(_: Any, __: Any, batch: dict[str, Any]) -> None:
        at_the_start_of[batch["turn"]] = taken(pair)

    with objective.register_forward_pre_hook(look, with_kwargs=True):
        do(objective, recipe(steps=1, alternating=True))
    start, between, end = at_the_start_of["slm"], at_the_start_of["llm"], taken(pair)
    assert list(at_the_start_of) == ["slm", "llm"]
    assert_same(between, start | {"slm": between["slm"]}, atol=0)
    assert_same(end, {"slm": between["slm"]}, atol=0)
    assert np.abs(flat(between["slm"]) - flat(start["slm"])).max() > RATE / 2
    assert np.abs(flat(end["llm"]) - flat(between["llm"])).max() > RATE / 4


def test_in_alternating_order_no_step_has_gradients_of_both(
    do: Callable[..., Outcome], snapshots: list[dict[str, Any]]
) -> None:
    do(fresh_pair(), recipe(steps=2, alternating=True))
    assert [[role for role, norm in step.items() if norm is not None] for step in snapshots] == [["slm"], ["llm"]] * 2


def test_a_clip_bounds_the_gradient_of_its_own_model_and_no_other(
    do: Callable[..., Outcome], snapshots: list[dict[str, Any]]
) -> None:
    do(fresh_pair(), recipe())
    (free,) = snapshots
    for clips in ({"slm": free["slm"] / 2}, {"llm": free["llm"] / 3, "slm": None}, {"slm": 2 * free["slm"]}):
        snapshots.clear()
        do(fresh_pair(), recipe(clips=clips))
        expected = {role: min(norm, clips.get(role) or norm) for role, norm in free.items()}
        assert snapshots == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("rows", [ROWS, MIXED, UNLABELLED], ids=["labelled", "mixed", "unlabelled"])
def test_micro_batches_change_nothing_but_memory(
    do: Callable[..., Outcome], snapshots: list[dict[str, Any]], micro_batch: int, rows: list[Example]
) -> None:
    whole, parts = fresh_pair(), fresh_pair()
    expected = do(whole, recipe(steps=2), examples=rows)
    found = do(parts, recipe(steps=2), examples=rows, machine=Machine(micro_batch=micro_batch))
    assert snapshots[2:] == [pytest.approx(step, rel=1e-4) for step in snapshots[:2]]
    assert_same(taken(parts), taken(whole), atol=RATE / 100)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-3)
    assert [line.keys() for line in found.log] == [line.keys() for line in expected.log]


@pytest.mark.parametrize(
    ("alternating", "slm", "llm"),
    [
        # AdamW moves what has a steady gradient by the rate itself: 0/3, 1/3, 2/3, 3/3, 3/3 of it in steps 1, 2, ...
        (False, [0, 2, 4, 6, 6], [0, 2, 4, 6, 6]),
        # The rate rises in each turn: SLM 0/6, LLM 1/6, SLM 2/6, LLM 3/6, ...
        (True, [0, 2, 4, 6, 6], [1, 3, 5, 6, 6]),
    ],
)
def test_warm_up_raises_the_learning_rate_step_by_step_to_its_full_size(
    do: Callable[..., Outcome], alternating: bool, slm: list[int], llm: list[int]
) -> None:
    # All rows in every step and a rate so small that the gradient stays as it is.
    pair, rate, places = fresh_pair(), 1e-5, []
    places.append(taken(pair))
    rates = {"slm": rate, "llm": 2 * rate}
    plan = recipe(steps=5, warmup_steps=3, learning_rates=rates, alternating=alternating)
    do(pair, plan, report=lambda event: places.append(taken(pair)))
    for role, sixths in (("slm", slm), ("llm", llm)):
        moves = [np.abs(flat(b[role]) - flat(a[role])).max() for a, b in itertools.pairwise(places)]
        assert moves == pytest.approx([rates[role] * sixth / 6 for sixth in sixths], rel=0.03)


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        # Rounds 2 and 3 of 4, 2 steps each, of 8 in all: the first step of round 2 is the third.
        ("linear", [6 / 8, 5 / 8, 4 / 8, 3 / 8]),
        ("cosine", [(1 + math.cos(math.pi * step / 8)) / 2 for step in (2, 3, 4, 5)]),
    ],
)
@pytest.mark.parametrize("alternating", [False, True])
def test_a_schedule_goes_on_from_round_to_round(
    do: Callable[..., Outcome], kind: str, factors: list[float], alternating: bool
) -> None:
    pair, rate, places = fresh_pair(), 1e-5, []
    rates = {"slm": rate, "llm": rate}
    for done in (1, 2):
        places.append(taken(pair))
        plan = recipe(steps=2, learning_rates=rates, schedule=kind, rounds_done=done, rounds=4, alternating=alternating)
        do(pair, plan, report=lambda event: places.append(taken(pair)))
    moves = [np.abs(flat(b["slm"]) - flat(a["slm"])).max() for a, b in itertools.pairwise(places)]
    moves.pop(2)  # between the rounds
    assert moves == pytest.approx([rate * factor for factor in factors], rel=0.03)


@pytest.mark.parametrize("alternating", [False, True])
def test_what_training_did_is_counted_in_full(do: Callable[..., Outcome], alternating: bool) -> None:
    events: list[Event] = []
    plan = recipe(steps=4, batch_size=3, alternating=alternating)
    outcome = do(fresh_pair(), plan, report=events.append)
    assert (outcome.steps, outcome.examples) == (4, 4 * 3)
    assert outcome.tokens == sum(ROWS[i].answer_tokens for step in schedule(len(ROWS), plan.budget, 5) for i in step)
    assert [(event.kind, event.step, event.total) for event in events] == [("step", n, 4) for n in (1, 2, 3, 4)]
    assert [dict(event.values) for event in events] == [
        {name: loss for name, loss in line.items() if name != "step"} for line in outcome.log if "step" in line
    ]
    names = {
        f"{role}_{loss}_{when}" for role in ("slm", "llm") for loss in ("ft", "kd") for when in ("before", "after")
    }
    assert outcome.metrics.keys() == names
    assert {f"{name}_before" for name in events[0].values} < names
    assert len(events[0].values) == 4


def test_the_first_steps_losses_are_those_measured_before(do: Callable[..., Outcome]) -> None:
    outcome = do(fresh_pair(), recipe(steps=1))
    first = next(line for line in outcome.log if "step" in line)
    before = {name.removesuffix("_before"): loss for name, loss in outcome.metrics.items() if "before" in name}
    assert {name: first[name] for name in before} == pytest.approx(before, rel=1e-4)


def test_training_lowers_every_loss(do: Callable[..., Outcome]) -> None:
    metrics = do(fresh_pair(), recipe(steps=12)).metrics
    for name in ("slm_ft", "slm_kd", "llm_ft", "llm_kd"):
        assert metrics[f"{name}_after"] < metrics[f"{name}_before"]


def test_equal_seeds_give_equal_bytes_whatever_the_process_did_before(do: Callable[..., Outcome]) -> None:
    found = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        pair = tuned("slm", width=16, dropout=0.3), tuned("llm", dropout=0.3)
        torch.manual_seed(noise)
        do(pair, recipe(steps=2, batch_size=3, seed=seed))
        found.append({role: flat(tensors).tobytes() for role, tensors in taken(pair).items()})
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(("steps", "when"), [(3, r"at step 2 of 3"), (1, r"after the last step")])
def test_a_loss_that_is_no_number_stops_training_by_name(do: Callable[..., Outcome], steps: int, when: str) -> None:
    plan = recipe(steps=steps, learning_rates={"slm": 1e30, "llm": RATE})
    with pytest.raises(BadNumbers, match=rf"slm_\w\w became (nan|inf) {when}") as caught:
        do(fresh_pair(), plan)
    assert "learning rate" in str(caught.value.mend)


@pytest.mark.parametrize("role", ["slm", "llm"])
@pytest.mark.parametrize("change", [1.0, -1.0])
def test_an_adapter_that_ran_away_while_its_loss_rose_is_no_result(
    do: Callable[..., Outcome], tmp_path: Path, role: str, change: float
) -> None:
    rising = itertools.count()

    def losses(logits: Any, labels: Tensor, tokens: Any) -> dict[str, Tensor]:
        """Losses that rise, or fall, by far more than what is learned."""
        number = change * 1e6 * next(rising)
        return {name: loss + number for name, loss in true(logits, labels, tokens).items()}

    true = mutual_losses(Distillation(steps=1))
    objective = Objective(fresh_pair(), losses, dict.fromkeys(["slm_ft", "slm_kd", "llm_ft", "llm_kd"], 1.0))
    rates = {"slm": RATE, "llm": RATE} | {role: 3 * FARTHEST}  # AdamW's first step is as long as the rate
    if change < 0:
        do(objective, recipe(learning_rates=rates))
        return
    with pytest.raises(BadNumbers, match=f"the {role.upper()}'s adapter has moved a weight by 3") as caught:
        do(objective, recipe(learning_rates=rates), folder=tmp_path / "work")
    assert "lower the learning rate" in str(caught.value.mend)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("weight", "why", "told"),
    [
        (-99.0, " while its loss rose", None),
        (-101.0, " while its loss rose", "moved a weight by 101 while its loss rose: more than 100"),
        (65504.0, None, None),
        (-65505.0, None, "has a weight of 6.55e+04; float16 ends at 65504"),
        (math.nan, None, "has a weight of nan"),
        (math.inf, None, "has a weight of inf"),
    ],
)
def test_how_far_an_adapter_may_go(weight: float, why: str | None, told: str | None) -> None:
    objective = objective_of(fresh_pair())
    for parameter in objective.parameters():
        parameter.data.zero_()
    start = snapshot(objective)
    objective.adapter_parameters("llm")[-1].data.view(-1)[-1] = weight
    refuse_runaway(objective, start, "slm", why)
    with pytest.raises(BadNumbers, match=re.escape(told)) if told else contextlib.nullcontext():
        refuse_runaway(objective, start, "llm", why)
