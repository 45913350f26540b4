"""Keys from keys: what parts one use from all others, what a round's keys hang on, and one-time keys in a chain.

Whoever has one secret of the chain has those after it, never those before it: a machine that is stolen later opens
nothing that was masked with keys used before.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32


def domain(purpose: str) -> bytes:
    """What parts one use of a key or a hash from all others: DS(x) of the protocol."""
    return b"fedcollm/secagg/1/" + purpose.encode() + b"\0"


def derive(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """A key for one use, by HKDF-SHA256."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)


def transcript(opening: bytes) -> bytes:
    """The hash that every key of a round depends on, of the exact bytes that opened it."""
    return hashlib.sha256(domain("open") + opening).digest()


def prekey(seed: bytes) -> X25519PrivateKey:
    """The secret key of the link whose seed this is."""
    return X25519PrivateKey.from_private_bytes(derive(seed, salt=b"", info=domain("prekey-secret")))


def next_seed(seed: bytes) -> bytes:
    """The seed of the next link; the way back is a preimage."""
    return derive(seed, salt=b"", info=domain("prekey-ratchet"))
