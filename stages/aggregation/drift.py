"""How far clients go, and whether they go the same way: each update's norm, and its cosine to the clients' mean update.

An update is theta_k^{t+1} - theta^t, all of an adapter's matrices as one vector. Large updates that point apart are
what averaging loses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.artefacts.adapter_files import Tensors, layout_of, read_adapter
from stages.artefacts.receiving import read_sound
from stages.parties.party import Onlooker
from stages.workspace.paths import Workspace

HELD_BYTES = 256 << 20
"""Of updates that are compared with each other."""


@dataclass(frozen=True)
class Drift:
    """One client's update in one round. cosine is None where it, or the mean, is no update at all."""

    round: int
    client: int
    norm: float
    cosine: float | None


def drift(workspace: Workspace, round: int) -> list[Drift]:
    """Of every client whose update of this round is here; none where the broadcast is not."""
    if not workspace.broadcast(round).exists():
        return []
    who = Onlooker(workspace)
    start = _adapter(who, workspace.broadcast(round), None)
    updates = workspace.client_adapters(round)
    products = inner_products(start, [functools.partial(_adapter, who, path, start) for path in updates.values()])
    norms = np.sqrt(np.diag(products))
    mean = np.sqrt(max(products.mean(), 0.0)) if len(products) else 0.0  # its norm
    toward = products.mean(axis=1) if len(products) else norms  # each update's product with the mean
    return [
        Drift(round, client, float(norm), float(product / (norm * mean)) if norm * mean > 0 else None)
        for client, norm, product in zip(updates, norms, toward, strict=True)
    ]


def inner_products(start: Tensors, adapters: Sequence[Callable[[], Tensors]]) -> np.ndarray:
    """<u_j, u_k> of every two updates u_k = adapter - start, [K, K], float64.

    adapters: read each of them; all of start's layout. As many are held at a time as fit into HELD_BYTES, at least one
    beside the one that is read, however many there are: where all fit, each is read once.
    """
    size = 8 * sum(tensor.size for tensor in start.values())
    held = max(1, HELD_BYTES // max(size, 1))
    products = np.zeros((len(adapters), len(adapters)))
    for first in range(0, len(adapters), held):
        last = min(first + held, len(adapters))
        block = np.empty((last - first, size // 8))  # [held, parameters]
        for row, read in zip(block, adapters[first:last], strict=True):
            row[:] = _update(read(), start)
        products[first:last, first:last] = block @ block.T
        for other in range(last, len(adapters)):
            products[first:last, other] = products[other, first:last] = block @ _update(adapters[other](), start)
    return products


def _adapter(who: Onlooker, folder: Path, like: Tensors | None) -> Tensors:
    layout = layout_of(like) if like else None
    return read_adapter(read_sound(folder, by=who), layout, who.workspace.agreement.slm.lora)


def _update(found: Tensors, start: Tensors) -> np.ndarray:
    """theta_k^{t+1} - theta^t as one vector, float64."""
    return np.concatenate([(found[name].astype(np.float64) - start[name]).ravel() for name in sorted(start)])
