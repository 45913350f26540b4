"""What has travelled: the bytes of every folder in exchange/, by round, sender and receiver; of keys and roster too.

Sizes are those of each folder's files, as its manifest names them, with the manifest and its signature; no other file
is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Manifests, inbox
from stages.workspace.names import ENCRYPTED, KNOWLEDGE, MANIFEST, signature_beside
from stages.workspace.paths import Workspace

SERVER = "server"

Read = Callable[[Path], tuple[Manifest, str]]
"""The manifest of a folder, and its digest."""


@dataclass(frozen=True)
class Transfer:
    """One folder on its way: "server" to "client-2", or back. parameters: 0 where it holds no adapter.

    round: 0 is before the first, when keys go to the server, and the roster with everybody's keys to each client.
    """

    round: int
    sender: str
    receiver: str
    size_bytes: int
    parameters: int


def transfers(workspace: Workspace, manifests: Manifests | None = None) -> list[Transfer]:
    """What the folders in exchange/ say has been sent; what the server tells all goes to each of the K clients.

    manifests: those that this command has read. Raises Damaged for a folder whose manifest cannot be read.
    """
    read = (manifests or Manifests()).of
    found = _enrolment(workspace) + _vocabularies(workspace, read)
    for round in range(1, workspace.agreement.federation.rounds + 1):
        broadcast = workspace.broadcast(round)
        if os.path.lexists(broadcast):
            size_bytes, parameters = _size(broadcast, read)
            found += [Transfer(round, SERVER, client(k), size_bytes, parameters) for k in workspace.clients]
        found += _from_server_in_public(workspace, round, read)
        arrived = [workspace.sent_by_clients(round)]  # with FedMKT what each knows, and then its adapter, if averaged
        arrived += [workspace.client_updates(round)] if workspace.agreement.aggregation.average else []
        for k, folder in ((k, folder) for folders in arrived for k, folder in folders.items()):
            found.append(Transfer(round, client(k), SERVER, *_size(folder, read)))
        found += _unmasking(workspace, round, read)
    return found


def client(number: int) -> str:
    """How the ledger calls a client."""
    return f"client-{number}"


def _enrolment(workspace: Workspace) -> list[Transfer]:
    """Keys to the server; the roster, with all keys, back to everybody."""
    keys = {k: _signed(path) for k in workspace.clients if (path := workspace.public_keys(k)).exists()}
    found = [Transfer(0, client(k), SERVER, size_bytes, 0) for k, size_bytes in keys.items()]
    if workspace.federation.exists():
        size_bytes = _signed(workspace.federation) + sum(keys.values())
        found += [Transfer(0, SERVER, client(k), size_bytes, 0) for k in workspace.clients]
    return found


def _vocabularies(workspace: Workspace, read: Read) -> list[Transfer]:
    """FedMKT, before round 1: how each client reads, to the server, and how that does, to each client."""
    found = [
        Transfer(0, client(k), SERVER, _size(workspace.vocabulary(k), read)[0], 0)
        for k in workspace.clients
        if os.path.lexists(workspace.vocabulary(k))
    ]
    if os.path.lexists(workspace.vocabulary(None)):
        size_bytes, _ = _size(workspace.vocabulary(None), read)
        found += [Transfer(0, SERVER, client(k), size_bytes, 0) for k in workspace.clients]
    return found


def _from_server_in_public(workspace: Workspace, round: int, read: Read) -> list[Transfer]:
    """FedMKT: what the LLM knows."""
    place = workspace.knowledge(round, None)
    if not os.path.lexists(place):
        return []
    size_bytes, _ = _size(place, read)
    return [Transfer(round, SERVER, client(k), size_bytes, 0) for k in workspace.clients]


def _unmasking(workspace: Workspace, round: int, read: Read) -> list[Transfer]:
    """Secure mode: the close with each survivor's own inbox, and what each reveals; or that of the one with the key."""
    found, close, holder = [], workspace.close(round), workspace.agreement.aggregation.key_holder
    if os.path.lexists(close):
        boxes = read(close)[0].files
        for k in workspace.clients:
            own = boxes.get(ENCRYPTED if k == holder else inbox(k))
            if own:
                found.append(Transfer(round, SERVER, client(k), _signed(close / MANIFEST) + own.size_bytes, 0))
    for k in workspace.clients:
        if os.path.lexists(workspace.reveal(round, k)):
            found.append(Transfer(round, client(k), SERVER, *_size(workspace.reveal(round, k), read)))
    return found


def _size(folder: Path, read: Read) -> tuple[int, int]:
    """Bytes of a folder's files, its manifest and its signature, and its parameters; 0 of knowledge, which has none."""
    manifest, _ = read(folder)
    listed = sum(entry.size_bytes for entry in manifest.files.values())
    return _signed(folder / MANIFEST) + listed, 0 if KNOWLEDGE in manifest.files else manifest.parameters


def _signed(path: Path) -> int:
    """Bytes of a file and of the signature beside it, if there is one."""
    signature = signature_beside(path)
    return path.lstat().st_size + (signature.lstat().st_size if os.path.lexists(signature) else 0)
