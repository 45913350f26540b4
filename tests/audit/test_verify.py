"""verify: every kind of broken link is named, and what is sound is counted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import Outcome, edit, published, sign
from federations import vault_of
from stages.audit.audit import audit
from stages.audit.verify import Verified, verify
from stages.parties import signatures
from stages.parties.enroll import enroll
from stages.parties.names import SERVER
from stages.parties.party import Party
from stages.runtime.errors import Problem
from stages.workspace.paths import Workspace

CLIENT, CLOSE, REVEAL = "exchange/round-0001/client-2", "exchange/round-0001/close", "exchange/round-0001/reveal-2"
THETA, NEXT, SUM = (
    "exchange/round-0001/broadcast",
    "exchange/round-0002/broadcast",
    "private/server/round-0001/aggregate",
)


def said(folder: Path, place: str, party: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, signed with the party's own key."""
    path = folder / place / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    path.write_bytes(content)
    identity = Party(Workspace(folder), party).keys.identity
    path.with_name("manifest.json.sig").write_bytes(signatures.sign(content, manifest["stage"], identity))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def foreign_roster(folder: Path) -> None:
    """A server with another key shows a roster of its own."""
    pinned = vault_of(folder, "client-2") / "federation.json"
    joined = pinned.read_bytes()
    own = Workspace(folder).secrets_pointer(SERVER)
    pointer = own.read_bytes()
    enroll(Workspace(folder), renew=True)
    own.write_bytes(pointer)
    for party in ("client-1", "client-3"):
        (vault_of(folder, party) / "federation.json").write_bytes(joined)


def foreign_keys(folder: Path) -> None:
    path = folder / "exchange/keys/client-3.json"
    content = path.read_bytes().replace(b'"tiny"', b'"wide"')
    path.write_bytes(content)
    identity = Party(Workspace(folder), "client-3").keys.identity
    path.with_name("client-3.json.sig").write_bytes(signatures.sign(content, "keys", identity))


