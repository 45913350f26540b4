"""Ed25519 signatures over a file's exact bytes, in a file beside it.

The type of what is signed is signed too, so that one kind of file cannot pass as another. (The encoding before signing
follows DSSE: every part after its length.)
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from stages.files import reading
from stages.runtime.errors import Damaged, NotReady
from stages.workspace.names import signature_beside

COPY_BYTES = "copy both files again, as they are: no text-mode transfer, no editor"


def key_id(public: bytes) -> str:
    """A public key's short name: 16 hexadecimal digits."""
    return reading.sha256(public)[:16]


def sign(content: bytes, kind: str, identity: Ed25519PrivateKey) -> bytes:
    """The signature file of content: one line of JSON."""
    signature = base64.b64encode(identity.sign(_encoded(content, kind))).decode()
    key = key_id(identity.public_key().public_bytes_raw())
    return reading.json_line({"v": 1, "alg": "ed25519", "key_id": key, "type": f"fedcollm/{kind}", "sig": signature})


def check(content: bytes, kind: str, public: bytes, where: Path, whose: str, *, levels: int = 1) -> None:
    """Raise unless the file beside where is this key's signature of where's content.

    NotReady if there is no signature yet, Damaged if it is another's, of other bytes, or of another kind of file.
    whose: the owner of the key, for the message.
    """
    path = signature_beside(where)
    try:
        value = reading.read_json(path, levels=levels)[0]
    except NotReady as problem:
        problem.message = f"{path.name} is not there: {where.name} counts only with {whose}'s signature"
        problem.mend = "wait until it is copied too, or copy it again"
        raise
    check_value(value, content, kind, public, where=where, whose=whose)


def check_value(value: dict[str, Any], content: bytes, kind: str, public: bytes, *, where: Path, whose: str) -> None:
    """The same of a signature that has been read. Raises Damaged."""
    path = signature_beside(where)
    expected = {"v": 1, "alg": "ed25519", "key_id": key_id(public), "type": f"fedcollm/{kind}"}
    for field, wanted in expected.items():
        if value.get(field) != wanted:
            message = f"{where.name} is signed with {field} {value.get(field)!r}; {whose} has {wanted!r}"
            raise Damaged(message, where=path, mend="copy it again from its origin, and ask who sent it")
    if set(value) != {*expected, "sig"}:
        raise Damaged(f"{path.name} is not a signature of fedcollm", where=path, mend=COPY_BYTES)
    try:
        signature = base64.b64decode(str(value["sig"]), validate=True)
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _encoded(content, kind))
    except (InvalidSignature, binascii.Error, ValueError):
        raise Damaged(f"{where.name} is not what {whose} signed", where=where, mend=COPY_BYTES) from None


def _encoded(content: bytes, kind: str) -> bytes:
    """What is signed: the type and the content, each after its length as 8 little-endian bytes."""
    parts = (f"fedcollm/{kind}".encode(), content)
    return b"fedcollm/sig/1\0" + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
