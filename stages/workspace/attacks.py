"""The parts of the agreement that say how prompts are changed for the worst: in training, and in scoring."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.workspace.settings import Positive, Settings

Length = Annotated[float, Field(gt=0, le=1)]
"""A share of the length of each token's embedding."""


class Attack(Settings):
    """How far each embedding of a prompt may be moved, and in how many steps; without a radius there is no attack."""

    radius: Length | None = None
    steps: Positive = 5
    step_size: Length | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is one."""
        return self.radius is not None

    @property
    def passes(self) -> int:
        """Forward passes over each batch: a plain one and, under attack, one for each step."""
        return self.steps + 1 if self.is_on else 1


class Adversarial(Attack):
    """Training under attack. weight: of the loss under attack; the plain loss has the rest."""

    steps: Positive = 1
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
