"""A client's masked upload: its update hidden under keystreams that cancel in the sum, and the shares that remove them.

The protocol is Bonawitz et al. (2017) re-cut for files, one upload and one reveal for each client and round. A client u
adds the words of m_u, from a seed b_u of its own, and for every other client v those of the pair key k_uv, with
opposite signs at the two ends. Shares of b_u and of every k_uv travel with the upload, sealed to their holders: where
u's upload arrives its b_u is opened, where v's does not the k_uv are, and never both of one client.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stages.artefacts.sizes import SHARE_BYTES
from stages.parties.one_time_keys import derive, domain
from stages.runtime.errors import Damaged, Refused
from stages.secagg import prg, shamir
from stages.secagg.prg import Stream
from stages.secagg.shamir import SECRET_BYTES, Draw
from stages.workspace.averaging import threshold

SALT_BYTES, TAG_BYTES = 16, 16
NONCE = bytes(12)
"""Every sealing key is used once."""


@dataclass(frozen=True)
class Round:
    """What masks of one round hang on.

    transcript: the hash of the exact bytes that opened the round.
    prekeys: the raw X25519 public key of every client of the round, by its number.
    """

    transcript: bytes
    prekeys: Mapping[int, bytes]

    def __post_init__(self) -> None:
        if len(self.prekeys) < 3 or min(self.prekeys) < 1:
            raise ValueError("a round has at least three clients, numbered from 1")

    @property
    def clients(self) -> list[int]:
        """Their numbers, ascending."""
        return sorted(self.prekeys)

    @property
    def threshold(self) -> int:
        """How many must reveal, of the clients of this round."""
        return threshold(len(self.prekeys))


@dataclass(frozen=True)
class Masked:
    """What a client uploads, and what it keeps.

    y: uint32 [d+3], the masked update, weight, count and checksum. y_sha256: of y's little-endian bytes.
    commit_self, commit_pairs: hexadecimal commitments to b_u and to every k_uv.
    rows: uint8 [K, 16+33K+16], shares sealed for each client of the round, ascending; the own row is zeros.
    own_shares: uint8 [K, 33], private, what the own row would hold.
    """

    y: np.ndarray
    y_sha256: str
    commit_self: str
    commit_pairs: dict[int, str]
    rows: np.ndarray
    own_shares: np.ndarray = field(repr=False)


def mask(
    values: np.ndarray,
    round: Round,
    *,
    client: int,
    secret: X25519PrivateKey,
    draw: Draw = secrets.token_bytes,
    threads: int | None = None,
) -> Masked:
    """Hide an encoded update, uint32 [d+2], among those of the round's other clients.

    secret: this client's key of the round. draw: in this order b_u, the coefficients of each secret's polynomial (b_u,
    then k_uv by v ascending) and a salt for each other client, ascending; new at every masking, or two masked updates
    would show their difference. Raises Refused for a key that is not the round's, Damaged for another's that is no key.
    """
    if values.dtype != np.uint32:
        raise ValueError(f"an encoded update is uint32, this one {values.dtype}")
    if secret.public_key().public_bytes_raw() != round.prekeys.get(client):
        message = f"client {client}'s key is not the one that the round names for it"
        raise Refused(message, mend="look whether the round was opened for other keys than the enrolled ones")
    others = [v for v in round.clients if v != client]
    agreed = {v: agree(secret, round.prekeys[v], f"client {v}") for v in others}
    pair_keys = {v: pair_key(round, client, v, agreed[v]) for v in others}
    seed = draw(SECRET_BYTES)
    y = _with_checksum(values, round.transcript)
    prg.add(y, [(self_mask(round, client, seed), 1), *pair_streams(client, pair_keys)], threads=threads)
    digest = hashlib.sha256(y.data).digest()
    shares = [
        shamir.split(key, threshold=round.threshold, holders=round.clients, draw=draw)
        for key in (seed, *pair_keys.values())
    ]
    rows = np.zeros((len(round.clients), sealed_row_bytes(len(round.clients))), np.uint8)
    for row, w in zip(rows, round.clients, strict=True):
        if w != client:
            salt = draw(SALT_BYTES)
            sealed = row_cipher(round, client, w, agreed[w], salt).encrypt(
                NONCE, b"".join(share[w] for share in shares), row_context(round, client, w, digest)
            )
            row[:] = np.frombuffer(salt + sealed, np.uint8)
    return Masked(
        y=y,
        y_sha256=digest.hex(),
        commit_self=commit_self(round, client, seed),
        commit_pairs={v: commit_pair(round, client, v, key) for v, key in pair_keys.items()},
        rows=rows,
        own_shares=np.frombuffer(b"".join(share[client] for share in shares), np.uint8).reshape(-1, SHARE_BYTES),
    )


def open_row(
    row: np.ndarray, round: Round, *, dealer: int, holder: int, secret: X25519PrivateKey, y_sha256: str
) -> np.ndarray:
    """The shares that a client dealt to another, uint8 [K, 33]. Raises Damaged for a row that was not sealed so.

    row: uint8 [16+33K+16]. secret: the holder's key of the round. y_sha256: of the dealer's masked update.
    """
    content, size = row.tobytes(), sealed_row_bytes(len(round.clients))
    if len(content) != size:
        raise Damaged(f"the shares that client {dealer} sealed for {holder} have {len(content)} bytes, expected {size}")
    agreed = agree(secret, round.prekeys[dealer], f"client {dealer}")
    cipher = row_cipher(round, dealer, holder, agreed, content[:SALT_BYTES])
    context = row_context(round, dealer, holder, bytes.fromhex(y_sha256))
    shares = decrypt(cipher, content[SALT_BYTES:], context, f"the shares that client {dealer} sealed for {holder}")
    return np.frombuffer(shares, np.uint8).reshape(-1, SHARE_BYTES)


def agree(secret: X25519PrivateKey, public: bytes, whose: str) -> bytes:
    """X25519. Raises Damaged for a public key that gives no secret."""
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Damaged(f"the public key of {whose} is no X25519 key") from None


def decrypt(cipher: AESGCM, content: bytes, context: bytes, what: str) -> bytes:
    """The content. Raises Damaged, naming what it is, if it was not sealed with this key in this context."""
    try:
        return cipher.decrypt(NONCE, content, context)
    except InvalidTag:
        message = f"{what} do not open: they are damaged, or were sealed for another round, upload or key"
        raise Damaged(message) from None


def pair_streams(client: int, pair_keys: Mapping[int, bytes]) -> list[Stream]:
    """The pair masks in a client's masked update: added for later clients, taken away for earlier ones."""
    return [(key, 1 if v > client else -1) for v, key in pair_keys.items()]


