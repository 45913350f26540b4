"""schedule: which rows each optimiser step sees."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from builders import edit
from stages.distillation import side
from stages.parties.party import Party
from stages.privacy.local_training import Learner
from stages.runtime.events import ignore
from stages.runtime.processes import ALONE
from stages.training.schedule import schedule
from stages.workspace.budgets import Distillation
from stages.workspace.paths import Workspace


@pytest.mark.parametrize(("count", "batch_size", "accumulation"), [(12, 4, 1), (12, 2, 3), (7, 7, 1), (6, 1, 2)])
@pytest.mark.parametrize("epochs", [1.0, 2.0, 3.0])
def test_each_row_is_seen_once_in_every_epoch(count: int, batch_size: int, accumulation: int, epochs: float) -> None:
    budget = Distillation(epochs=epochs, batch_size=batch_size, gradient_accumulation=accumulation)
    order = list(itertools.chain(*schedule(count, budget, seed=1)))
    for epoch in range(int(epochs)):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize(("count", "epochs", "steps"), [(10, 1.0, 3), (10, 0.5, 2), (3, 1.0, 1), (10, 2.0, 5)])
def test_every_step_has_the_same_size_and_the_last_is_filled_from_one_more_pass(
    count: int, epochs: float, steps: int
) -> None:
    # steps = ceil(epochs x count / 4)
    plan = schedule(count, Distillation(epochs=epochs, batch_size=4), seed=1)
    assert [len(step) for step in plan] == [4] * steps
    seen = Counter(itertools.chain(*plan))
    passes, rest = divmod(4 * steps, count)
    assert {seen[i] for i in range(count)} <= {passes, passes + (rest > 0)}


def test_steps_count_optimiser_steps_whatever_the_data() -> None:
    for count in (1, 5, 1000):
        assert len(schedule(count, Distillation(steps=17, batch_size=3), seed=1)) == 17


def test_the_schedule_is_drawn_from_the_seed_alone() -> None:
    budget = Distillation(epochs=2.0, batch_size=4)
    torch.manual_seed(1)
    first = schedule(50, budget, seed=3)
    torch.manual_seed(2)
    assert schedule(50, budget, seed=3) == first
    assert schedule(50, budget, seed=4) != first
    assert list(itertools.chain(*first))[:50] != sorted(itertools.chain(*first[:12])), "not shuffled"


def learner(workspace: Workspace, round: int) -> Learner:
    return Learner(party=Party.client(workspace, 1), round=round, resets=False, processes=ALONE, report=ignore)


def test_a_client_that_knows_the_round_and_their_number_has_its_piece_of_the_schedule(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[client_training]\n", '[client_training]\nschedule = "linear"\n')
    edit(workspace_folder / "fedcollm.toml", "[distillation]\n", '[distillation]\nschedule = "cosine"\n')
    workspace = Workspace(workspace_folder)
    assert workspace.agreement.federation.rounds == 2
    own = [learner(workspace, round).recipe for round in (1, 2)]
    assert [one.factor(0, 4) for one in own] == [1.0, 0.5]
    assert own[1].factor(3, 4) == pytest.approx(0.125)
    both = [side.recipe(workspace, round, "slm", "llm") for round in (1, 2)]
    assert [one.factor(0, 4) for one in both] == pytest.approx([1.0, 0.5])
    assert both[0].factor(2, 4) == pytest.approx((1 + 2**-0.5) / 2)
