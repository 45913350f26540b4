"""The parts of the agreement that say how models are trained: at a client, and by each other."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.workspace.attacks import Adversarial
from stages.workspace.settings import Positive, Rate, Settings, Share

Schedule = Literal["constant", "cosine", "linear"]
"""How learning rates go over all rounds together: they stay, or fall to zero, as half a cosine or in a line."""

Optimizer = Literal["adamw", "sgd", "adagrad", "adafactor"]
"""What takes the steps of training, by torch's name in small letters."""
MOMENTS: dict[Optimizer, int] = {"adamw": 2, "sgd": 0, "adagrad": 1, "adafactor": 1}
"""Numbers that each remembers of every parameter, at most: Adafactor has one for each row and column of a matrix."""


class Budget(Settings):
    """How long and on what batches a model is trained: epochs or steps, exactly one of them."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Schedule = "constant"
    optimizer: Optimizer = "adamw"
    weight_decay: Share = 0.0
    max_length: Positive = 512

    @model_validator(mode="after")
    def _one_budget(self) -> Budget:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of epochs and steps")
        return self

    @property
    def remembered(self) -> int:
        """How many numbers the optimiser remembers of each parameter, at most."""
        return MOMENTS[self.optimizer]

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimiser step sees."""
        return self.batch_size * self.gradient_accumulation

    def steps_for(self, rows: int) -> int:
        """How many optimiser steps that is on so many rows."""
        return self.steps or math.ceil((self.epochs or 1.0) * rows / self.rows_per_step)


class ClientTraining(Budget):
    """Local training, Eq. 3."""

    learning_rate: Rate = 3e-4
    max_grad_norm: Rate | None = None
    proximal: Rate | None = None
    adversarial: Adversarial = Adversarial()


class Distillation(Budget):
    """Mutual distillation, Eq. 4-6."""

    slm_learning_rate: Rate = 3e-4
    llm_learning_rate: Rate = 3e-4
    slm_max_grad_norm: Rate | None = None
    llm_max_grad_norm: Rate | None = None
    lambda_slm: Share = 1.0
    lambda_llm: Share = 1.0
    temperature: Rate = 1.0
    divergence: Literal["forward", "reverse", "jensen-shannon", "spans", "sorted"] = "forward"
    min_confidence: Annotated[float, Field(gt=0, le=1)] | None = None
    select: Literal["all", "min-ce", "none"] = "all"
    top_k: Positive = 64
    alignment: Literal["best", "exact", "min-edit", "leading"] = "best"
    order: Literal["simultaneous", "alternating"] = "simultaneous"
