"""roster: whose keys count, and a fingerprint that people can read to each other."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import ROOT, edit
from federations import vault_of
from stages.parties import roster, roster_files, signatures
from stages.parties.names import SERVER
from stages.parties.party import Onlooker, Party
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.workspace.paths import Workspace


def test_a_fingerprint_is_two_hundred_bits_of_the_digest_in_base32() -> None:
    content = b"a roster\n"
    letters = base64.b32encode(hashlib.sha256(content).digest()[:25]).decode()  # 40 letters of 5 bits
    assert roster.fingerprint(content) == "-".join(letters[i : i + 4] for i in range(0, 40, 4))


def test_the_recipe_in_the_docs_prints_the_fingerprint(enrolled: Path) -> None:
    [recipe] = re.findall(r"python -c '(import base64, hashlib\n[^']+)'", (ROOT / "docs/how-to/keys.md").read_text())
    done = subprocess.run([sys.executable, "-c", recipe], cwd=enrolled, capture_output=True, text=True, check=True)
    content = (enrolled / "exchange/federation.json").read_bytes()
    assert roster.is_fingerprint(done.stdout.strip(), content)


def test_a_pinned_roster_that_is_damaged_is_named(enrolled: Path) -> None:
    for harm in ("{", "{}", "[" * 100_000):
        path = vault_of(enrolled, "client-2") / "federation.json"
        path.write_text(harm)
        with pytest.raises(Damaged, match=r"the secret federation.json of client-2 is damaged") as caught:
            found(enrolled)
        assert caught.value.where == path


@pytest.mark.parametrize("spoken", [str.lower, lambda text: text.replace("-", ""), lambda text: f" {text} "])
def test_how_a_person_types_a_fingerprint_does_not_matter(spoken: Callable[[str], str]) -> None:
    assert roster.is_fingerprint(spoken(roster.fingerprint(b"x")), b"x")
    assert not roster.is_fingerprint(spoken(roster.fingerprint(b"y")), b"x")
    assert not roster.is_fingerprint(roster.fingerprint(b"x")[:-1], b"x")
    assert not roster.is_fingerprint("", b"x")


def found(folder: Path, party: str = "client-2") -> roster.Roster:
    pinned = Party(Workspace(folder), party).members
    assert pinned is not None
    return pinned


def test_every_party_pins_the_same_roster(enrolled: Path) -> None:
    content = (enrolled / "exchange/federation.json").read_bytes()
    for party in (SERVER, "client-1", "client-2", "client-3"):
        assert found(enrolled, party).sha256 == hashlib.sha256(content).hexdigest()
        identity = Party(Workspace(enrolled), party).keys.identity
        assert found(enrolled).key_of(party) == identity.public_key().public_bytes_raw()
    assert found(enrolled).clients == [1, 2, 3]
    box = Party(Workspace(enrolled), SERVER).keys.box
    assert found(enrolled).server_box == box.public_key().public_bytes_raw()


def test_a_stranger_has_no_key(enrolled: Path) -> None:
    with pytest.raises(Refused, match="client-9 is not in this federation's roster") as caught:
        found(enrolled).key_of("client-9")
    assert "enroll" in (caught.value.mend or "")


def test_what_is_pinned_counts_and_not_what_lies_in_the_exchange(enrolled: Path) -> None:
    before = found(enrolled)
    (enrolled / "exchange/federation.json").write_text("{}")
    assert found(enrolled) == before


@pytest.mark.parametrize(("party", "mend"), [(SERVER, "fedcollm enroll"), ("client-2", "fedcollm join --client 2")])
def test_who_has_not_joined_takes_no_part(party: str, mend: str, enrolled: Path) -> None:
    (vault_of(enrolled, party) / "federation.json").unlink()
    with pytest.raises(NotReady, match=f"{party} has not joined this federation") as caught:
        _ = Party(Workspace(enrolled), party).members
    assert caught.value.mend == mend


def test_without_keys_plain_mode_has_no_roster(finished: Path) -> None:
    assert Party(Workspace(finished), SERVER).members is None
    assert Onlooker(Workspace(finished)).members is None


def test_an_edited_agreement_is_refused_by_everybody_in_the_roster(enrolled: Path) -> None:
    edit(enrolled / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused, match=r"fedcollm.toml has changed since the parties enrolled") as caught:
        _ = Party(Workspace(enrolled), "client-2").members
    assert caught.value.where == enrolled / "fedcollm.toml"
    assert (caught.value.mend or "").startswith("undo the edit")


KEYS = "exchange/keys/client-2.json"


def resigned(path: Path, folder: Path, party: str, kind: str, change: Callable[[dict[str, object]], object]) -> None:
    """Change a JSON file and sign it anew with the party's own key."""
    value = json.loads(path.read_text())
    change(value)
    content = json.dumps(value).encode()
    path.write_bytes(content)
    identity = Party(Workspace(folder), party).keys.identity
    path.with_name(f"{path.name}.sig").write_bytes(signatures.sign(content, kind, identity))


