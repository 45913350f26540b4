"""Whatever runs on a GPU, on one that is not there: the right values, nothing left on the CPU, no waiting unnoticed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors.numpy
import torch
from pretended_cuda import CUDA, Cuda, Pretended, cuda, moved
from transformers import AutoTokenizer

from builders import Family, examples, tuned
from stages.co_distill import co_distill
from stages.data.examples import Example
from stages.distillation import captures, top_k_logits
from stages.distillation.knowledge import Knowledge
from stages.distillation.learning import Learning, Pupil
from stages.evaluation.harness import Harness
from stages.export.export import export
from stages.federation.run import run
from stages.models import packing
from stages.models.devices import device_of, precision
from stages.models.tuned import Tuned
from stages.training.objective import Objective, mutual_losses, task_loss
from stages.workspace.budgets import Distillation
from stages.workspace.machine import Machine
from stages.workspace.paths import Workspace
from tests.benchmarks import knowledge

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")

FAMILIES: tuple[Family, ...] = ("gpt2", "opt", "llama", "qwen2", "gemma3_text")
ROWS = examples([(5, 2), (3, 1), (7, 3), (2, 2)])
PUPILS = [Pupil(one.input_ids, one.prompt_tokens, row) for row, one in enumerate(ROWS)]
WEIGHTS = dict.fromkeys(("slm_ft", "slm_kd", "llm_ft", "llm_kd"), 1.0) | {"slm_taught": 0.0, "llm_taught": 0.0}


@pytest.fixture
def device() -> Iterator[Cuda]:
    with cuda() as found:
        yield found


# --- steps of training, a model at a time


Make = Callable[[Callable[..., Tuned]], tuple[Objective, list[Example]]]


def client_train(model: Callable[..., Tuned]) -> tuple[Objective, list[Example]]:
    return Objective([model("slm")], task_loss, WEIGHTS), ROWS


def mutual(model: Callable[..., Tuned]) -> tuple[Objective, list[Example]]:
    settings = Distillation(steps=1, select="min-ce", divergence="jensen-shannon")
    return Objective([model("slm"), model("llm")], mutual_losses(settings), WEIGHTS), ROWS


def beside_a_capture(model: Callable[..., Tuned]) -> tuple[Objective, list[Example]]:
    source = top_k_logits.Source("d" * 64, top_k_logits.rows_sha256(ROWS), 1.0, 40, 8)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "work"
        found = captures.capture(
            model("llm"), ROWS, source, rows=2, every=9, folder=place, inputs={}, report=lambda event: None
        )
    taught: list[Example] = [*captures.taught(ROWS, found)]
    return captures.TaughtObjective(model("slm"), found, Distillation(steps=1), WEIGHTS), taught


def learning(kind: Literal["forward", "spans", "sorted"], *, merged: bool = False) -> Make:
    """merged: the teacher takes some of the student's tokens for one."""

    def make(model: Callable[..., Tuned]) -> tuple[Objective, list[Example]]:
        settings = Distillation(steps=1, divergence=kind, top_k=8)
        told: Knowledge = knowledge.knows(model("llm"), PUPILS)
        lesson = knowledge.lesson(told, PUPILS, "tokens" if kind == "forward" else kind)
        if merged:
            lesson = replace(lesson, student_outcomes=np.arange(40, dtype=np.int32) % 30)
        return Learning(model("slm"), [lesson], [np.ones(len(PUPILS), np.float32)], settings, WEIGHTS), list(PUPILS)

    return make


STEPS: dict[str, Make] = {
    "client-train": client_train,
    "co-distill": mutual,
    "beside a capture": beside_a_capture,
    "learning tokens": learning("forward"),
    "learning merged tokens": learning("forward", merged=True),
    "learning spans": learning("spans"),
    "learning sorted": learning("sorted"),
}
WAITS = {"co-distill": 8, "learning tokens": 7, "learning merged tokens": 13, "learning spans": 13}
"""How often a step has the CPU wait for a GPU, at most: here rows are selected, or positions, by masks."""
CASES = [(step, family) for step in ("client-train", "co-distill") for family in FAMILIES]
CASES += [(step, "gpt2") for step in STEPS if step not in ("client-train", "co-distill")]


def model_of(family: Family, *, is_bfloat16: bool, is_there: bool) -> Callable[..., Tuned]:
    """Makes models as they are loaded: on a GPU bfloat16 weights, on a CPU float32 ones under autocast."""

    def make(role: Literal["slm", "llm"]) -> Tuned:
        one = tuned(role, family=family)
        if is_bfloat16 and is_there:
            for parameter in one.model.parameters():
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
        if is_there:
            moved(one.model)
        return replace(one, autocast=is_bfloat16)

    return make


