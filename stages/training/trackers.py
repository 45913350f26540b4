"""Trackers: where the losses of training steps go besides the private log, by transformers' own integrations.

machine.toml names them; they change nothing that is computed or published.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from stages.runtime.errors import UsageProblem
from stages.workspace.machine import Tracker
from stages.workspace.names import MACHINE
from stages.workspace.paths import Workspace


@dataclass(frozen=True)
class Tracking:
    """The trackers of one run of a stage, the name it has there, and the folder of TensorBoard's files."""

    trackers: Sequence[Tracker]
    run: str
    tensorboard: Path


UNTRACKED = Tracking((), "", Path())


def tracking(workspace: Workspace, stage: str, round: int, client: int | None = None) -> Tracking:
    """The trackers that machine.toml names. Raises UsageProblem for one that is not installed."""
    for name in workspace.machine.trackers:
        if find_spec(name) is None:
            mend = f"pip install {name}, or take it out of trackers"
            raise UsageProblem(f"the tracker {name} is not installed", where=workspace.root / MACHINE, mend=mend)
    run = f"{workspace.agreement.federation.name} {stage} round {round}{f' client {client}' if client else ''}"
    return Tracking(workspace.machine.trackers, run, workspace.tensorboard(stage, round, client))


def callbacks(tracking: Tracking, *, after_step: int) -> list[TrainerCallback]:
    """TensorBoard's callback with a folder of ours; left to Trainer, it would take one from the environment.

    after_step: how many of Trainer's steps are done. What an earlier run wrote there of later ones is shown no more.
    """
    if "tensorboard" not in tracking.trackers:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(tracking.tensorboard, purge_step=after_step + 1))]  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def named(tracking: Tracking) -> Iterator[None]:
    """Turn what a tracker raises into UsageProblem that names it, and end its run with that of the stage."""
    try:
        yield
    except Exception as error:
        name = type(error).__module__.partition(".")[0]
        if name not in tracking.trackers:
            raise
        mend = f"configure {name} as its own documentation says, or take it out of trackers in {MACHINE}"
        raise UsageProblem(f"the tracker {name} failed: {error}", mend=mend) from error
    finally:
        if "wandb" in tracking.trackers:  # its run is the process's: in `run`, the next stage's steps would go into it
            import wandb

            wandb.finish()
