"""Trainings that have begun and not ended: how far the newest whole checkpoint of each is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.artefacts.checkpoints import COMPLETE, step_of
from stages.files import reading
from stages.runtime.errors import Problem
from stages.workspace import listing
from stages.workspace.paths import Workspace

STATE = "trainer_state.json"
"""What Trainer writes into a checkpoint; training with differential privacy does without."""


@dataclass(frozen=True)
class Unfinished:
    """place: the party's folder of the round. steps: that the checkpoint has; of: all, None where it does not say."""

    stage: str
    place: str
    steps: int
    of: int | None

    @property
    def in_words(self) -> str:
        """As `status` says it."""
        of = "" if self.of is None else f" of {self.of}"
        return f"{self.place}: {self.stage} has begun, {self.steps}{of} steps are done; the same command goes on"


def unfinished(workspace: Workspace) -> list[Unfinished]:
    """The newest checkpoint of each stage that has one; it may be of a process that is still at work."""
    newest: dict[Path, Path] = {}
    for mark in sorted(listing.checkpoints(workspace, COMPLETE), key=lambda mark: step_of(mark.parent)):
        newest[mark.parents[2]] = mark.parent
    return [_of(workspace, stage, checkpoint) for stage, checkpoint in sorted(newest.items())]


def _of(workspace: Workspace, stage: Path, checkpoint: Path) -> Unfinished:
    name = stage.name.removeprefix(".")
    try:
        of = reading.read_json(checkpoint / STATE, levels=8)[0].get("max_steps")
    except (Problem, OSError):  # none, or not whole: whoever goes on from it says so
        of = None
    turns = 2 if name == "co-distill" and workspace.agreement.distillation.order == "alternating" else 1
    total = of // turns if isinstance(of, int) else None
    return Unfinished(name, workspace.shown(stage.parent), step_of(checkpoint) // turns, total)
