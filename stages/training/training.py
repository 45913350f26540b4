"""One way to train adapters, for clients and server alike: an objective, a schedule of rows, and Trainer.

A stage that was killed goes on from its last checkpoint with the same rows in the same order.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stages.artefacts import checkpoints
from stages.data.examples import Example
from stages.files import faults
from stages.files.seclusion import shutting_out
from stages.models.devices import naming_memory_knobs
from stages.models.fused import fused_in
from stages.models.held import held_in_bfloat16
from stages.runtime import quiet
from stages.runtime.errors import BadNumbers, Refused, StorageProblem, UsageProblem
from stages.runtime.events import Event, Report
from stages.runtime.processes import ALONE, Processes
from stages.training import trackers
from stages.training.micro_batch import rows_at_once
from stages.training.objective import Objective
from stages.training.optimizers import optimizer_of
from stages.training.recipes import Outcome, Recipe, change
from stages.training.schedule import MicroBatches, schedule
from stages.training.stopping import (
    refuse_runaways,
    refuse_unless_finite,
    refuse_unless_finite_before,
    snapshot,
    stopped_after,
)
from stages.training.trackers import UNTRACKED, Tracking
from stages.workspace.machine import Machine

STOP = "stop"
"""Summed over processes with a step's losses: how many of them were told to stop."""


