"""What a stage says while it works: values handed to a callable, drawn by whoever gave that callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

SECONDS_LEFT = "seconds_left"
"""Of a round: how long until all is done."""


@dataclass(frozen=True)
class Event:
    """One thing worth telling.

    kind: "round" and "stage" open a piece of work named by text; "step" says that step of total is done; "note" and
    "warning" are sentences.
    values: the numbers of a step, such as {"slm_ft": 2.31}; of a round, SECONDS_LEFT, if that can be told.
    A "round" of a federation has its number as step, of total.
    """

    kind: Literal["round", "stage", "step", "note", "warning"]
    text: str = ""
    step: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)


Report = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The report of someone who does not want to know."""
