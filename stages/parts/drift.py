"""How far clients go, and whether they go the same way: each update's norm, and its cosine to the clients' mean update.

An update is theta_k^{t+1} - theta^t, all of an adapter's matrices as one vector. Large updates that point apart are
what averaging loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np

from stages.parts.adapter_files import Tensors, layout_of, read_adapter
from stages.parts.manifest import read_artefact
from stages.parts.workspace import Workspace


@dataclass(frozen=True)
class Drift:
    """One client's update in one round. cosine is None where it, or the mean, is no update at all."""

    round: int
    client: int
    norm: float
    cosine: float | None


def drift(workspace: Workspace, round: int) -> list[Drift]:
    """Of every client whose update of this round is here; none where the broadcast is not.

    Two adapters are in memory at a time, however many clients there are: the updates are read twice.
    """
    if not workspace.broadcast(round).exists():
        return []
    start = _adapter(workspace, workspace.broadcast(round), None)
    updates = workspace.client_updates(round)
    mean = {name: np.zeros(tensor.shape) for name, tensor in start.items()}
    for path in updates.values():
        for name, change in _update(workspace, path, start).items():
            mean[name] += change / len(updates)
    length = sqrt(_product(mean, mean))
    found = []
    for client, path in updates.items():
        update = _update(workspace, path, start)
        norm = sqrt(_product(update, update))
        cosine = _product(update, mean) / (norm * length) if norm * length > 0 else None
        found.append(Drift(round, client, norm, cosine))
    return found


def _adapter(workspace: Workspace, folder: Path, like: Tensors | None) -> Tensors:
    layout = layout_of(like) if like else None
    return read_adapter(read_artefact(folder), layout, workspace.agreement.slm.lora)


def _update(workspace: Workspace, folder: Path, start: Tensors) -> Tensors:
    """theta_k^{t+1} - theta^t, in float64."""
    found = _adapter(workspace, folder, start)
    return {name: found[name].astype(np.float64) - start[name] for name in start}


def _product(some: Tensors, others: Tensors) -> float:
    return float(sum(np.vdot(some[name], others[name]) for name in some))