def self_mask(round: Round, client: int, seed: bytes) -> bytes:
    """The key m_u of a client's own mask."""
    return derive(seed, salt=round.transcript, info=domain("self-mask") + _u32(client))


def pair_key(round: Round, u: int, v: int, agreed: bytes) -> bytes:
    """k_uv, the same at both ends."""
    first, second = sorted((u, v))
    parties = _u32(first) + _u32(second) + round.prekeys[first] + round.prekeys[second]
    return derive(agreed, salt=round.transcript, info=domain("pair-mask") + parties)


def commit_self(round: Round, client: int, seed: bytes) -> str:
    """What a client is held to when its b_u is opened."""
    return hashlib.sha256(domain("commit-self") + round.transcript + _u32(client) + seed).hexdigest()


def commit_pair(round: Round, u: int, v: int, key: bytes) -> str:
    """What both ends are held to when their k_uv is opened; they publish the same value."""
    first, second = sorted((u, v))
    content = domain("commit-pair") + round.transcript + _u32(first) + _u32(second) + key
    return hashlib.sha256(content).hexdigest()


def row_cipher(round: Round, dealer: int, holder: int, agreed: bytes, salt: bytes) -> AESGCM:
    """What seals one client's shares for another. A new salt makes it a new key."""
    info = domain("share-seal") + _u32(dealer) + _u32(holder) + salt
    return AESGCM(derive(agreed, salt=round.transcript, info=info))


def row_context(round: Round, dealer: int, holder: int, digest: bytes) -> bytes:
    """What a sealed row holds for and nothing else: round, both ends and the masked update it came with."""
    return round.transcript + _u32(dealer) + _u32(holder) + digest


def sealed_row_bytes(clients: int) -> int:
    """The length of a sealed row."""
    return SALT_BYTES + SHARE_BYTES * clients + TAG_BYTES


def checksum(round_transcript: bytes, values: np.ndarray) -> int:
    """The check trailer of values, weight and count: linear, so that a sum of clients has the sum of theirs."""
    return prg.checksum(derive(round_transcript, salt=b"", info=domain("check")), values)


def _with_checksum(values: np.ndarray, round_transcript: bytes) -> np.ndarray:
    y = np.empty(len(values) + 1, "<u4")
    y[:-1] = values
    y[-1] = checksum(round_transcript, y[:-1])
    return y


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")
