"""Training with differential privacy of each example: DP-SGD (Abadi et al., 2016) on an adapter.

A step takes every example with probability q by itself, shortens the gradient of each to the norm C, adds noise of
standard deviation sigma C to their sum, and divides by the expected number of examples. An example's loss is the mean
over its own answer tokens, so that its gradient does not depend on which others are drawn. Opacus gives the gradient of
each example and clips; sampling and noise come from a secret stream (`secret_random`), never from the run's seed. So no
run can be repeated; one that was stopped goes on from its checkpoint with new noise (why it may: `spending`).

Losses are computed from the data without noise. They are for the client's own log and eyes.

The noise is floating-point noise, not that of a discrete or snapped mechanism: epsilon holds for exact real numbers.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from stages.accounting.accountant import Charge
from stages.accounting.noise import SecretRandom
from stages.artefacts import checkpoints
from stages.data.examples import NO_LABEL, Example
from stages.files import writing
from stages.models.devices import naming_memory_knobs
from stages.models.held import held_in_bfloat16
from stages.models.packing import padded
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers
from stages.runtime.events import Event, Report
from stages.training import micro_batch
from stages.training.objective import Objective, Tokens
from stages.training.optimizers import optimizer_of
from stages.training.recipes import Outcome, Recipe, change
from stages.training.stopping import (
    refuse_runaway,
    refuse_unless_finite,
    refuse_unless_finite_before,
    snapshot,
    stopped_after,
)
from stages.workspace.machine import Machine

STATE = "state.pt"
MEMORY_KNOBS = "set micro_batch = 1 in machine.toml, give --dtype bfloat16, or agree on a smaller max_length"


class Reserve(Protocol):
    """Told a run's attempt, its steps done and its adapter's sha256; returns what may be spent, having written it."""

    def __call__(self, *, attempt: str, step: int, adapter: str) -> Charge:
        """As accounting.budget has it."""


class Finish(Protocol):
    """Told a run's attempt and the sha256 of the adapter that it ended with; writes that down."""

    def __call__(self, *, attempt: str, adapter: str) -> None:
        """As accounting.budget has it."""


def train(
    slm: Tuned,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    clip: float,
    reserve: Reserve,
    finish: Finish,
    machine: Machine,
    folder: Path,
    inputs: Mapping[str, Any],
    overwrite: bool = False,
    report: Report,
) -> Outcome:
    """Train the SLM's adapter in place, as training.train does; clip is C, reserve is asked before the first step.

    finish is told after the last one, when the adapter has been found finite, and before anything is published.
    Outcome.examples is the expected number, and tokens is 0: what was drawn tells about the data.
    """
    started, steps = time.monotonic(), recipe.budget.steps_for(len(examples))
    objective = Objective([slm], loss_of_examples, {"slm_ft": 1.0})
    start = snapshot(objective)
    checkpoint = checkpoints.begin(folder, inputs, anew=overwrite, report=report)
    run = Run.begun(objective, recipe, folder, checkpoint, steps=steps)
    charge = reserve(attempt=run.attempt, step=run.step, adapter=digest(objective))
    with naming_memory_knobs(MEMORY_KNOBS), held_in_bfloat16(slm), checkpoints.stopping() as stop:
        rows = _rows_at_once(objective, slm, examples, recipe, machine, report=report)
        before = objective.measure(examples, rows)
        hooks = GradSampleHooks(slm.model, loss_reduction="sum", strict=True)
        try:
            refuse_unless_finite_before(before)
            objective.train()
            optimizer = NoisyOptimizer(run.optimizer, charge, clip=clip, examples=len(examples))
            if largest := recipe.clips.get("slm"):
                optimizer.attach_step_hook(lambda one: nn.utils.clip_grad_norm_(one.params, largest))
            secret = SecretRandom()
            while run.step < steps:
                drawn = [examples[i] for i in draw(secret, len(examples), charge.sample_rate)]
                run.take(optimizer, drawn, rows, steps, report)
                if run.step % machine.checkpoint_steps == 0 or run.step == steps or stop.is_asked:
                    run.save()
                if stop.is_asked:
                    raise KeyboardInterrupt(stopped_after(run.step, steps))
            after = objective.measure(examples, rows)
            refuse_unless_finite(after, "after the last step")
            refuse_runaway(objective, start, "slm", "")  # whatever its loss, which no privacy covers
        except BadNumbers:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            hooks.cleanup()
    finish(attempt=run.attempt, adapter=digest(objective))
    metrics, ended = change(before, after), {"wall_s": round(time.monotonic() - started, 3)}
    return Outcome(
        steps=steps,
        examples=steps * min(recipe.budget.rows_per_step, len(examples)),
        tokens=0,
        metrics=metrics,
        log=[{"inputs": dict(inputs)}, *run.log, metrics | ended],
    )


def _rows_at_once(
    objective: Objective, slm: Tuned, examples: Sequence[Example], recipe: Recipe, machine: Machine, *, report: Report
) -> int:
    """As dry_step has it, for a step in which each row has a gradient of its own."""
    if machine.micro_batch != "auto":
        return machine.rows_at_once(recipe.budget)
    parameters = objective.adapter_parameters("slm")

    def step(rows: Sequence[Example]) -> None:
        hooks = GradSampleHooks(slm.model, loss_reduction="sum", strict=True)
        try:
            objective.train()
            gradients(objective, parameters, rows)
        finally:  # of a pass that was broken off they remember a half
            hooks.cleanup()

    return micro_batch.rows_at_once(objective, examples, recipe.budget, machine, step=step, report=report)


