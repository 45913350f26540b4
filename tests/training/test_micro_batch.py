"""dry_step: as many rows as fit, found by trying, with nothing left behind and the numbers of training unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import adapters, examples, tuned
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.models.adapters import put, take
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event
from stages.training import micro_batch
from stages.training.objective import Objective, task_loss
from stages.workspace.budgets import ClientTraining
from stages.workspace.machine import Machine
from stages.workspace.paths import Workspace

AUTO = Machine(micro_batch="auto")
BUDGET = ClientTraining(steps=1, batch_size=8)
ROWS = examples([(length, 2) for length in (3, 9, 5, 20, 7, 11, 2, 4, 6, 8, 10, 12)])


@pytest.fixture
def objective() -> Objective:
    return Objective([tuned("slm")], task_loss, {"slm_ft": 1.0})


def out_of_memory_above(limit: int, tried: list[int]) -> Callable[[Any, Any], None]:
    """A hook on a model that has room for so many tokens: beyond them it says what torch says."""

    def hook(module: Any, inputs: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"].numel()
        tried.append(tokens)
        if tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return hook  # type: ignore[return-value]


def test_half_as_many_rows_are_tried_as_often_as_memory_runs_out(objective: Objective) -> None:
    tried: list[int] = []
    objective.models["slm"].register_forward_pre_hook(out_of_memory_above(70, tried), with_kwargs=True)  # type: ignore[arg-type]
    told: list[Event] = []
    # The eight longest have 22, 14, 13, 12, 11, 10, 9, 8 tokens and the four longest 61 of them, packed.
    assert micro_batch.rows_at_once(objective, ROWS, BUDGET, AUTO, report=told.append) == 4
    assert tried == [22 + 14 + 13 + 12 + 11 + 10 + 9 + 8, 22 + 14 + 13 + 12]
    assert [event.text for event in told] == ["4 of 8 rows at once fit in memory"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=["python", "cpu", "cublas", "driver"],
)
def test_memory_runs_out_in_many_words(error: Exception) -> None:
    tried: list[int] = []

    def step(rows: Any) -> None:
        tried.append(len(rows))
        if len(rows) > 2:
            raise error

    assert micro_batch.rows_that_fit(step, ROWS, 8) == 2
    assert tried == [8, 4, 2]


def test_where_all_fit_all_are_taken_and_never_more_than_there_are(objective: Objective) -> None:
    assert micro_batch.rows_at_once(objective, ROWS, BUDGET, AUTO) == 8
    assert micro_batch.rows_at_once(objective, ROWS[:3], BUDGET, AUTO) == 3


def test_where_not_even_one_fits_it_says_what_to_do(objective: Objective) -> None:
    objective.models["slm"].register_forward_pre_hook(out_of_memory_above(0, []), with_kwargs=True)  # type: ignore[arg-type]
    with pytest.raises(BadNumbers, match="not even one row fits") as caught:
        micro_batch.rows_at_once(objective, ROWS, BUDGET, AUTO)
    assert "gradient_checkpointing" in str(caught.value.mend)


def test_another_failure_is_no_lack_of_memory(objective: Objective) -> None:
    def broken(rows: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        micro_batch.rows_that_fit(broken, ROWS, 8)


def test_nothing_is_left_behind(objective: Objective) -> None:
    objective.eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    drawn = torch.get_rng_state()
    micro_batch.rows_at_once(objective, ROWS, BUDGET, AUTO)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert objective.last == {}
    assert not objective.training


def test_a_number_is_taken_at_its_word(objective: Objective) -> None:
    objective.models["slm"].register_forward_pre_hook(out_of_memory_above(0, []), with_kwargs=True)  # type: ignore[arg-type]
    assert micro_batch.rows_at_once(objective, ROWS, BUDGET, Machine(micro_batch=3)) == 3
    assert micro_batch.rows_at_once(objective, ROWS, BUDGET, Machine(micro_batch=30)) == 8
    assert micro_batch.rows_at_once(objective, ROWS, BUDGET, Machine()) == 8


def test_with_several_processes_it_is_refused(tmp_path: Path, objective: Objective) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UsageProblem, match="is for one process"):
            micro_batch.rows_at_once(objective, ROWS, BUDGET, AUTO)
    finally:
        torch.distributed.destroy_process_group()


def weights_of(folder: Path, *places: str) -> list[np.ndarray]:
    import safetensors.numpy

    found = [safetensors.numpy.load_file(folder / place / "adapter_model.safetensors") for place in places]
    return [tensors[name] for tensors in found for name in sorted(tensors)]


PLACES = ("exchange/round-0001/client-1", "private/server/round-0001/slm", "private/server/round-0001/llm")


@pytest.mark.parametrize("room", [10_000, 40])
def test_the_adapters_are_the_same_whatever_is_found(
    room: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, bytes_before = weights_of(finished, *PLACES), adapters(finished)
    (finished / "machine.toml").write_text('micro_batch = "auto"\n')
    told: list[str] = []
    collate = Objective.collate

    def crowded(self: Objective, rows: Any, step: Any = None) -> dict[str, Tensor]:
        if sum(len(row.input_ids) for row in rows) > room:  # four rows of the data have 48
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return collate(self, rows, step)

    monkeypatch.setattr(Objective, "collate", crowded)
    report: Callable[[Event], None] = lambda event: told.append(event.text)  # noqa: E731
    client_train(Workspace(finished), round=1, client=1, overwrite=True, report=report)
    co_distill(Workspace(finished), round=1, overwrite=True, report=report)
    fits = 4 if room > 48 else 2
    assert told.count(f"{fits} of 4 rows at once fit in memory") == 2
    if fits == 4:
        assert {name: adapters(finished)[f"{name}/adapter_model.safetensors"] for name in PLACES} == {
            name: bytes_before[f"{name}/adapter_model.safetensors"] for name in PLACES
        }
    for one, other in itertools.zip_longest(before, weights_of(finished, *PLACES)):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_capture_finds_its_rows_too(finished: Path) -> None:
    (finished / "machine.toml").write_text('micro_batch = "auto"\n')
    told: list[str] = []
    co_distill(Workspace(finished), round=1, phase="capture", model="llm", report=lambda event: told.append(event.text))
    assert "4 of 4 rows at once fit in memory" in told


def test_a_private_step_counts_each_rows_own_gradient() -> None:
    from stages.privacy import dp_sgd
    from stages.training.recipes import Recipe

    one = tuned("slm")
    objective = Objective([one], dp_sgd.loss_of_examples, {"slm_ft": 1.0})
    before = take(one.model)
    seen: list[int] = []
    plain = dp_sgd.gradients

    def crowded(objective: Objective, parameters: Any, rows: Any) -> float:
        seen.append(len(rows))
        found = plain(objective, parameters, rows)
        assert all(parameter.grad_sample.shape[0] == len(rows) for parameter in parameters)
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    recipe = Recipe(BUDGET, {"slm": 1e-3}, {"slm": None}, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp_sgd, "gradients", crowded)
        found = dp_sgd._rows_at_once(objective, one, ROWS, recipe, AUTO, report=lambda event: None)
    assert (found, seen) == (2, [8, 4, 2])
    put(one.model, before)
    assert not any(getattr(parameter, "grad_sample", None) is not None for parameter in objective.parameters())
