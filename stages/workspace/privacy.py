"""The part of the agreement that says how private clients' training is."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.workspace.settings import Rate, Settings


class Privacy(Settings):
    """Differential privacy of each client's examples; without epsilon and noise_multiplier there is none."""

    epsilon: Rate | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise_multiplier: Rate | None = None
    max_grad_norm: Rate = 1.0

    @property
    def is_on(self) -> bool:
        """Whether clients train with noise."""
        return self.epsilon is not None or self.noise_multiplier is not None
