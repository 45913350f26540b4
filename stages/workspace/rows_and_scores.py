"""The parts of the agreement that say which rows a simulation deals, and which questions are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.workspace.attacks import Attack
from stages.workspace.settings import Positive, Rate, Settings


class Data(Settings):
    """Where `prepare` takes a public dataset from and how it splits it; parties with their own data leave it out."""

    tasks: list[str] = []
    files: list[str] = []
    split: Literal["iid", "dirichlet", "by-task"] = "iid"
    dirichlet_alpha: Rate = 0.5
    auxiliary_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    auxiliary_sources: list[str] = []
    unlabelled_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    limit: Positive | None = None
    too_long: Literal["refuse", "skip"] = "refuse"


class Evaluation(Settings):
    """What lm-eval scores, and how it asks: zero-shot and without a chat template, as long as nothing else is said."""

    tasks: list[str] = []
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] = 0
    apply_chat_template: bool = False
    system_prompt: Annotated[str, Field(min_length=1)] | None = None
    limit: Positive | None = None
    batch_size: Positive = 16
    precision: Literal["full", "training"] = "full"
    attack: Attack = Attack()
