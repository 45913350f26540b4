"""What a roster and a client's public keys hold, and how they are read: strictly, each proven by its own signature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.files import reading
from stages.parties import signatures
from stages.parties.names import client
from stages.runtime.errors import Damaged

SUITE: Literal["fedcollm/secagg/1"] = "fedcollm/secagg/1"

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=1, le=2**31)]
LEVELS = 3
"""exchange/keys/client-2.json: how deep below the workspace; none of these may be a symbolic link."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PublicKeys(_Part):
    """exchange/keys/client-k.json: what a client signs with, and a one-time key for each opening of a round.

    ckks: what updates are encrypted with, of the one client that opens their sums; of others it is not written.
    """

    format: Literal["fedcollm/keys/1"] = "fedcollm/keys/1"
    federation: str
    agreement_sha256: Key
    client: Number
    ed25519: Key
    prekeys: list[Key]
    ckks: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")] | None = None


class Member(_Part):
    """A client of the roster."""

    client: Number
    ed25519: Key
    keys_sha256: Key


class ServerKeys(_Part):
    """What the server signs with, and what reveals are sealed to."""

    ed25519: Key
    x25519: Key


class Federation(_Part):
    """exchange/federation.json: the roster. id is drawn anew: no two federations are mistaken for each other.

    tasks_sha256: of the files in tasks/, without their data; earlier versions named none.
    """

    format: Literal["fedcollm/federation/1"] = "fedcollm/federation/1"
    federation: str
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    agreement_sha256: Key
    tasks_sha256: Key | None = None
    suite: Literal["fedcollm/secagg/1"] = SUITE
    clients: list[Member]
    server: ServerKeys


def read_keys(path: Path) -> tuple[PublicKeys, bytes]:
    """A client's public keys, which prove by their own signature that the client has the secret ones."""
    _, content = reading.read_json(path, levels=LEVELS)
    keys = parsed(PublicKeys, content, path)
    if path.name != f"{client(keys.client)}.json":
        raise Damaged(f"{path.name} holds the keys of client {keys.client}", where=path, mend=reading.COPY_AGAIN)
    signatures.check(content, "keys", bytes.fromhex(keys.ed25519), path, client(keys.client), levels=LEVELS)
    return keys, content


def read_federation(path: Path) -> tuple[Federation, bytes]:
    """The roster as it lies in the exchange, signed by the server it names; who has pinned it reads its own copy."""
    _, content = reading.read_json(path, levels=LEVELS - 1)
    federation = parsed(Federation, content, path)
    numbers = [member.client for member in federation.clients]
    if numbers != sorted(set(numbers)) or len({member.ed25519 for member in federation.clients}) != len(numbers):
        raise Damaged("the roster names a client or a key twice", where=path, mend=reading.COPY_AGAIN)
    key = bytes.fromhex(federation.server.ed25519)
    signatures.check(content, "federation", key, path, "the server", levels=LEVELS - 1)
    return federation, content


P = TypeVar("P", bound=BaseModel)


def parsed(kind: type[P], content: bytes, path: Path) -> P:
    """What JSON bytes say. Raises Damaged, or ValueError or RecursionError for bytes that are no JSON."""
    value: Any = reading.parse_json(content)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise Damaged(f"{path.name}: {key}: {first['msg']}", where=path, mend=reading.COPY_AGAIN) from error
