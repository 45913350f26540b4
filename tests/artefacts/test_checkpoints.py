"""training: a run that was stopped goes on from its last whole checkpoint to the very adapter of one that was not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import examples, tuned
from stages.artefacts.checkpoints import COMPLETE, own
from stages.models import adapters
from stages.runtime.events import Event
from stages.training.objective import Objective, mutual_losses
from stages.training.recipes import Outcome, Recipe
from stages.training.training import train
from stages.workspace.budgets import Distillation
from stages.workspace.machine import Machine

ROWS = examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6), (4, 3), (7, 2), (2, 2)])
STEPS, STOP, EVERY = 6, 5, 2
LOSSES = {"slm_ft", "slm_kd", "llm_ft", "llm_kd"}


class Run:
    """One process's training: fresh models, the steps it reported, the adapters it ended with."""

    def __init__(
        self,
        folder: Path,
        *,
        stop_at: int | None = None,
        die_at: int | None = None,
        after_step: Callable[[int], object] = lambda _: None,
        dropout: float = 0.0,
        **changed: Any,
    ) -> None:
        """stop_at: the step after which it ends at once. die_at: the micro-batch at which it does, of all it is fed."""
        pair = tuned("slm", width=16, dropout=dropout), tuned("llm", dropout=dropout)
        self.reported: list[int] = []
        self.warnings: list[str] = []
        self.fed = 0
        self.said: str | None = None
        self.outcome: Outcome | None = None

        def report(event: Event) -> None:
            if event.kind == "warning":
                self.warnings.append(event.text)
                return
            self.reported.append(event.step)
            if event.step == stop_at:
                raise KeyboardInterrupt
            after_step(event.step)

        def feed(*_: object) -> None:
            self.fed += 1
            if self.fed == die_at:
                raise KeyboardInterrupt

        inputs, machine = changed.pop("inputs", {"data": "a"}), changed.pop("machine", {})
        recipe = Recipe(
            budget=Distillation(steps=STEPS, batch_size=3),
            learning_rates={"slm": 0.01, "llm": 0.01},
            clips={},
            warmup_steps=2,
            seed=5,
            **changed,
        )
        objective = Objective(pair, mutual_losses(Distillation(steps=1)), dict.fromkeys(LOSSES, 1.0))
        objective.register_forward_pre_hook(feed)
        try:
            self.outcome = train(
                objective,
                ROWS,
                recipe,
                machine=Machine.model_validate({"checkpoint_steps": EVERY} | machine),
                folder=folder,
                inputs=inputs,
                report=report,
            )
        except KeyboardInterrupt as stop:
            self.said = str(stop)
        taken = [adapters.take(one.model) for one in pair]
        self.adapters = np.concatenate([tensors[name].ravel() for tensors in taken for name in sorted(tensors)])


