"""What the manifest of a trained adapter says of its model and of the training."""

from __future__ import annotations

from typing import Any

from stages.artefacts.draft import Draft
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.training.recipes import Outcome


def draft_of(tuned: Tuned, outcome: Outcome, **told: Any) -> Draft:
    """A draft with the base, the size of the adapter and the counts of the training; told: its other fields."""
    return Draft(
        base=tuned.identity,
        parameters=adapters.count(tuned.model),
        role=tuned.role,
        dtype=tuned.dtype,
        steps=outcome.steps,
        examples=outcome.examples,
        tokens=outcome.tokens,
        **told,
    )