def train(
    objective: Objective,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    machine: Machine,
    folder: Path,
    inputs: Mapping[str, Any],
    overwrite: bool = False,
    tracking: Tracking = UNTRACKED,
    processes: Processes = ALONE,
    report: Report,
) -> Outcome:
    """Train the objective's adapters in place.

    folder: checkpoints go here, and a run with equal inputs that was stopped goes on from them, unless overwrite says
    to begin anew; the caller removes it once the result is published. tracking: where else each step's losses go.
    processes: each does its share of every step's micro-batches, and all end with the same adapters and losses.
    Raises BadNumbers if a loss becomes NaN or an adapter has run away, which removes the checkpoints too, or if memory
    runs out; KeyboardInterrupt when SIGTERM or SIGUSR1 came, after the step that was being done and its checkpoint.
    """
    started, steps = time.monotonic(), schedule(len(examples), recipe.budget, recipe.seed)
    with naming_memory_knobs():
        rows = rows_at_once(objective, examples, recipe.budget, machine, report=report)
    dataset = MicroBatches(steps, examples, rows, objective, alternating=recipe.alternating, processes=processes.count)
    own, checkpoint = _begin(folder, inputs, anew=overwrite, processes=processes, report=report)
    tracking = tracking if processes.is_first else UNTRACKED
    per_step, count = dataset.per_step // processes.count, recipe.turns * len(steps)
    arguments = _arguments(
        recipe, machine, tracking, folder=own, device=objective.device, steps=count, per_step=per_step
    )
    with naming_memory_knobs(), shutting_out(own), trackers.named(tracking), held_in_bfloat16(*objective.tuned):
        before, start = objective.measure(examples, rows), snapshot(objective)
        callbacks = trackers.callbacks(tracking, after_step=checkpoints.step_of(checkpoint) if checkpoint else 0)
        trainer = _trainer(objective, dataset, recipe, processes, arguments=arguments, callbacks=callbacks)
        log = trainer.log if tracking.trackers else None
        try:
            refuse_unless_finite_before(before)
            with checkpoints.stopping() as stop, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
                watch = _Watch(objective, recipe, processes, steps=len(steps), log=log, stop=stop, report=report)
                trainer.add_callback(watch)
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if stop.is_asked:
                raise KeyboardInterrupt(stopped_after(trainer.state.global_step // recipe.turns, len(steps)))
            after = objective.measure(examples, rows)
            refuse_runaways(objective, start, before, after)
        except BadNumbers:
            if processes.is_first:
                checkpoints.drop(own)
            raise
    ended = {"wall_s": round(time.monotonic() - started, 3)}
    return Outcome(
        steps=len(steps),
        examples=len(steps) * recipe.budget.rows_per_step,
        tokens=sum(examples[i].answer_tokens for step in steps for i in step),
        metrics=change(before, after),
        log=[{"inputs": dict(inputs), "fused": fused_in(objective)}, *_steps(trainer.state.log_history), ended],
    )


def _begin(
    folder: Path, inputs: Mapping[str, Any], *, anew: bool, processes: Processes, report: Report
) -> tuple[Path, Path | None]:
    """The run's own folder, and the checkpoint to go on from. Raises Refused where processes would not train alike."""
    found = None
    if processes.is_first:
        found = checkpoints.own(folder), checkpoints.begin(folder, inputs, anew=anew, report=report)
    own, checkpoint = processes.agree(found)
    if processes.agree(dict(inputs)) != inputs:
        mend = "give all processes the same base models, settings and --dtype"
        raise Refused(f"process {processes.rank} would train something else than the first", mend=mend)
    return own, checkpoint


def _make_ready(objective: Objective, arguments: TrainingArguments, processes: Processes) -> None:
    """Raise UsageProblem unless Trainer counts the same processes, and keep frozen parameters out of their exchange."""
    if arguments.world_size != processes.count:
        message = f"Trainer takes this to be one of {arguments.world_size} processes, it is one of {processes.count}"
        raise UsageProblem(message, mend="start them with torchrun, and no ACCELERATE_ variable in the environment")
    frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in objective.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen + buffers)  # type: ignore[no-untyped-call]


def _arguments(
    recipe: Recipe,
    machine: Machine,
    tracking: Tracking,
    *,
    folder: Path,
    device: torch.device,
    steps: int,
    per_step: int,
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        train_sampling_strategy="sequential",  # the schedule is shuffled; Trainer would shuffle micro-batches
        per_device_train_batch_size=1,  # an item is a micro-batch already
        gradient_accumulation_steps=per_step,
        lr_scheduler_type="cosine" if recipe.decays else "constant_with_warmup",
        warmup_steps=recipe.warmup_steps * recipe.turns,
        max_grad_norm=0,  # clipping both models together would couple them; _Watch clips each by itself
        seed=recipe.seed,
        save_steps=machine.checkpoint_steps * recipe.turns,  # never between the two turns of a step
        save_total_limit=2,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to=[name for name in tracking.trackers if name != "tensorboard"],  # trackers makes its callback
        run_name=tracking.run or None,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=recipe.alternating,
    )


def _optimizer(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """A new one with a group for each model: eta_theta and eta_omega of Algorithm 1."""
    groups = [
        {"params": objective.adapter_parameters(role), "lr": rate} for role, rate in recipe.learning_rates.items()
    ]
    return optimizer_of(recipe.budget, groups, is_whole=objective.is_whole)


def _trainer(
    objective: Objective,
    dataset: MicroBatches,
    recipe: Recipe,
    processes: Processes,
    *,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> _Trainer:
    """Trainer, ready to begin; it says nothing."""
    _make_ready(objective, arguments, processes)
    optimizer, falls = _optimizer(objective, recipe), recipe.schedule != "constant"
    factors = LambdaLR(optimizer, lambda turn: recipe.factor(turn, arguments.max_steps)) if falls else None
    trainer = _Trainer(
        processes,
        model=objective,
        args=arguments,
        train_dataset=dataset,
        data_collator=_only,
        optimizers=(optimizer, factors),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if processes.count > 1:
        torch.manual_seed(recipe.seed + processes.rank)  # else all would drop out alike
    return trainer


class _Trainer(Trainer):
    """Trainer, silent while it writes a checkpoint, which is whole or not taken, and fails as any file of ours does."""

    def __init__(self, processes: Processes, **settings: Any) -> None:
        super().__init__(**settings)
        self._processes = processes

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        own = Path(str(self.args.output_dir))
        if not self._processes.agree(checkpoints.is_kept(own)):  # another run was first to publish
            return
        try:
            with quiet.libraries():
                super()._save_checkpoint(*args, **kwargs)
            self._processes.wait_for_all()
            if self._processes.is_first:
                checkpoints.seal(own / f"checkpoint-{self.state.global_step}")
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own way to say "disk full"
            if not checkpoints.is_kept(own):
                shutil.rmtree(own, ignore_errors=True)
                return
            message = f"a checkpoint cannot be written: {str(error).splitlines()[0]}"
            raise StorageProblem(message, where=self.args.output_dir, mend=faults.storage_mend(error)) from error


class _Watch(TrainerCallback):
    """Holds adapters near their start if that is asked for, clips each model's gradient, and watches every step.

    It records and reports the losses, and stops when told to.

    log: Trainer's, through which trackers get the losses.
    """

    def __init__(
        self,
        objective: Objective,
        recipe: Recipe,
        processes: Processes,
        *,
        steps: int,
        log: Callable[[dict[str, float]], None] | None,
        stop: checkpoints.Stop,
        report: Report,
    ) -> None:
        self._objective, self._recipe, self._report, self._steps = objective, recipe, report, steps
        self._log, self._stop, self._processes = log, stop, processes
        held = recipe.learning_rates if recipe.proximal else ()
        self._held = [(one, one.detach().clone()) for role in held for one in objective.adapter_parameters(role)]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for parameter, start in self._held:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self._recipe.proximal)
        for role, largest in self._recipe.clips.items():
            if largest is not None:
                nn.utils.clip_grad_norm_(self._objective.adapter_parameters(role), largest)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._recipe.turns:
            return
        step, asked = state.global_step // self._recipe.turns, {STOP: float(self._stop.is_asked)}
        losses = self._processes.total(self._objective.pop_losses() | asked)
        self._stop.is_asked = losses.pop(STOP) > 0
        refuse_unless_finite(losses, f"at step {step} of {self._steps}")
        state.log_history.append({"step": step, **losses})
        if self._log is not None:
            self._log(dict(losses))
        self._report(Event("step", step=step, total=self._steps, values=losses))
        if self._stop.is_asked:
            control.should_save = control.should_training_stop = True


def _steps(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of _Watch, without those of Trainer's log, which names the epoch in each."""
    return [entry for entry in history if "epoch" not in entry]


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Trainer's collator: the one micro-batch it was handed."""
    return items[0]