BROKEN: dict[str, tuple[Callable[[Path], object], int, str, str]] = {
    "a changed byte": (
        lambda f: flip(f / CLIENT / "masked.safetensors"),
        4,
        "masked.safetensors is not the file its manifest names",
        CLIENT,
    ),
    "a changed byte of a reveal": (
        lambda f: flip(f / REVEAL / "reveal.bin"),
        4,
        "reveal.bin is not the file its manifest names",
        REVEAL,
    ),
    "a changed inbox": (
        lambda f: flip(f / CLOSE / "client-2.safetensors"),
        4,
        "client-2.safetensors is not the file its manifest names",
        CLOSE,
    ),
    "a changed manifest": (
        lambda f: sign(f / CLIENT, parameters=1),
        4,
        "manifest.json is not what client-2 signed",
        CLIENT,
    ),
    "no signature": (
        lambda f: (f / CLIENT / "manifest.json.sig").unlink(),
        3,
        "manifest.json.sig is not there",
        CLIENT,
    ),
    "another signer": (
        lambda f: said(f, CLIENT, "client-3", lambda manifest: manifest),
        4,
        "manifest.json is signed with key_id",
        CLIENT,
    ),
    "another place": (
        lambda f: said(f, CLIENT, "client-2", lambda manifest: manifest.update(round=2)),
        5,
        f"{CLIENT} is of another round: 2",
        CLIENT,
    ),
    "another parent": (
        lambda f: said(f, CLIENT, "client-2", lambda manifest: manifest["parents"].update(broadcast="0" * 64)),
        5,
        f"{CLIENT} was made from another {THETA} than lies here: sha256 0000",
        CLIENT,
    ),
    "another close": (
        lambda f: said(f, REVEAL, "client-2", lambda manifest: manifest["parents"].update(close="0" * 64)),
        5,
        f"{REVEAL} was made from another {CLOSE} than lies here",
        REVEAL,
    ),
    "another past": (
        lambda f: said(f, NEXT, SERVER, lambda manifest: manifest["opening"].update(previous_sha256="0" * 64)),
        5,
        f"{NEXT} follows another {THETA} than lies here: sha256 0000",
        NEXT,
    ),
    "another roster at the beginning": (
        lambda f: said(f, THETA, SERVER, lambda manifest: manifest["opening"].update(previous_sha256="0" * 64)),
        5,
        f"{THETA} follows another roster than lies here",
        THETA,
    ),
    "an update exchanged for another": (
        lambda f: said(f, CLIENT, "client-2", lambda manifest: manifest.update(steps=1)),
        5,
        f"{CLOSE} was made from another {CLIENT} than lies here",
        CLOSE,
    ),
    "an edited agreement": (
        lambda f: edit(f / "fedcollm.toml", "seed = 7", "seed = 8"),
        5,
        "fedcollm.toml has changed since the parties enrolled",
        "fedcollm.toml",
    ),
    "a foreign roster": (
        foreign_roster,
        5,
        "exchange/federation.json is another roster than the one that",
        "exchange/federation.json",
    ),
    "an edited roster": (
        lambda f: edit(f / "exchange/federation.json", '"tiny"', '"wide"'),
        4,
        "federation.json is not what the server signed",
        "exchange/federation.json",
    ),
    "foreign keys": (foreign_keys, 4, "client-3.json is not the file that the roster names", "exchange/keys"),
    "a file too many": (
        lambda f: (f / CLIENT / "notes.txt").touch(),
        4,
        "notes.txt does not belong in a masked update",
        CLIENT,
    ),
    "a file too few": (
        lambda f: (f / CLIENT / "shares.safetensors").unlink(),
        3,
        "shares.safetensors is missing",
        CLIENT,
    ),
    "a server's folder": (
        lambda f: flip(f / SUM / "adapter_model.safetensors"),
        4,
        "adapter_model.safetensors is not the file its manifest names",
        SUM,
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_each_broken_link_is_named_with_its_folder_and_exit_code(
    kind: str, summed: Path, fedcollm: Callable[..., Outcome]
) -> None:
    harm, code, message, place = BROKEN[kind]
    harm(summed)
    before = published(summed)
    outcome = fedcollm("verify", "-w", summed)
    assert outcome.code == code, outcome.err
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert f"in    {summed / place}" in outcome.err
    assert "\n  mend  " in outcome.err
    assert outcome.out == ""
    assert published(summed) == before


def test_a_sound_federation_is_counted(summed: Path, fedcollm: Callable[..., Outcome]) -> None:
    found = verify(Workspace(summed))
    # A round: the broadcast, 3 masked updates and 3 readable, the close, 3 reveals, the average, the LLM and the SLM.
    assert (found.folders, found.signatures, found.rounds) == (2 * 14, 2 * 14, [1, 2])
    assert (found.elsewhere, found.pinned_by) == (0, "server")
    assert found.as_text == "rounds 1 to 2: 28 folders hold, 28 signed, by the roster that server pinned"
    told = json.loads(fedcollm("verify", "--json", "-w", summed).out)
    assert told == {"folders": 28, "signatures": 28, "rounds": [1, 2], "elsewhere": 0, "pinned_by": "server"}


def test_on_a_clients_machine_it_verifies_what_is_there_and_counts_what_is_not(summed: Path) -> None:
    for path in ("private/server", "private/client-1", "private/client-3"):
        shutil.rmtree(summed / path)
    for k in (1, 3):
        for path in summed.glob(f"exchange/round-*/*-{k}"):
            shutil.rmtree(path)
    found = verify(Workspace(summed))
    assert found.pinned_by == "client-2"
    # A round: the broadcast, its update, masked and readable, the close, its reveal.
    assert found.folders == 2 * 5
    # The close of each round names two more updates; round 2's broadcast names the SLM that it is.
    assert found.elsewhere == 2 * 2 + 1


def test_an_auditor_without_keys_verifies_by_the_roster_in_the_exchange(summed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "auditor"
    shutil.copytree(summed / "exchange", folder / "exchange")
    shutil.copy(summed / "fedcollm.toml", folder)
    found = verify(Workspace(folder))
    assert found.pinned_by is None
    assert found.signatures == found.folders == 2 * 8
    assert "16 signed, by the roster in exchange/, which nobody here has pinned; 1 parent is" in found.as_text


def test_a_secure_exchange_stripped_of_its_roster_does_not_hold(
    summed: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "auditor"
    shutil.copytree(summed / "exchange", folder / "exchange", ignore=shutil.ignore_patterns("*.sig", "federation.json"))
    shutil.copy(summed / "fedcollm.toml", folder)
    outcome = fedcollm("verify", "-w", folder)
    assert outcome.code == 3
    assert "federation.json is missing" in outcome.err


def test_what_an_earlier_attempt_left_is_no_broken_link(summed: Path) -> None:
    from stages.broadcast import broadcast

    shutil.rmtree(summed / "exchange/round-0002")
    for number in (1, 2):
        shutil.rmtree(summed / f"private/server/round-000{number}")
    broadcast(Workspace(summed), round=1, overwrite=True)
    notes: list[str] = []
    found = verify(Workspace(summed), report=lambda event: notes.append(event.text))
    assert f"{CLIENT} is of an earlier attempt at its round" in notes
    assert found.rounds == [1, 2]  # round 2: what clients keep
    flip(summed / CLIENT / "masked.safetensors")
    with pytest.raises(Problem, match=r"masked.safetensors is not the file"):
        verify(Workspace(summed))


# --- plain mode without keys


PLAIN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a changed byte": (
        lambda f: flip(f / CLIENT / "adapter_model.safetensors"),
        4,
        "adapter_model.safetensors is not the file its manifest names",
    ),
    "a changed manifest": (lambda f: sign(f / CLIENT, steps=99), 5, f"{SUM} was made from another {CLIENT} than"),
    "another parent": (
        lambda f: sign(f / CLIENT, parents={"broadcast": "0" * 64}),
        5,
        f"{CLIENT} was made from another {THETA} than lies here",
    ),
    "another place": (lambda f: sign(f / CLIENT, client=3), 5, f"{CLIENT} is of another client: 3, here it is 2"),
    "an edited agreement": (
        lambda f: edit(f / "fedcollm.toml", "seed = 7", "seed = 8"),
        5,
        f"{THETA} is of another agreement",
    ),
    "a roster from nowhere": (lambda f: sign(f / CLIENT, federation_sha256="0" * 64), 5, "is of another roster"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_without_keys_the_chain_of_digests_is_walked_all_the_same(
    kind: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    harm, code, message = PLAIN[kind]
    harm(finished)
    outcome = fedcollm("verify", "-w", finished)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert "\n  mend  " in outcome.err


def test_a_broadcast_of_other_weights_than_its_parents_is_named(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    shutil.rmtree(finished / "private")
    for path in finished.glob("exchange/round-0002/client-*"):
        shutil.rmtree(path)
    shutil.copytree(finished / NEXT, finished / "private/server/round-0001/slm")
    parent = finished / "private/server/round-0001/slm"
    sign(parent, stage="co-distill", round=1, parents={})
    digest = hashlib.sha256((parent / "manifest.json").read_bytes()).hexdigest()
    flip(finished / NEXT / "adapter_model.safetensors")
    sign(finished / NEXT, parents={"slm": digest})
    outcome = fedcollm("verify", "-w", finished)
    assert outcome.code == 5, outcome.err
    assert f"{NEXT} has other weights than private/server/round-0001/slm" in outcome.err
    found = [one for one in audit([finished]) if one.id == "A1" and one.level == "FAIL"]
    assert [one.where for one in found] == [f"{NEXT}/adapter_model.safetensors"]


def test_one_is_told_in_the_singular() -> None:
    found = Verified(rounds=[1, 2], folders=1, signatures=1, elsewhere=1, pinned_by="client-2")
    whole = (
        "rounds 1 to 2: 1 folder holds, 1 signed, by the roster that client-2 pinned; 1 parent is not on this machine"
    )
    assert found.as_text == whole


def test_without_keys_it_says_so(finished: Path) -> None:
    found = verify(Workspace(finished))
    assert found.as_text == "rounds 1 to 2: 14 folders hold, none signed: this federation has no keys"
    shutil.rmtree(finished / "exchange")
    shutil.rmtree(finished / "private")
    assert verify(Workspace(finished)).as_text == "nothing to verify: no folder is here yet"