def loss_of_examples(logits: Mapping[str, Tensor], labels: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """Cross-entropy; tokens.labelled, [answers]: for each answer token, how many its example has."""
    each = F.cross_entropy(logits["slm"].float(), labels, ignore_index=NO_LABEL, reduction="none")
    return {"slm_ft": (each / tokens.labelled).sum()}


def digest(objective: Objective) -> str:
    """The sha256 of the adapter: of its names, and of its tensors to the last bit."""
    whole = hashlib.sha256()
    for name, tensor in sorted(objective.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        whole.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def draw(secret: SecretRandom, examples: int, sample_rate: float) -> list[int]:
    """Which examples a step takes: each by itself with this probability (Poisson sampling); there may be none."""
    return [int(i) for i in np.flatnonzero(secret.uniform(examples) < sample_rate)]


def take_step(objective: Objective, optimizer: NoisyOptimizer, drawn: Sequence[Example], rows: int) -> float:
    """One step on the examples drawn, so many rows at a time in memory. Returns the sum of their losses."""
    chunks = [drawn[start : start + rows] for start in range(0, len(drawn), rows)] or [[]]
    total = 0.0
    for number, chunk in enumerate(chunks, 1):
        total += gradients(objective, optimizer.params, chunk)
        optimizer.signal_skip_step(do_skip=number < len(chunks))  # so far only clipped and added up
        optimizer.step()
        optimizer.zero_grad()
    return total


def gradients(objective: Objective, parameters: Sequence[Any], chunk: Sequence[Example]) -> float:
    """Put each example's gradient, [examples, *shape], into parameter.grad_sample. Returns the sum of the losses."""
    if not chunk:  # nobody was drawn: the step is noise alone
        for parameter in parameters:
            parameter.grad_sample = torch.zeros(0, *parameter.shape, device=parameter.device)
        return 0.0
    batch = {name: tensor.to(objective.device) for name, tensor in padded(chunk).items()}  # packed, a row would be many
    own = torch.tensor([one.answer_tokens for one in chunk for _ in range(one.answer_tokens)], device=objective.device)
    loss = objective.parts(batch, Tokens(own, own))["slm_ft"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook")  # the first layer's input is frozen
        torch.autograd.backward(loss)
    for parameter in parameters:  # norms in bfloat16 would be off by half a percent, and C with them
        parameter.grad_sample = parameter.grad_sample.float()
    return float(loss.detach())


class NoisyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer, which clips and adds up, with noise from a secret stream."""

    def __init__(self, optimizer: torch.optim.Optimizer, charge: Charge, *, clip: float, examples: int) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=charge.noise_multiplier,
            max_grad_norm=clip,
            expected_batch_size=charge.sample_rate * examples,
        )
        self._secret = SecretRandom()

    def add_noise(self) -> None:
        """The sum of clipped gradients plus noise. In float64, rounded once: low bits of float32 noise can tell."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = torch.from_numpy(deviation * self._secret.normal(parameter.numel())).view(parameter.shape)
            parameter.grad = (parameter.summed_grad.cpu().double() + noise).to(parameter.device, parameter.dtype)


class Run:
    """What a stopped run goes on from: the adapter, the optimiser and its schedule, the steps done and their log."""

    def __init__(self, objective: Objective, recipe: Recipe, folder: Path, steps: int) -> None:
        self.step, self.attempt, self.log = 0, secrets.token_hex(8), list[dict[str, Any]]()
        self._objective, self._folder = objective, folder
        group = {"params": objective.adapter_parameters("slm"), "lr": recipe.learning_rates["slm"]}
        self.optimizer = optimizer_of(recipe.budget, [group])
        self.schedule = LambdaLR(self.optimizer, lambda step: recipe.factor(step, steps))

    @classmethod
    def begun(cls, objective: Objective, recipe: Recipe, folder: Path, checkpoint: Path | None, *, steps: int) -> Run:
        """From the checkpoint, or with one: before the reservation, so that there always is one to go on from."""
        run = cls(objective, recipe, folder, steps)
        if checkpoint:
            run.load(checkpoint)
        else:
            run.save()
        return run

    def take(self, optimizer: NoisyOptimizer, drawn: Sequence[Example], rows: int, steps: int, report: Report) -> None:
        """Take one step of so many, on the examples drawn, and record it."""
        loss = take_step(self._objective, optimizer, drawn, rows)
        self.schedule.step()
        values = {"slm_ft": loss / len(drawn)} if drawn else {}
        self.step += 1
        refuse_unless_finite(values, f"at step {self.step} of {steps}")
        self.log.append({"step": self.step, **values})
        report(Event("step", step=self.step, total=steps, values=values))

    def save(self) -> None:
        """Write a checkpoint; the one before goes when this one is whole."""
        state = {
            "step": self.step,
            "attempt": self.attempt,
            "log": self.log,
            "adapter": self._objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        content = io.BytesIO()
        torch.save(state, content)
        own = checkpoints.own(self._folder)
        if not checkpoints.is_kept(own):  # another process was first to publish
            return
        earlier, newest = list(own.glob("checkpoint-*")), own / f"checkpoint-{self.step}"
        with writing.publishing(newest) as draft:
            (draft / STATE).write_bytes(content.getbuffer())
            checkpoints.seal(draft)
        for one in earlier:
            if one != newest:
                shutil.rmtree(one, ignore_errors=True)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(checkpoint / STATE, map_location=self._objective.device, weights_only=True)
        self.step, self.attempt, self.log = state["step"], state["attempt"], state["log"]
        self._objective.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
