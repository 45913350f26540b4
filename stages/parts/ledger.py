"""What has travelled: the bytes of every adapter folder in exchange/, by round, sender and receiver.

Sizes are those of the three files of each folder, as its manifest names them; no other file is opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stages.parts.manifest import read_manifest
from stages.parts.workspace import MANIFEST, Workspace

SERVER = "server"


@dataclass(frozen=True)
class Transfer:
    """One adapter folder on its way: "server" to "client-2", or back."""

    round: int
    sender: str
    receiver: str
    size_bytes: int
    parameters: int


def transfers(workspace: Workspace) -> list[Transfer]:
    """What the folders in exchange/ say has been sent; a broadcast goes to each of the K clients.

    Raises Damaged for a folder whose manifest cannot be read.
    """
    found = []
    for round in range(1, workspace.agreement.federation.rounds + 1):
        broadcast = workspace.broadcast(round)
        if os.path.lexists(broadcast):
            size_bytes, parameters = _size(broadcast)
            found += [Transfer(round, SERVER, client(k), size_bytes, parameters) for k in workspace.clients]
        for k, update in workspace.client_updates(round).items():
            found.append(Transfer(round, client(k), SERVER, *_size(update)))
    return found


def client(number: int) -> str:
    """How the ledger calls a client."""
    return f"client-{number}"


def _size(folder: Path) -> tuple[int, int]:
    """Bytes of an adapter folder's three files, and its parameters."""
    manifest, _ = read_manifest(folder)
    own = (folder / MANIFEST).lstat().st_size
    return own + sum(entry.size_bytes for entry in manifest.files.values()), manifest.parameters
