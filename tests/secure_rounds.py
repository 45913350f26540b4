"""A round of secure aggregation in memory, by the parts under test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stages.parties import one_time_keys
from stages.secagg import masking, reveals, unmasking
from stages.secagg.masking import Masked, Round
from stages.secagg.shamir import Draw
from stages.secagg.unmasking import Opened


@dataclass(frozen=True)
class Masking:
    """Clients that have masked their updates."""

    round: Round
    keys: dict[int, X25519PrivateKey]
    encoded: dict[int, np.ndarray]
    masked: dict[int, Masked]

    def rows(self, client: int, survivors: Sequence[int]) -> dict[int, np.ndarray]:
        """What the survivors dealt to a client, opened."""
        opened = {}
        for u in survivors:
            row = self.masked[u].rows[self.round.clients.index(client)]
            opened[u] = self.masked[u].own_shares if u == client else masking.open_row(
                row, self.round, dealer=u, holder=client, secret=self.keys[client], y_sha256=self.masked[u].y_sha256
            )  # fmt: skip
        return opened

    def reveals(self, survivors: Sequence[int], by: Sequence[int]) -> dict[int, np.ndarray]:
        """What these clients reveal, writable."""
        return {
            w: reveals.reveal_shares(
                self.rows(w, survivors), client=w, clients=self.round.clients, survivors=survivors
            ).copy()
            for w in by
        }

    def open(self, survivors: Sequence[int], revealed: dict[int, np.ndarray]) -> Opened:
        """The secrets, against the survivors' commitments."""
        return unmasking.open_secrets(
            revealed,
            self.round,
            survivors=survivors,
            commit_selves={u: self.masked[u].commit_self for u in survivors},
            commit_pairs={u: self.masked[u].commit_pairs for u in survivors},
        )

    def sum(self, survivors: Sequence[int]) -> np.ndarray:
        """The sum of what they encoded, which no one should learn more than."""
        return np.sum([self.encoded[u] for u in survivors], axis=0, dtype=np.uint32)


def new_keys(clients: Sequence[int], opening: bytes = b"opening") -> tuple[Round, dict[int, X25519PrivateKey]]:
    keys = {k: one_time_keys.prekey(hashlib.sha256(b"%d" % k).digest()) for k in clients}
    prekeys = {k: key.public_key().public_bytes_raw() for k, key in keys.items()}
    return Round(one_time_keys.transcript(opening), prekeys), keys


def masked_round(
    clients: Sequence[int],
    *,
    size: int,
    seed: int = 0,
    opening: bytes = b"opening",
    masking_clients: Sequence[int] | None = None,
) -> Masking:
    """Clients with random numbers of all 32 bits, masked with fresh secrets; by default all of them mask."""
    round, keys = new_keys(clients, opening)
    rng = np.random.default_rng(seed)
    encoded = {}
    for k in masking_clients or clients:
        encoded[k] = rng.integers(0, 2**32, size + 2, dtype=np.uint32)
        encoded[k][-2:] = 5, 1
    masked = {k: masking.mask(encoded[k], round, client=k, secret=keys[k], threads=1) for k in encoded}
    return Masking(round, keys, encoded, masked)


def seeded(seed: int) -> Draw:
    """Draws that are the same in every run, for statistics that must not flake."""
    return np.random.default_rng(seed).bytes
