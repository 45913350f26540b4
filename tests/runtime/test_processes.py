"""processes: several that have met hear what the first says, add up, and draw chance of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builders import examples, tuned
from processes import call_together
from stages.runtime.processes import ALONE, Processes


def talked(processes: Processes) -> dict[str, Any]:
    """What one of several hears from all."""
    return {
        "rank": processes.rank,
        "heard": processes.agree({"from": processes.rank}),
        "heard next": processes.agree(["second"] if processes.is_first else None),
        "total": processes.total({"a": float(processes.rank + 1), "b": 10.0}),
        "gathered": processes.gather(f"of {processes.rank}"),
    }


def test_alone_everything_is_its_own() -> None:
    assert talked(ALONE) == {
        "rank": 0,
        "heard": {"from": 0},
        "heard next": ["second"],
        "total": {"a": 1.0, "b": 10.0},
        "gathered": ["of 0"],
    }


@pytest.mark.slow
def test_several_hear_the_first_and_add_up() -> None:
    for rank, one in enumerate(call_together(3, talked)):
        assert one == {
            "rank": rank,
            "heard": {"from": 0},
            "heard next": ["second"],
            "total": {"a": 1.0 + 2.0 + 3.0, "b": 30.0},
            "gathered": ["of 0", "of 1", "of 2"],
        }


def trained(processes: Processes, folder: str) -> tuple[int, dict[str, float]]:
    """The seed that a process's dropout came from, and the adapter that it ended with, as sums."""
    import os

    import torch

    from stages.models import adapters
    from stages.runtime.events import ignore
    from stages.training.objective import Objective, task_loss
    from stages.training.recipes import Recipe
    from stages.training.training import train
    from stages.workspace.budgets import ClientTraining
    from stages.workspace.machine import Machine

    rank, count = str(processes.rank), str(processes.count)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    slm, machine, place = tuned("slm", dropout=0.5), Machine(), Path(folder)
    budget = ClientTraining(steps=2, batch_size=2)
    recipe = Recipe(budget=budget, learning_rates={"slm": 0.01}, clips={}, warmup_steps=0, seed=5)
    objective = Objective([slm], task_loss, {"slm_ft": 1.0})
    rows = examples([(5, 2), (1, 1), (9, 4)])
    train(objective, rows, recipe, machine=machine, folder=place, inputs={}, processes=processes, report=ignore)
    return torch.initial_seed(), {name: float(tensor.sum()) for name, tensor in adapters.take(slm.model).items()}


@pytest.mark.slow
def test_each_drops_out_by_a_seed_of_its_own_and_all_end_with_one_adapter(tmp_path: Path) -> None:
    first, second = call_together(2, trained, str(tmp_path / "work"))
    assert (first[0], second[0]) == (5, 6)
    assert first[1] == second[1]