def test_one_time_keys_come_from_the_very_file_that_the_roster_names(enrolled: Path) -> None:
    members, workspace = found(enrolled), Workspace(enrolled)
    assert members.prekeys(workspace, 2) == json.loads((enrolled / KEYS).read_text())["prekeys"]
    assert len(members.prekeys(workspace, 2)) == 2 * 2 + 8  # two rounds, each twice, and eight more
    resigned(enrolled / KEYS, enrolled, "client-2", "keys", lambda value: value.update(prekeys=["0" * 64]))
    with pytest.raises(Damaged, match=r"client-2.json is not the file that the roster names") as caught:
        members.prekeys(workspace, 2)
    assert caught.value.mend == "copy exchange/keys again from the server"


BAD_KEYS: dict[str, tuple[Callable[[dict[str, object]], object], str]] = {
    "of another client": (lambda value: value.update(client=3), "holds the keys of client 3"),
    "with a short key": (lambda value: value.update(ed25519="00"), "ed25519: "),
    "with more": (lambda value: value.update(secret="x"), "secret: Extra inputs"),
    "of another format": (lambda value: value.update(format="fedcollm/keys/2"), "format: "),
    "of another key": (lambda value: value.update(ed25519="0" * 64), "signed with key_id"),
}


@pytest.mark.parametrize("kind", BAD_KEYS)
def test_public_keys_that_are_not_sound_are_damaged(kind: str, enrolled: Path) -> None:
    change, message = BAD_KEYS[kind]
    resigned(enrolled / KEYS, enrolled, "client-2", "keys", change)
    with pytest.raises(Damaged, match=message) as caught:
        roster_files.read_keys(enrolled / KEYS)
    assert caught.value.mend


def doubled(value: dict[str, object]) -> None:
    clients = value["clients"]
    assert isinstance(clients, list)
    clients[1]["ed25519"] = clients[0]["ed25519"]


def disordered(value: dict[str, object]) -> None:
    clients = value["clients"]
    assert isinstance(clients, list)
    clients.reverse()


@pytest.mark.parametrize("change", [doubled, disordered])
def test_a_roster_that_names_somebody_twice_or_in_disorder_is_damaged(
    change: Callable[[dict[str, object]], None], enrolled: Path
) -> None:
    path = enrolled / "exchange/federation.json"
    resigned(path, enrolled, SERVER, "federation", change)
    with pytest.raises(Damaged, match="names a client or a key twice"):
        roster_files.read_federation(path)


def test_a_roster_that_another_than_its_server_signed_is_damaged(enrolled: Path) -> None:
    path = enrolled / "exchange/federation.json"
    resigned(path, enrolled, "client-2", "federation", lambda value: value)
    with pytest.raises(Damaged, match=r"signed with key_id .*; the server has"):
        roster_files.read_federation(path)
    with pytest.raises(Damaged, match="signed with key_id"):
        _ = Onlooker(Workspace(enrolled)).members
