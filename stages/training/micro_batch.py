"""How many rows go through a model at once: as machine.toml says, or, with micro_batch = "auto", as many as fit.

What fits is found by trying: a step on the longest rows, forward and backward, with half as many as often as memory
runs out. It changes neither the adapters nor what chance draws later, and the numbers of training do not depend on it:
a step's losses are divided by the tokens of the whole step, however it is cut.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import find_executable_batch_size

from stages.data.examples import Example
from stages.models.base_loading import is_out_of_memory
from stages.models.devices import MEMORY_KNOBS
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.training.objective import Objective
from stages.workspace.budgets import Budget
from stages.workspace.machine import Machine


def rows_at_once(
    objective: Objective,
    examples: Sequence[Example],
    budget: Budget,
    machine: Machine,
    *,
    step: Callable[[Sequence[Example]], object] | None = None,
    report: Report = ignore,
) -> int:
    """How many rows a forward pass takes at most. step: one on these rows; by default the objective's, and backward."""
    if machine.micro_batch != "auto":
        return machine.rows_at_once(budget)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    was_training = objective.training

    def dry(rows: Sequence[Example]) -> None:
        # What the optimiser remembers from the first step that counts on.
        moments = [torch.empty_like(parameter) for parameter in trained for _ in range(budget.remembered)]
        objective.train()
        batch = {name: tensor.to(objective.device) for name, tensor in objective.collate(rows).items()}
        torch.autograd.backward(objective(**batch)["loss"])
        del moments

    def cleared(rows: Sequence[Example]) -> None:
        try:
            (step or dry)(rows)
        finally:
            objective.zero_grad(set_to_none=True)
            objective.pop_losses()
            objective.train(was_training)

    return rows_that_fit(cleared, examples, min(budget.batch_size, len(examples)), report=report)


def rows_that_fit(
    step: Callable[[Sequence[Example]], object], examples: Sequence[Example], most: int, *, report: Report = ignore
) -> int:
    """The most of the longest rows, of `most` and its halves, with which a step does not run out of memory.

    Raises BadNumbers if not even one fits.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        message = 'micro_batch = "auto" is for one process: several would find different numbers'
        raise UsageProblem(message, mend="set micro_batch to a number in machine.toml")
    longest = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)[:most]
    rows = 2 * most

    def half() -> int:
        nonlocal rows
        rows //= 2
        return rows

    def tried(batch_size: int) -> int:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            try:
                step(longest[:batch_size])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise torch.OutOfMemoryError(" out of memory.") from None  # in the words that accelerate knows
        return batch_size

    try:  # not as a decorator: before accelerate 1.15 that forgets how to reduce
        fits: int = find_executable_batch_size(tried, starting_batch_size=half(), reduce_batch_size_fn=half)()
    except RuntimeError as error:
        if "No executable batch size found" not in str(error):
            raise
        raise BadNumbers("out of memory: not even one row fits", mend=MEMORY_KNOBS) from error
    gc.collect()
    report(Event("note", f"{fits} of {most} rows at once fit in memory"))
    return fits
