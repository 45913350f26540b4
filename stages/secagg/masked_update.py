"""What is in a masked update: its vector, the shares that it deals, its commitments."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from stages.artefacts.arrays import read_array
from stages.artefacts.manifest import Masking
from stages.artefacts.reading import Artefact
from stages.parties.names import number_of
from stages.runtime.errors import Refused
from stages.secagg import masking
from stages.workspace.names import MASKED_UPDATE, SEALED_SHARES


def vector_of(update: Artefact, parameters: int) -> np.ndarray:
    """y: uint32 [parameters + 3], the update in fixed point under all masks."""
    path = update.path / MASKED_UPDATE
    return read_array(update.contents[path.name], path, name="y", kind="U32", shape=(parameters + 3,))


def shares_of(update: Artefact, clients: int) -> np.ndarray:
    """The sealed shares: uint8 [clients, bytes of a row], a row for each client that may open it."""
    path = update.path / SEALED_SHARES
    shape = (clients, masking.sealed_row_bytes(clients))
    return read_array(update.contents[path.name], path, name="s", kind="U8", shape=shape)


def digest(y: np.ndarray) -> str:
    """The sha256 of a masked vector."""
    return hashlib.sha256(y.data).hexdigest()


def masking_of(update: Artefact) -> Masking:
    """What a masked update's manifest says of its masks. Raises Refused for one in the clear."""
    if update.manifest.masking is None:
        message = f"{update.path.name} is not masked; this federation aggregates securely"
        raise Refused(message, where=update.path, mend="take it out: what it holds should not have been sent")
    return update.manifest.masking


def commitments(update: Artefact) -> dict[int, str]:
    """What a client commits to for each other."""
    return {number_of(party): digest for party, digest in masking_of(update).commit_pairs.items()}


def names_of(clients: Iterable[int]) -> str:
    """Clients by number, as messages list them."""
    return ", ".join(map(str, clients))
