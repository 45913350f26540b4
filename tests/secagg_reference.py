"""Secure aggregation a second time, slowly, in Python integers: python tests/secagg_reference.py writes tests/vectors.

Shares no code with stages/. Curve, block cipher and AEAD are the library's; HKDF, counter mode, fixed point, Shamir and
the protocol are written out here. Every input is a SHA-256 of a label, every random draw the next bytes of the stream
SHA-256(label || counter).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOLDER = Path(__file__).parent / "vectors" / "secagg"
PRIME = 2**257 - 93
MODULUS = 2**32
BOUND = 8.0


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def ds(purpose: str) -> bytes:
    return b"fedcollm/secagg/1/" + purpose.encode() + b"\0"


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 for one block of output."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\1", "sha256")


def words(key: bytes, count: int) -> list[int]:
    """Counter mode by hand: block i is AES(key, i as 16 big-endian bytes), four little-endian words."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(block.update(i.to_bytes(16, "big")) for i in range(count // 4 + 1))
    return list(struct.unpack(f"<{count}I", stream[: 4 * count]))


def draws(label: str) -> Callable[[int], bytes]:
    """The stream of a label, taken from the front."""
    stream = bytearray(b"".join(sha(label.encode(), u32(i)) for i in range(1000)))

    def draw(count: int) -> bytes:
        taken = bytes(stream[:count])
        assert len(taken) == count
        del stream[:count]
        return taken

    return draw


def public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def exchange(secret: bytes, other: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(other))


def value_at(polynomial: list[int], x: int) -> int:
    return sum(coefficient * x**power for power, coefficient in enumerate(polynomial)) % PRIME


def encode(update: list[float], clients: int, examples: int | None, largest: int) -> list[int]:
    heaviest = (2**31 - 1) // clients
    weight = heaviest if examples is None else round(examples / largest * heaviest)
    return [round(value * (weight / BOUND)) % MODULUS for value in update] + [weight, 1]


Alter = Callable[[int, int, int, int], int]
"""Change a share on its way, given from whom, to whom or of which row, of which secret."""


def unaltered(source: int, target: int, index: int, share: int) -> int:
    return share


@dataclass(frozen=True)
class Federation:
    """What every client of a round knows, and the secret keys that each has of its own."""

    label: str
    clients: list[int]
    largest: int = 1000

    @property
    def opening(self) -> str:
        return f"{self.label}: opening"

    @property
    def transcript(self) -> bytes:
        return sha(ds("open"), self.opening.encode())

    def seed(self, client: int) -> bytes:
        return sha(f"{self.label}: seed {client}".encode())

    def key(self, client: int) -> bytes:
        return hkdf(self.seed(client), b"", ds("prekey-secret"))

    def prekey(self, client: int) -> bytes:
        return public(self.key(client))

    def agreed(self, u: int, v: int) -> bytes:
        return exchange(self.key(u), self.prekey(v))

    def pair_key(self, u: int, v: int) -> bytes:
        low, high = min(u, v), max(u, v)
        info = ds("pair-mask") + u32(low) + u32(high) + self.prekey(low) + self.prekey(high)
        return hkdf(self.agreed(u, v), self.transcript, info)

    def pair_commitment(self, u: int, v: int) -> str:
        return sha(ds("commit-pair"), self.transcript, u32(min(u, v)), u32(max(u, v)), self.pair_key(u, v)).hex()