def whole_checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("checkpoint-")) for path in folder.glob(f"*/*/{COMPLETE}"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("unbroken"))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was stopped in step 5, with checkpoints after steps 2 and 4."""
    Run(tmp_path / "work", stop_at=STOP)
    assert whole_checkpoints(tmp_path / "work") == [2, 4]
    return tmp_path / "work"


@pytest.mark.parametrize("machine", [{}, {"micro_batch": 1}], ids=["same machine.toml", "micro_batch lowered"])
def test_a_stopped_run_goes_on_to_the_adapter_of_an_unbroken_one(
    stopped: Path, unbroken: Run, machine: dict[str, Any]
) -> None:
    resumed = Run(stopped, machine=machine)
    assert resumed.reported == [5, 6]
    np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-5 if machine else 1e-6)


@pytest.mark.parametrize(
    "changed",
    [{"alternating": True}, {"dropout": 0.3}, {"proximal": 5.0}, {"schedule": "cosine", "rounds_done": 1, "rounds": 3}],
    ids=["alternating", "dropout", "near where it began", "falling"],
)
def test_so_does_one_that_takes_turns_drops_out_or_is_held_near_its_start(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    unbroken = Run(tmp_path / "unbroken", **changed)
    Run(tmp_path / "work", stop_at=STOP, **changed)
    resumed = Run(tmp_path / "work", **changed)
    assert resumed.reported == [5, 6]
    np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alternating", [False, True])
def test_the_log_of_a_resumed_run_has_every_step_once_and_every_loss(tmp_path: Path, alternating: bool) -> None:
    Run(tmp_path, stop_at=2, machine={"checkpoint_steps": 1}, alternating=alternating)
    outcome = Run(tmp_path, machine={"checkpoint_steps": 1}, alternating=alternating).outcome
    assert outcome is not None
    steps = [line for line in outcome.log if "step" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(line.keys() == {"step"} | LOSSES for line in steps)


def truncate(checkpoint: Path) -> None:
    """What a machine that went down while writing leaves."""
    for path in checkpoint.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    (checkpoint / COMPLETE).unlink()


def test_a_checkpoint_without_its_mark_is_passed_over_for_the_one_before(stopped: Path, unbroken: Run) -> None:
    truncate(own(stopped) / "checkpoint-4")
    resumed = Run(stopped)
    assert resumed.reported == [3, 4, 5, 6]
    np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth", COMPLETE])
def test_a_checkpoint_with_one_flipped_bit_is_passed_over_and_that_is_said(
    stopped: Path, unbroken: Run, name: str
) -> None:
    path = own(stopped) / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = Run(stopped)
    assert resumed.reported == [3, 4, 5, 6]
    assert [warning for warning in resumed.warnings if "checkpoint-4" in warning and "passed over" in warning]
    np.testing.assert_array_equal(resumed.adapters, unbroken.adapters)


def test_a_checkpoint_with_a_file_that_was_not_sealed_is_passed_over(stopped: Path) -> None:
    (own(stopped) / "checkpoint-4" / "scaler.pt").write_bytes(b"from elsewhere")
    assert Run(stopped).reported == [3, 4, 5, 6]


def test_without_any_whole_checkpoint_training_begins_again(stopped: Path, unbroken: Run) -> None:
    truncate(own(stopped) / "checkpoint-2")
    truncate(own(stopped) / "checkpoint-4")
    resumed = Run(stopped)
    assert resumed.reported == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-6)


def test_checkpoints_of_other_inputs_are_cleared_away(stopped: Path, unbroken: Run) -> None:
    left_over = own(stopped) / "checkpoint-4" / "left-over"
    left_over.touch()
    resumed = Run(stopped, inputs={"data": "b"}, stop_at=3)
    assert resumed.reported == [1, 2, 3]
    assert whole_checkpoints(stopped) == [2]
    assert not left_over.exists()


def test_a_run_that_was_stopped_before_it_could_publish_trains_no_step_again(tmp_path: Path, unbroken: Run) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    assert (first.reported, second.reported) == ([1, 2, 3, 4, 5, 6], [])
    np.testing.assert_array_equal(second.adapters, first.adapters)
    assert first.outcome is not None
    assert second.outcome is not None
    assert second.outcome.metrics["slm_ft_after"] == first.outcome.metrics["slm_ft_after"]


@pytest.mark.slow
@pytest.mark.parametrize("alternating", [False, True])
def test_killed_in_any_step_it_goes_on_to_the_adapter_of_an_unbroken_run(tmp_path: Path, alternating: bool) -> None:
    settings: dict[str, Any] = {
        "alternating": alternating,
        "dropout": 0.3,
        "machine": {"checkpoint_steps": 1, "micro_batch": 1},  # three micro-batches to a step, to each of its turns
    }
    unbroken = Run(tmp_path / "unbroken", **settings)
    per_step = 3 * (2 if alternating else 1)
    assert unbroken.fed == STEPS * per_step
    for number in range(1, unbroken.fed + 1, 2):  # at the beginning, in the middle and at the end of steps and turns
        folder = tmp_path / str(number)
        killed, resumed = Run(folder, die_at=number, **settings), Run(folder, **settings)
        assert killed.reported == list(range(1, (number - 1) // per_step + 1))
        assert killed.reported + resumed.reported == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-6)
        shutil.rmtree(folder)


# --- told to stop


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(
    tmp_path: Path, number: signal.Signals, alternating: bool
) -> None:
    unbroken = Run(tmp_path / "unbroken", dropout=0.3, alternating=alternating)
    before = signal.getsignal(number)

    def tell(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    told = Run(tmp_path / "work", after_step=tell, dropout=0.3, alternating=alternating)
    assert told.said == "stopped after step 3 of 6: the same command goes on from there"
    assert signal.getsignal(number) == before
    resumed = Run(tmp_path / "work", dropout=0.3, alternating=alternating)
    assert (told.reported, resumed.reported) == ([1, 2, 3], [4, 5, 6])
    np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-6)


def test_a_second_signal_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("at once")

    def tell(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        told = Run(tmp_path, after_step=tell)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (told.said, told.reported) == ("at once", [1, 2, 3])
    assert whole_checkpoints(tmp_path) == [2]


# --- beside other processes


def nobody() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize("living", [True, False])
def test_it_goes_on_from_the_newest_checkpoint_of_any_process_and_removes_none_of_a_living_one(
    stopped: Path, unbroken: Run, living: bool
) -> None:
    host = own(stopped).name.rpartition("-")[0]
    other = own(stopped).rename(stopped / (f"{host}-{os.getppid()}" if living else f"{host}-{nobody()}"))
    abroad = shutil.copytree(other, stopped / "elsewhere-1")
    shutil.rmtree(abroad / "checkpoint-4")
    resumed = Run(stopped)
    assert resumed.reported == [5, 6]
    np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-6)
    assert other.exists() == living
    assert sorted(path.name for path in abroad.iterdir()) == ["checkpoint-2", "inputs.json"]


def test_a_checkpoint_that_its_process_is_removing_is_passed_over_for_the_one_before(
    stopped: Path, unbroken: Run
) -> None:
    other = own(stopped).rename(stopped / "elsewhere-1")
    (other / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = Run(stopped)
    assert resumed.reported == [3, 4, 5, 6]
    np.testing.assert_allclose(resumed.adapters, unbroken.adapters, rtol=0, atol=1e-6)


def test_where_another_process_published_first_and_removed_them_all_it_ends_without_checkpoints(
    tmp_path: Path, unbroken: Run
) -> None:
    folder = tmp_path / "work"
    run = Run(folder, after_step=lambda step: shutil.rmtree(folder) if step == 3 else None)
    np.testing.assert_array_equal(run.adapters, unbroken.adapters)
    assert not folder.exists()


def test_it_does_not_go_on_from_one_of_other_inputs_of_a_process_that_lives(stopped: Path) -> None:
    other = own(stopped).rename(stopped / "elsewhere-1")
    resumed = Run(stopped, inputs={"data": "b"}, stop_at=3)
    assert resumed.reported == [1, 2, 3]
    assert (other / "checkpoint-4" / COMPLETE).exists()
