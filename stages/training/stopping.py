"""When a training stops before its end, or its result is none."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from stages.models import adapters
from stages.runtime.errors import BadNumbers
from stages.training.objective import Objective

LARGEST = 65504.0
"""The largest weight of an adapter: float16's, since beyond it others would load infinity."""

FARTHEST = 100.0
"""How far one weight of an adapter may move in a stage while its model's loss rises.

Weights of a fresh A are below 1 and those of B are 0; those of adapters that learned something stay of that size.
"""


def stopped_after(step: int, steps: int) -> str:
    """What to say of a training that was told to stop, once its checkpoint is written."""
    return f"stopped after step {step} of {steps}: the same command goes on from there"


def refuse_unless_finite(losses: Mapping[str, float], when: str) -> None:
    """Raise BadNumbers for a loss that is NaN or infinite; when: at which step."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            mend = "lower the learning rate, set a max_grad_norm, or compute with --dtype float32"
            raise BadNumbers(f"{name} became {loss} {when}", mend=mend)


def refuse_unless_finite_before(losses: Mapping[str, float]) -> None:
    """Raise BadNumbers for a loss that is NaN or infinite before any step: no setting of training caused it."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            message = f"{name} is {loss} before any step: so say the base and the adapter that training begins from"
            raise BadNumbers(message, mend=adapters.NO_SETTING_OF_TRAINING)


def snapshot(objective: Objective) -> dict[str, torch.Tensor]:
    """A copy of the adapters' tensors; none of whole models, of which a further copy would take too much memory."""
    return {} if objective.is_whole else {name: tensor.clone() for name, tensor in objective.state_dict().items()}


def refuse_runaway(objective: Objective, start: Mapping[str, torch.Tensor], role: str, why: str | None) -> None:
    """Raise BadNumbers for a weight of this model's adapter beyond LARGEST, or FARTHEST from its start if why is given.

    Whether numbers of such a size come out finite is for a processor's rounding to say: they are no result.
    """
    mend = "lower the learning rate: the weights of an adapter that learned something stay below 1 or little above"
    for name, tensor in objective.state_dict().items():
        if not name.startswith(f"models.{role}."):
            continue
        largest = float(tensor.abs().max())
        moved = float((tensor - start[name]).abs().max()) if start else 0.0
        if why is not None and not moved <= FARTHEST:
            message = f"the {role.upper()}'s adapter has moved a weight by {moved:.3g}{why}: more than {FARTHEST:g}"
            raise BadNumbers(f"{message} is no result of training", mend=mend)
        if not largest <= LARGEST:
            whose = f"the {role.upper()}" + ("" if objective.is_whole else "'s adapter")
            message = f"{whose} has a weight of {largest:.3g}; float16 ends at {LARGEST:g}"
            raise BadNumbers(message, mend=mend)


def refuse_runaways(
    objective: Objective, start: Mapping[str, torch.Tensor], before: Mapping[str, float], after: Mapping[str, float]
) -> None:
    """Raise BadNumbers for losses that are no numbers after the last step, and for a model that has run away.

    How far it has moved counts where its loss rose.
    """
    refuse_unless_finite(after, "after the last step")
    for role in objective.models:
        has_risen = objective.weighted(after, role) > objective.weighted(before, role)
        refuse_runaway(objective, start, role, " while its loss rose" if has_risen else None)