def upload(
    federation: Federation, u: int, *, size: int, examples: int | None, deal: Alter
) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """What client u draws and sends, and the shares it deals to each client: one of each secret."""
    clients, transcript = federation.clients, federation.transcript
    values, draw = update(federation.label, u, size), draws(f"{federation.label}: draws {u}")
    weighed = encode(values, len(clients), examples, federation.largest)
    own = draw(32)
    pairs = {v: federation.pair_key(u, v) for v in clients if v != u}
    y = b"".join(map(u32, hidden(weighed, transcript, u, own, pairs)))
    shares: dict[int, list[int]] = {w: [] for w in clients}
    for index, secret in enumerate((own, *pairs.values())):
        polynomial = [int.from_bytes(secret, "little")]
        polynomial += [int.from_bytes(draw(33), "little") % 2**257 for _ in range(2 * len(clients) // 3)]
        for w in clients:
            shares[w].append(deal(u, w, index, value_at(polynomial, w)))
    rows = []
    for w in clients:
        row = bytes(len(clients) * 33 + 32)
        if w != u:
            salt = draw(16)
            info = ds("share-seal") + u32(u) + u32(w) + salt
            sealing = AESGCM(hkdf(federation.agreed(u, w), transcript, info))
            row = salt + sealing.encrypt(bytes(12), joined(shares[w]), transcript + u32(u) + u32(w) + sha(y))
        rows.append(row.hex())
    sent = {
        "seed": federation.seed(u).hex(),
        "prekey": federation.prekey(u).hex(),
        "update": struct.pack(f"<{size}f", *values).hex(),
        "examples": examples,
        "draws": f"{federation.label}: draws {u}",
        "encoded": weighed,
        "y": list(struct.unpack(f"<{size + 3}I", y)),
        "y_sha256": sha(y).hex(),
        "commit_self": sha(ds("commit-self"), transcript, u32(u), own).hex(),
        "commit_pairs": {str(v): federation.pair_commitment(u, v) for v in pairs},
        "rows": rows,
        "own_shares": joined(shares[u]).hex(),
    }
    return sent, shares


def hidden(weighed: list[int], transcript: bytes, u: int, own: bytes, pairs: dict[int, bytes]) -> list[int]:
    """Values, weight, count and checksum under all masks of client u."""
    checks = words(hkdf(transcript, b"", ds("check")), len(weighed))
    y = [*weighed, sum(r * q for r, q in zip(checks, weighed, strict=True))]
    masks = [(1, hkdf(own, transcript, ds("self-mask") + u32(u)))]
    masks += [(1 if v > u else -1, key) for v, key in pairs.items()]
    for sign, key in masks:
        y = [a + sign * b for a, b in zip(y, words(key, len(y)), strict=True)]
    return [a % MODULUS for a in y]


def joined(shares: list[int]) -> bytes:
    return b"".join(share.to_bytes(33, "little") for share in shares)


def case(
    label: str,
    *,
    clients: list[int],
    survivors: list[int],
    revealing: list[int],
    size: int,
    examples: dict[int, int] | None = None,
    deal: Alter = unaltered,
    reveal: Alter = unaltered,
) -> dict[str, Any]:
    """A whole round: what everyone draws, sends and finds. deal and reveal may alter shares on their way."""
    federation = Federation(label, clients)
    sent, dealt = {}, {}
    for u in clients:
        sent[str(u)], dealt[u] = upload(federation, u, size=size, examples=examples and examples[u], deal=deal)
    missing = [v for v in clients if v not in survivors]
    server, close = sha(f"{label}: server".encode()), sha(f"{label}: close".encode())
    revealed = {}
    for w in revealing:
        opened = []
        for i, u in enumerate(survivors):
            places = [0, *(1 + [x for x in clients if x != u].index(v) for v in missing)]
            opened += [reveal(w, i, j, dealt[u][w][place]) for j, place in enumerate(places)]
        ephemeral = draws(f"{label}: reveal {w}")(32)
        info = ds("reveal-seal") + u32(w) + public(ephemeral) + public(server)
        sealing = AESGCM(hkdf(exchange(ephemeral, public(server)), close, info))
        revealed[str(w)] = {
            "draws": f"{label}: reveal {w}",
            "shares": joined(opened).hex(),
            "sealed": (public(ephemeral) + sealing.encrypt(bytes(12), joined(opened), close)).hex(),
        }
    encoded = [sent[str(u)]["encoded"] for u in survivors]
    return {
        "opening": federation.opening,
        "transcript": federation.transcript.hex(),
        "bound": BOUND,
        "largest_examples": federation.largest,
        "clients": sent,
        "survivors": survivors,
        "server": server.hex(),
        "close_sha256": close.hex(),
        "reveals": revealed,
        "sum": [sum(column) % MODULUS for column in zip(*encoded, strict=True)],
    }


def update(label: str, client: int, size: int) -> list[float]:
    """float32 values in [-7, 7), each from 24 bits of a digest, so that they are exact."""
    numbers = (int.from_bytes(sha(f"{label}: value {client} {i}".encode())[:3], "little") for i in range(size))
    return [struct.unpack("<f", struct.pack("<f", 7 * (number / 2**23 - 1)))[0] for number in numbers]


def sums() -> dict[str, dict[str, Any]]:
    """Rounds that end with a sum; wrong_shares names who revealed shares that do not fit, and of which dealers."""

    def altered(client: int, row: int, column: int, share: int) -> int:
        return (share + 1) % PRIME if client == 1 else share

    def misdealt(dealer: int, holder: int, index: int, share: int) -> int:
        return (share + 1) % PRIME if (dealer, holder, index) == (2, 1, 0) else share

    five = {"clients": [1, 2, 3, 4, 5], "survivors": [1, 2, 3, 4, 5], "revealing": [1, 2, 3, 4, 5], "size": 3}
    cases = {
        "three-clients": case("three", clients=[1, 2, 3], survivors=[1, 2, 3], revealing=[1, 2, 3], size=4),
        "one-client-vanished": case(
            "vanished", clients=[1, 2, 3, 4, 5], survivors=[1, 2, 4, 5], revealing=[1, 2, 4, 5], size=6
        ),
        "two-clients-vanished": case(
            "two", clients=[1, 2, 3, 4, 5, 6, 7], survivors=[1, 2, 3, 5, 7], revealing=[1, 2, 3, 5, 7], size=3
        ),
        "one-does-not-reveal": case(
            "silent", clients=[1, 2, 3, 4, 5], survivors=[1, 2, 3, 4, 5], revealing=[2, 3, 4, 5], size=3
        ),
        "a-subset-of-the-federation": case(
            "subset", clients=[2, 3, 7, 200], survivors=[2, 7, 200], revealing=[2, 7, 200], size=5
        ),
        "weights-by-examples": case(
            "weights",
            clients=[1, 2, 3],
            survivors=[1, 2, 3],
            revealing=[1, 2, 3],
            size=5,
            examples={1: 1, 2: 999, 3: 1000},
        ),
        "a-client-reveals-wrong-shares": case("responder", **five, reveal=altered)
        | {"wrong_shares": {"1": [1, 2, 3, 4, 5]}},
        "one-wrong-share-of-one-dealer": case("one share", **five, deal=misdealt) | {"wrong_shares": {"1": [2]}},
    }
    return {name: {"expect": "sum", "wrong_shares": {}} | found for name, found in cases.items()}


def refusals(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rounds that end with a problem, as changes of the round `one-client-vanished` of five clients."""

    def bad_dealer(dealer: int, holder: int, index: int, share: int) -> int:
        return int.from_bytes(sha(u32(holder), u32(index))) if dealer == 2 else share

    def changed(path: list[str | int], value: Any, problem: str, says: str) -> dict[str, Any]:
        return {"of": "one-client-vanished", "change": {"path": path, "value": value}} | {
            "expect": problem,
            "says": says,
        }

    def flipped(text: str) -> str:
        return text[:-2] + f"{int(text[-2:], 16) ^ 1:02x}"

    client = base["clients"]["2"]
    nan, infinite, large = (struct.pack("<f", value).hex() for value in (float("nan"), float("-inf"), -8.001))
    dealt = case(
        "dealer", clients=[1, 2, 3, 4, 5], survivors=[1, 2, 3, 4, 5], revealing=[1, 2, 3, 4, 5], size=3, deal=bad_dealer
    )
    del dealt["sum"]
    return {
        "refused-not-a-number": changed(["clients", "2", "update"], nan + client["update"][8:], "BadNumbers", "NaN"),
        "refused-infinity": changed(
            ["clients", "2", "update"], infinite + client["update"][8:], "BadNumbers", "infinity"
        ),
        "refused-beyond-the-bound": changed(
            ["clients", "2", "update"], large + client["update"][8:], "BadNumbers", "8.001"
        ),
        "refused-too-many-examples": changed(["clients", "2", "examples"], 1001, "BadNumbers", "1001 examples"),
        "refused-no-examples": changed(["clients", "2", "examples"], 0, "BadNumbers", "0 examples"),
        "refused-another-seed": changed(["clients", "2", "seed"], "00" * 32, "Refused", "client 2's key"),
        "refused-a-key-of-low-order": changed(["clients", "2", "prekey"], "00" * 32, "Damaged", "client 2"),
        "refused-another-opening": changed(["opening"], "another opening", "Damaged", "do not open"),
        "refused-a-damaged-row": changed(
            ["clients", "2", "rows", 0], flipped(client["rows"][0]), "Damaged", "client 2 sealed for 1"
        ),
        "refused-a-row-for-another-client": changed(
            ["clients", "2", "rows", 0], client["rows"][3], "Damaged", "client 2 sealed for 1"
        ),
        "refused-a-row-of-another-upload": changed(
            ["clients", "2", "y_sha256"], "00" * 32, "Damaged", "client 2 sealed for 1"
        ),
        "refused-too-few-survivors": changed(["survivors"], [1, 2, 4], "Refused", "it must have 4 of 5"),
        "refused-a-survivor-twice": changed(["survivors"], [1, 2, 2, 4, 5], "Refused", "each once"),
        "refused-a-stranger": changed(["survivors"], [1, 2, 4, 6], "Refused", "not clients of this round"),
        "refused-a-damaged-reveal": changed(
            ["reveals", "4", "sealed"], flipped(base["reveals"]["4"]["sealed"]), "Damaged", "client 4"
        ),
        "refused-a-reveal-for-another-close": changed(["close_sha256"], "00" * 32, "Damaged", "do not open"),
        "refused-another-masked-value": changed(
            ["clients", "2", "y", 0], client["y"][0] ^ 1, "Damaged", "does not hold its own checksum"
        ),
        "refused-another-pair-key": changed(
            ["clients", "2", "commit_pairs", "4"], "00" * 32, "disagreement", "clients 2 and 4"
        ),
        "refused-a-dealer-of-wrong-shares": {"expect": "Damaged", "says": "what clients 2 committed to"} | dealt,
    }


def vectors() -> dict[str, dict[str, Any]]:
    """Every file's content by its name."""
    found = sums()
    return found | refusals(found["one-client-vanished"])


def text(vector: dict[str, Any]) -> str:
    return json.dumps(vector, indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, vector in vectors().items():
        (FOLDER / f"{name}.json").write_text(text(vector))
