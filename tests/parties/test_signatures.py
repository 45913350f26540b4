"""signatures: exact bytes, one key, one kind of file; everything else is named."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from stages.parties import signatures
from stages.runtime.errors import Damaged, NotReady

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
CONTENT = b'{"round": 1}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with its signature beside it."""
    file = tmp_path / "manifest.json"
    file.write_bytes(CONTENT)
    (tmp_path / "manifest.json.sig").write_bytes(signatures.sign(CONTENT, "close", KEY))
    return file


def check(path: Path, *, kind: str = "close", key: Ed25519PrivateKey = KEY) -> None:
    public = key.public_key().public_bytes_raw()
    signatures.check(path.read_bytes(), kind, public, path, "the server")


def said(path: Path, **changes: object) -> None:
    """Change fields of the signature file."""
    target = path.with_name("manifest.json.sig")
    value = json.loads(target.read_text()) | changes
    target.write_text(json.dumps({name: found for name, found in value.items() if found is not None}))


def test_what_a_key_signed_holds(path: Path) -> None:
    check(path)


def test_the_signature_is_of_type_and_content_each_after_its_length(path: Path) -> None:
    """By Ed25519 alone, over the bytes that the specification spells out."""
    value = json.loads(path.with_name("manifest.json.sig").read_text())
    signed = (
        b"fedcollm/sig/1\0"
        + (14).to_bytes(8, "little")
        + b"fedcollm/close"
        + len(CONTENT).to_bytes(8, "little")
        + CONTENT
    )
    KEY.public_key().verify(base64.b64decode(value.pop("sig")), signed)
    # printf of the 32 public bytes | sha256sum, 16 digits
    key_id = signatures.reading.sha256(KEY.public_key().public_bytes_raw())[:16]
    assert value == {"v": 1, "alg": "ed25519", "key_id": key_id, "type": "fedcollm/close"}


def test_a_signature_is_one_line_and_the_same_every_time() -> None:
    first = signatures.sign(CONTENT, "close", KEY)
    assert first == signatures.sign(CONTENT, "close", KEY)
    assert first.count(b"\n") == 1
    assert first.endswith(b"\n")


@pytest.mark.parametrize("changed", [CONTENT.replace(b"1", b"2"), CONTENT.replace(b"\n", b"\r\n"), CONTENT[:-1], b""])
def test_other_bytes_are_not_what_was_signed(changed: bytes, path: Path) -> None:
    path.write_bytes(changed)
    with pytest.raises(Damaged, match=r"manifest.json is not what the server signed") as caught:
        check(path)
    assert caught.value.where == path
    assert "no text-mode transfer" in (caught.value.mend or "")


def test_another_signer_is_named_by_key(path: Path) -> None:
    with pytest.raises(Damaged) as caught:
        check(path, key=OTHER)
    ids = [signatures.key_id(key.public_key().public_bytes_raw()) for key in (KEY, OTHER)]
    assert caught.value.message == f"manifest.json is signed with key_id {ids[0]!r}; the server has {ids[1]!r}"
    assert "ask who sent it" in (caught.value.mend or "")


def test_another_signer_that_claims_the_right_key_is_found_out(path: Path) -> None:
    path.with_name("manifest.json.sig").write_bytes(signatures.sign(CONTENT, "close", OTHER))
    said(path, key_id=signatures.key_id(KEY.public_key().public_bytes_raw()))
    with pytest.raises(Damaged, match="is not what the server signed"):
        check(path)


def test_a_reveal_cannot_pass_as_a_close(path: Path) -> None:
    path.with_name("manifest.json.sig").write_bytes(signatures.sign(CONTENT, "reveal", KEY))
    with pytest.raises(Damaged, match="signed with type 'fedcollm/reveal'; the server has 'fedcollm/close'"):
        check(path)
    said(path, type="fedcollm/close")
    with pytest.raises(Damaged, match="is not what the server signed"):
        check(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v": 2}, "signed with v 2; the server has 1"),
        ({"alg": "none"}, "signed with alg 'none'"),
        ({"sig": "@@"}, "is not what the server signed"),
        ({"sig": ""}, "is not what the server signed"),
        ({"sig": None}, "is not a signature of fedcollm"),
        ({"note": "x"}, "is not a signature of fedcollm"),
    ],
)
def test_a_signature_of_another_form_is_refused(changes: dict[str, object], message: str, path: Path) -> None:
    said(path, **changes)
    with pytest.raises(Damaged, match=message) as caught:
        check(path)
    assert caught.value.mend


def test_a_signature_that_has_not_arrived_is_waited_for(path: Path) -> None:
    path.with_name("manifest.json.sig").unlink()
    with pytest.raises(NotReady, match=r"manifest.json.sig is not there") as caught:
        check(path)
    assert (caught.value.mend or "").startswith("wait until it is copied too")
