"""What the manifest of a trained adapter says of its model and of the training."""

from __future__ import annotations

from collections.abc import Mapping

from stages.artefacts.draft import Draft
from stages.artefacts.manifest import PrivacyClaim, Stage
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.training.recipes import Outcome


def draft_of(
    tuned: Tuned,
    outcome: Outcome,
    *,
    stage: Stage,
    round: int,
    parents: Mapping[str, str],
    metrics: Mapping[str, float],
    seed: int | None,
    attempt: int = 0,
    privacy: PrivacyClaim | None = None,
) -> Draft:
    """A draft with the base, the size of the adapter and the counts of the training."""
    return Draft(
        stage=stage,
        round=round,
        attempt=attempt,
        parents=parents,
        base=tuned.identity,
        parameters=adapters.count(tuned.model),
        role=tuned.role,
        seed=seed,
        dtype=tuned.dtype,
        steps=outcome.steps,
        examples=outcome.examples,
        tokens=outcome.tokens,
        metrics=metrics,
        privacy=privacy,
    )