def taken(objective: Objective, rows: list[Example], to: torch.device) -> dict[str, Any]:
    """The gradients of one step."""
    objective.train()
    batch = {name: tensor.to(to) for name, tensor in objective.collate(rows).items()}
    objective(**batch)["loss"].backward()
    return {name: one.grad for name, one in objective.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("is_bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("step", "family"), CASES)
def test_a_step_has_the_losses_and_the_gradients_that_it_has_on_the_cpu(
    step: str, family: Family, is_bfloat16: bool
) -> None:
    objective, rows = STEPS[step](model_of(family, is_bfloat16=is_bfloat16, is_there=False))
    known, losses = taken(objective, rows, torch.device("cpu")), objective.pop_losses()
    with cuda() as device:
        objective, rows = STEPS[step](model_of(family, is_bfloat16=is_bfloat16, is_there=True))
        device.waits.clear()
        found, waits = taken(objective, rows, CUDA), device.waits.total()
        longest = packing.packs(objective.models["slm"])
        assert waits <= WAITS.get(step, 0), device.waits
        assert objective.pop_losses() == pytest.approx(losses, rel=5e-2 if is_bfloat16 else 1e-5, abs=1e-5)
    assert longest == tuned("slm", family=family).longest_packed
    assert found.keys() == known.keys()
    for name, gradient in found.items():
        assert isinstance(gradient, Pretended)
        assert gradient.dtype == torch.float32
        if not is_bfloat16:
            torch.testing.assert_close(gradient.held, known[name], rtol=1e-3, atol=1e-5)


# --- whole stages


def adapters_of(folder: Path, rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """All adapters of these rounds of a workspace, by their paths."""
    places = (path for path in sorted(folder.rglob("adapter_model.safetensors")))
    shown = {str(path.relative_to(folder)): path for path in places}
    wanted = [f"round-{number:04d}" for number in range(1, rounds + 1)]
    return {
        name: safetensors.numpy.load_file(path) for name, path in shown.items() if any(one in name for one in wanted)
    }


def check_alike(folder: Path, other: Path, rounds: int = 1) -> None:
    """Two workspaces have the same adapters but for rounding."""
    found, known = adapters_of(folder, rounds), adapters_of(other, rounds)
    assert found.keys() == known.keys()
    assert len(known) > 4
    for name, tensors in known.items():
        for key, tensor in tensors.items():
            np.testing.assert_allclose(found[name][key], tensor, atol=2e-4, err_msg=f"{name} {key}")


def test_a_round_ends_with_the_adapters_that_it_has_on_the_cpu(
    workspace_folder: Path, finished_once: Path, device: Cuda
) -> None:
    (workspace_folder / "machine.toml").write_text('device = "cuda"\n')
    (scores, *_) = run(Workspace(workspace_folder), rounds=range(1, 2))
    assert scores["tasks"]["colours"]["questions"] == 12
    assert device.waits  # it was there
    check_alike(workspace_folder, finished_once)


def test_so_does_a_round_of_fedmkt(unlike_folder: Path, unlike_once: Path, device: Cuda) -> None:
    (unlike_folder / "machine.toml").write_text('device = "cuda"\n')
    run(Workspace(unlike_folder), rounds=range(1, 2), scores=False)
    check_alike(unlike_folder, unlike_once)


def test_so_does_a_stage_that_saves_memory(finished: Path, finished_once: Path, device: Cuda) -> None:
    saving = 'gradient_checkpointing = true\noffload_idle = true\nmicro_batch = "auto"\n'
    (finished / "machine.toml").write_text(f'device = "cuda"\n{saving}')
    co_distill(Workspace(finished), round=1, overwrite=True)
    check_alike(finished, finished_once)


def test_two_phases_and_an_export_run_in_bfloat16(finished: Path, device: Cuda) -> None:
    (finished / "machine.toml").write_text('device = "cuda"\ndtype = "bfloat16"\n')
    for role in ("llm", "slm"):
        co_distill(Workspace(finished), round=2, phase="capture", model=role, top_k=8, overwrite=True)
    made = co_distill(Workspace(finished), round=2, phase="train", overwrite=True)
    assert made.dtype == "bfloat16"
    assert made.metrics["slm_ft_after"] < made.metrics["slm_ft_before"]
    assert export(Workspace(finished), round=2, merged=True)["proof"]["error"] < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_as_likely_as_on_the_cpu(family: Family, base_models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_models / "slm")
    requests = [(("", ""), [5, 6, 7, 8], [9]), (("", ""), [5, 6, 7, 8], [10, 11, 12]), (("", ""), [3], [4, 5])]

    def likelihoods(model: Any) -> list[float]:
        lm = Harness(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)
        lm.report = lambda event: None
        assert lm._longest_row == min(packing.own_window(model.config), packing.UNBOUNDED)  # prompts are read once
        return [nats for nats, _ in lm._loglikelihood_tokens(requests)]

    known = likelihoods(tuned("slm", family=family).model.get_base_model())
    with cuda():
        found = likelihoods(moved(tuned("slm", family=family).model.get_base_model()))
    assert found == pytest.approx(known, abs=1e-4)


def test_a_gpu_is_taken_where_there_is_one_and_holds_bfloat16(workspace_folder: Path, device: Cuda) -> None:
    assert device_of(Machine()) == torch.device("cuda")
    assert precision(Workspace(workspace_folder), "slm", CUDA) == (torch.float32, torch.float32)
    (workspace_folder / "machine.toml").write_text('dtype = "auto"\n')
    assert precision(Workspace(workspace_folder), "slm", CUDA) == (torch.bfloat16, torch.bfloat16)


def test_a_tensor_left_on_the_cpu_is_found(device: Cuda) -> None:
    there = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="on the CPU"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="on the CPU"):
        there[torch.tensor([0, 1])]
    assert not device.waits
    assert float((there * 2.0).sum()) == 6
    assert device.waits.total() == 1
