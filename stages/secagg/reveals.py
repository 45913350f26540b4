"""A client's reveal: the shares that take the masks off one sum of one round, sealed for the server.

Of a client whose upload is in the sum, its b_u; of one whose upload is not, its pair keys with those that are. Never
both: that would show one client's update.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stages.artefacts.sizes import SHARE_BYTES
from stages.parties.one_time_keys import KEY_BYTES, derive, domain
from stages.runtime.errors import Damaged, Refused
from stages.secagg.masking import NONCE, TAG_BYTES, agree, decrypt
from stages.secagg.shamir import Draw
from stages.workspace.averaging import threshold


def place(dealer: int, other: int, clients: Sequence[int]) -> int:
    """Where the share of k_uv stands among the shares that a dealer u gives: b_u is first, then v ascending."""
    return 1 + [v for v in sorted(clients) if v != dealer].index(other)


def reveal_shares(
    rows: Mapping[int, np.ndarray], *, client: int, clients: Sequence[int], survivors: Sequence[int]
) -> np.ndarray:
    """What a client reveals: uint8 [|U3|, 1+|D|, 33], of survivors u ascending, b_u and k_uv for each missing v.

    rows: the shares that each survivor dealt to this client, uint8 [K, 33], its own shares among them. clients: the
    round's. survivors: those whose uploads are summed. Raises Refused unless they are at least a threshold of the
    round's clients, each once, this client among them.
    """
    check_survivors(clients, survivors)
    if client not in survivors:
        raise Refused(f"client {client}'s own update is not among those that it is to help unmask")
    missing = [v for v in sorted(clients) if v not in survivors]
    return np.stack(
        [rows[u][[0, *(place(u, v, clients) for v in missing)]] for u in sorted(survivors)]
    )  # [|U3|, 1+|D|, 33]


def check_survivors(clients: Sequence[int], survivors: Sequence[int]) -> None:
    """Raise Refused unless the survivors are at least a threshold of the round's clients, each named once."""
    least = threshold(len(clients))
    if len(set(survivors)) != len(survivors) or not set(survivors) <= set(clients):
        raise Refused(f"{sorted(survivors)} are not clients of this round, each once: {sorted(clients)}")
    if len(survivors) < least:
        raise Refused(f"the sum has {len(survivors)} clients; it must have {least} of {len(clients)} to be unmasked")


def seal_reveal(
    shares: np.ndarray, *, client: int, server: bytes, close_sha256: str, draw: Draw = secrets.token_bytes
) -> bytes:
    """Revealed shares for the server alone, bound to the exact list of survivors. draw: a key used once.

    server: its raw X25519 public key. close_sha256: of the bytes that name the survivors, hexadecimal.
    """
    ephemeral = X25519PrivateKey.from_private_bytes(draw(KEY_BYTES))
    public = ephemeral.public_key().public_bytes_raw()
    cipher = _cipher(agree(ephemeral, server, "the server"), client, public, server, close_sha256)
    return public + cipher.encrypt(NONCE, shares.tobytes(), bytes.fromhex(close_sha256))


def open_reveal(
    content: bytes, *, client: int, box: X25519PrivateKey, close_sha256: str, survivors: int, missing: int
) -> np.ndarray:
    """The shares that a client revealed, uint8 [survivors, 1+missing, 33]. Raises Damaged for anything else.

    box: the server's key. survivors, missing: how many there are of each.
    """
    size = KEY_BYTES + survivors * (1 + missing) * SHARE_BYTES + TAG_BYTES
    if len(content) != size:
        raise Damaged(f"the reveal of client {client} has {len(content)} bytes, expected {size}")
    public = content[:KEY_BYTES]
    agreed = agree(box, public, f"client {client}'s reveal")
    cipher = _cipher(agreed, client, public, box.public_key().public_bytes_raw(), close_sha256)
    what = f"the shares that client {client} revealed"
    opened = decrypt(cipher, content[KEY_BYTES:], bytes.fromhex(close_sha256), what)
    return np.frombuffer(opened, np.uint8).reshape(survivors, 1 + missing, SHARE_BYTES)


def _cipher(agreed: bytes, client: int, ephemeral: bytes, server: bytes, close_sha256: str) -> AESGCM:
    info = domain("reveal-seal") + client.to_bytes(4, "little") + ephemeral + server
    return AESGCM(derive(agreed, salt=bytes.fromhex(close_sha256), info=info))
