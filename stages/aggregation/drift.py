"""How far clients go, and whether they go the same way: each update's norm, and its cosine to the clients' mean update.

An update is theta_k^{t+1} - theta^t, all of an adapter's matrices as one vector. Large updates that point apart are
what averaging loses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.aggregation.updates import Updates, inner_products
from stages.artefacts.adapter_files import check_config, flat, read_adapter
from stages.artefacts.receiving import read_sound
from stages.parties.party import Onlooker
from stages.runtime.events import ignore
from stages.workspace.names import ADAPTER_CONFIG
from stages.workspace.paths import Workspace


@dataclass(frozen=True)
class Drift:
    """One client's update in one round. cosine is None where it, or the mean, is no update at all."""

    round: int
    client: int
    norm: float
    cosine: float | None


def drift(workspace: Workspace, round: int) -> list[Drift]:
    """Of every client whose update of this round is here; none where the broadcast is not.

    A client of a smaller rank began with another adapter, and has no update of these shapes.
    """
    if not workspace.broadcast(round).exists():
        return []
    who, lora = Onlooker(workspace), workspace.agreement.slm.lora
    theta = read_adapter(read_sound(workspace.broadcast(round), by=who), None, lora)
    ranks = workspace.agreement.ranks
    clients = {k: place for k, place in workspace.client_adapters(round).items() if str(k) not in ranks}
    heads = [read_sound(path, by=who, only=[ADAPTER_CONFIG]) for path in clients.values()]
    for head in heads:
        check_config(head.contents[ADAPTER_CONFIG], head.path / ADAPTER_CONFIG, lora)
    updates = Updates(heads, theta, ignore)
    start, products = flat(theta), np.zeros((len(heads), len(heads)))
    for place, block in updates.blocks() if heads else ():
        products += inner_products(block, start[place])
    norms = np.sqrt(np.diag(products))
    mean = np.sqrt(max(products.mean(), 0.0)) if len(products) else 0.0  # its norm
    toward = products.mean(axis=1) if len(products) else norms  # each update's product with the mean
    return [
        Drift(round, client, float(norm), float(product / (norm * mean)) if norm * mean > 0 else None)
        for client, norm, product in zip(clients, norms, toward, strict=True)
    ]
