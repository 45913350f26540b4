"""keys, enroll and join: each given twice, out of order, for other parties, and anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit, make_workspace
from federations import SECURE, Machines, agreement, enrol, vault_of, with_keys
from stages.audit.audit import audit
from stages.broadcast import broadcast
from stages.parties import names, roster, signatures
from stages.parties.enroll import enroll
from stages.parties.join import join
from stages.parties.keys import keys
from stages.parties.party import Party
from stages.parties.vault import Vault
from stages.progress.status import status
from stages.runtime.errors import Damaged, NotReady, Refused, UsageProblem
from stages.runtime.events import Event
from stages.workspace.paths import Workspace

KEYS, ROSTER = "exchange/keys", "exchange/federation.json"


@pytest.fixture
def fresh(tmp_path: Path, base_models: Path) -> Path:
    """A secure workspace in which nobody has keys."""
    folder = with_keys(make_workspace(tmp_path / "fresh", base_models), tmp_path / "own keys")
    (folder / "fedcollm.toml").write_text(agreement())
    return folder


def exchanged(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "exchange").rglob("*.*")}


# --- keys


def test_keys_are_bound_to_the_agreement_and_one_key_serves_each_opening(fresh: Path) -> None:
    made = keys(Workspace(fresh), client=2)
    public = json.loads((fresh / KEYS / "client-2.json").read_text())
    assert made.path == fresh / KEYS / "client-2.json"
    assert public["agreement_sha256"] == Workspace(fresh).agreement_sha256
    assert (public["client"], public["federation"], len(public["prekeys"])) == (2, "tiny", 12)
    assert made.key_id == json.loads((fresh / KEYS / "client-2.json.sig").read_text())["key_id"]


def test_keys_given_again_publish_the_same_bytes_again(fresh: Path) -> None:
    keys(Workspace(fresh), client=2)
    before = exchanged(fresh)
    shutil.rmtree(fresh / KEYS)
    notes: list[str] = []
    keys(Workspace(fresh), client=2, report=lambda event: notes.append(event.text))
    assert exchanged(fresh) == before
    assert "already made" in notes


def test_keys_given_again_after_rounds_publish_the_same_bytes_again(enrolled: Path) -> None:
    """The chain of one-time keys has moved on by then, and its beginning is erased."""
    before = exchanged(enrolled)
    Party(Workspace(enrolled), "client-2").keys.advance(5)
    keys(Workspace(enrolled), client=2)
    assert exchanged(enrolled) == before


def test_keys_of_another_agreement_are_kept_until_they_are_renewed(enrolled: Path) -> None:
    before = exchanged(enrolled)
    edit(enrolled / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused, match="client 2 has keys for another agreement") as caught:
        keys(Workspace(enrolled), client=2)
    assert "fedcollm keys --client 2 --renew" in (caught.value.mend or "")
    assert exchanged(enrolled) == before
    old = vault_of(enrolled, "client-2")
    keys(Workspace(enrolled), client=2, renew=True)
    assert vault_of(enrolled, "client-2") != old
    assert old.is_dir()
    assert exchanged(enrolled)[f"{KEYS}/client-2.json"] != before[f"{KEYS}/client-2.json"]


def test_nobody_else_has_keys_made(fresh: Path) -> None:
    with pytest.raises(UsageProblem, match="there is no client 9"):
        keys(Workspace(fresh), client=9)
    assert not (fresh / "exchange").exists()


def without_keys(folder: Path, *parties: str) -> Workspace:
    """The machine of the other parties: these have no vault on it."""
    workspace = Workspace(folder)
    for party in parties:
        workspace.secrets_pointer(party).unlink()
    return workspace


@pytest.mark.parametrize("party", ["server", "client-2"])
def test_on_another_partys_machine_no_new_identity_is_made(
    party: str, enrolled: Path, fedcollm: Callable[..., Outcome]
) -> None:
    workspace = without_keys(enrolled, "server", "client-1", "client-2")
    before = exchanged(enrolled)
    name = party.replace("-", " ")
    for words in (f"next --{name}", "enroll" if party == "server" else f"keys --{name}"):
        outcome = fedcollm(*words.split(), "-w", enrolled)
        assert outcome.code == 5, outcome.err
        assert f"client 3 has joined here; the keys of {names.said(party)} are on its own machine" in outcome.err
        assert "--renew" in outcome.err
    assert exchanged(enrolled) == before
    assert Vault.find(workspace, party) is None
    without_keys(enrolled, "client-3")
    (enrolled / f"{ROSTER}.sig").unlink()
    with pytest.raises(Refused, match="the roster has arrived"):
        keys(workspace, client=1)
    (enrolled / ROSTER).unlink()
    with pytest.raises(Refused, match="public keys of client 1 are here"):
        keys(workspace, client=1)
    keys(workspace, client=1, renew=True)
    assert exchanged(enrolled)[f"{KEYS}/client-1.json"] != before[f"{KEYS}/client-1.json"]


# --- enroll


def test_enroll_waits_for_everybodys_keys(fresh: Path) -> None:
    keys(Workspace(fresh), client=2)
    with pytest.raises(NotReady, match="the public keys of client 1, 3 are not there") as caught:
        enroll(Workspace(fresh))
    assert caught.value.where == fresh / KEYS / "client-1.json"
    assert caught.value.mend == "there: fedcollm keys --client 1; then carry exchange/keys here"
    assert not (fresh / ROSTER).exists()


def test_enroll_given_again_publishes_the_same_roster_again(enrolled: Path) -> None:
    before = exchanged(enrolled)
    for name in (ROSTER, f"{ROSTER}.sig"):
        (enrolled / name).unlink()
    notes: list[str] = []
    found = enroll(Workspace(enrolled), report=lambda event: notes.append(event.text))
    assert exchanged(enrolled) == before
    assert found.fingerprint == roster.fingerprint(before[ROSTER])
    assert "already enrolled" in notes


def test_a_client_with_new_keys_is_not_slipped_into_a_roster(enrolled: Path) -> None:
    before = exchanged(enrolled)[ROSTER]
    keys(Workspace(enrolled), client=2, renew=True)
    with pytest.raises(Refused, match="client 2 sent other keys than those enrolled") as caught:
        enroll(Workspace(enrolled))
    assert "fedcollm enroll --renew" in (caught.value.mend or "")
    assert exchanged(enrolled)[ROSTER] == before
    enroll(Workspace(enrolled), renew=True)
    assert exchanged(enrolled)[ROSTER] != before


def test_two_rosters_of_the_same_keys_are_two_federations(enrolled: Path) -> None:
    before = json.loads(exchanged(enrolled)[ROSTER])
    enroll(Workspace(enrolled), renew=True)
    after = json.loads(exchanged(enrolled)[ROSTER])
    assert after["clients"] == before["clients"]
    assert after["id"] != before["id"]
    assert after["server"] != before["server"]


def test_keys_for_another_agreement_are_not_enrolled(fresh: Path) -> None:
    for client in (1, 2):
        keys(Workspace(fresh), client=client)
    edit(fresh / "fedcollm.toml", "seed = 7", "seed = 8")
    keys(Workspace(fresh), client=3)
    with pytest.raises(Refused, match="client 1 made its keys under another agreement") as caught:
        enroll(Workspace(fresh))
    assert caught.value.where == fresh / KEYS / "client-1.json"
    assert "fedcollm keys --client 1 --renew" in (caught.value.mend or "")


def test_keys_under_another_clients_name_are_damaged(fresh: Path) -> None:
    for client in (1, 2, 3):
        keys(Workspace(fresh), client=client)
    for ending in ("json", "json.sig"):
        shutil.copy(fresh / KEYS / f"client-1.{ending}", fresh / KEYS / f"client-2.{ending}")
    with pytest.raises(Damaged, match=r"client-2.json holds the keys of client 1") as caught:
        enroll(Workspace(fresh))
    assert caught.value.mend


def test_a_client_that_plays_two_is_found_by_its_key(fresh: Path) -> None:
    for client in (1, 2, 3):
        keys(Workspace(fresh), client=client)
    pointer = fresh / "private/client-{}/keys.json"
    shutil.copytree(vault_of(fresh, "client-1"), vault_of(fresh, "client-1").with_name("client-2"))
    shutil.copy(str(pointer).format(1), str(pointer).format(2))
    (vault_of(fresh, "client-2") / "public.json").unlink()
    keys(Workspace(fresh), client=2)
    with pytest.raises(Damaged, match="client 2 has the key of another client") as caught:
        enroll(Workspace(fresh))
    assert caught.value.mend == "each makes its own keys"


def low(value: list[str]) -> None:
    value[3] = "00" * 32


def high(value: list[str]) -> None:
    value[3] = (2**255 - 20).to_bytes(32, "little").hex()  # p - 1, of order 2


def twice(value: list[str]) -> None:
    value[3] = value[4]


PREKEYS: dict[str, tuple[Callable[[list[str]], object], str]] = {
    "zero": (low, "the one-time key 3 of client 2 is no X25519 key"),
    "of low order": (high, "the one-time key 3 of client 2 is no X25519 key"),
    "one twice": (twice, "client 2 gives 11 one-time keys, not 12"),
    "too few": (list.pop, "client 2 gives 11 one-time keys, not 12"),
    "too many": (lambda value: value.append("09" + "00" * 31), "client 2 gives 13 one-time keys, not 12"),
}


@pytest.mark.parametrize("kind", PREKEYS)
def test_one_time_keys_that_nobody_could_mask_with_are_not_enrolled(kind: str, fresh: Path) -> None:
    change, message = PREKEYS[kind]
    for client in (1, 2, 3):
        keys(Workspace(fresh), client=client)
    path = fresh / KEYS / "client-2.json"
    value = json.loads(path.read_text())
    change(value["prekeys"])
    content = json.dumps(value).encode()
    path.write_bytes(content)
    identity = Party(Workspace(fresh), "client-2").keys.identity
    path.with_name("client-2.json.sig").write_bytes(signatures.sign(content, "keys", identity))
    with pytest.raises(Damaged, match=message) as caught:
        enroll(Workspace(fresh))
    assert caught.value.where == path
    assert not (fresh / ROSTER).exists()


@pytest.mark.parametrize("harm", ["{}", "{", '{"agreement_sha256": 1}'])
def test_a_damaged_copy_of_the_public_keys_is_named(harm: str, enrolled: Path) -> None:
    (vault_of(enrolled, "client-2") / "public.json").write_text(harm)
    with pytest.raises(Damaged, match=r"the secret public.json of client-2 is damaged"):
        keys(Workspace(enrolled), client=2)


def test_plain_mode_enrols_two_clients_too(tmp_path: Path, base_models: Path) -> None:
    folder = with_keys(make_workspace(tmp_path / "plain", base_models), tmp_path / "own keys")
    edit(folder / "fedcollm.toml", "clients = 3", "clients = 2")
    enrol(Workspace(folder), (1, 2))
    assert json.loads((folder / ROSTER).read_text())["federation"] == "tiny"


# --- join


def test_join_without_a_fingerprint_tells_it_and_trusts_nothing(enrolled: Path) -> None:
    (vault_of(enrolled, "client-2") / "federation.json").unlink()
    found = roster.fingerprint((enrolled / ROSTER).read_bytes())
    with pytest.raises(UsageProblem, match=f"the roster's fingerprint is {found}; read it to another client") as caught:
        join(Workspace(enrolled), client=2, fingerprint=None)
    assert "fedcollm join --client 2 --fingerprint ..." in caught.value.mend
    assert found not in caught.value.mend, "whoever copies the mend has compared the roster with itself"
    assert Party(Workspace(enrolled), "client-2").keys.pinned is None
    assert join(Workspace(enrolled), client=2, fingerprint=found.lower().replace("-", "")) == found
    assert Party(Workspace(enrolled), "client-2").keys.pinned == (enrolled / ROSTER).read_bytes()


def test_join_with_another_fingerprint_trusts_nothing(enrolled: Path) -> None:
    (vault_of(enrolled, "client-2") / "federation.json").unlink()
    found = roster.fingerprint((enrolled / ROSTER).read_bytes())
    with pytest.raises(Refused, match=f"has the fingerprint {found}, not AAAA") as caught:
        join(Workspace(enrolled), client=2, fingerprint="AAAA-AAAA-AAAA-AAAA-AAAA")
    assert "the server gave you another roster" in (caught.value.mend or "")
    assert Party(Workspace(enrolled), "client-2").keys.pinned is None


def test_join_given_again_does_nothing(enrolled: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in vault_of(enrolled, "client-2").iterdir()}
    notes: list[str] = []
    join(Workspace(enrolled), client=2, fingerprint=None, report=lambda event: notes.append(event.text))
    assert "already joined" in notes
    assert {path: path.stat().st_mtime_ns for path in vault_of(enrolled, "client-2").iterdir()} == before


def test_a_second_roster_is_refused_even_with_its_fingerprint(enrolled: Path) -> None:
    joined = roster.fingerprint((enrolled / ROSTER).read_bytes())
    other = enroll(Workspace(enrolled), renew=True).fingerprint
    with pytest.raises(Refused, match=f"another roster than the one joined: {other}, joined {joined}") as caught:
        join(Workspace(enrolled), client=2, fingerprint=other)
    assert "keys --client 2 --renew" in (caught.value.mend or "")


def test_join_comes_after_keys_and_after_the_roster(fresh: Path) -> None:
    with pytest.raises(NotReady, match="client-2 has no keys on this machine") as caught:
        join(Workspace(fresh), client=2, fingerprint=None)
    assert caught.value.mend == "fedcollm keys --client 2"
    keys(Workspace(fresh), client=2)
    with pytest.raises(NotReady, match="the roster has not arrived") as caught:
        join(Workspace(fresh), client=2, fingerprint=None)
    assert (caught.value.mend or "").startswith("on the server: fedcollm enroll")


def test_a_roster_without_this_clients_keys_is_refused_and_they_are_written_again(enrolled: Path) -> None:
    found = roster.fingerprint((enrolled / ROSTER).read_bytes())
    keys(Workspace(enrolled), client=2, renew=True)
    own = exchanged(enrolled)[f"{KEYS}/client-2.json"]
    (enrolled / KEYS / "client-2.json").write_text("what came with that roster")
    with pytest.raises(Refused, match="the roster does not have the keys that client 2 made") as caught:
        join(Workspace(enrolled), client=2, fingerprint=found)
    carry = "carry exchange/keys/client-2.json to the server; there: fedcollm enroll --renew"
    assert caught.value.mend == f"fedcollm keys --client 2 writes them again; {carry}"
    keys(Workspace(enrolled), client=2)
    assert exchanged(enrolled)[f"{KEYS}/client-2.json"] == own


def test_a_wrong_number_is_told_whose_keys_are_here(fresh: Path) -> None:
    keys(Workspace(fresh), client=3)
    with pytest.raises(NotReady, match="client-1 has no keys on this machine") as caught:
        join(Workspace(fresh), client=1, fingerprint=None)
    assert caught.value.mend == (
        "those of client-3 are here: is that meant? Else on client-1's machine: fedcollm keys --client 1"
    )


def test_whoever_has_made_keys_or_a_roster_is_told_to_whom_it_goes_if_they_are_elsewhere(fresh: Path) -> None:
    def notes(step: Callable[..., object], **named: object) -> list[str]:
        events: list[Event] = []
        step(Workspace(fresh), report=events.append, **named)
        return [event.text for event in events if " goes to " in event.text]

    assert [note for k in (1, 2, 3) for note in notes(keys, client=k)] == notes(enroll) == []  # all are here
    shutil.rmtree(fresh / "private/client-1")
    told = "exchange/federation.json goes to the clients: carry exchange/ there, or `fedcollm pack --roster`"
    assert notes(enroll) == [told]
    (fresh / "private/server/auxiliary.jsonl").unlink()
    told = "exchange/keys/client-2.json goes to the server: carry exchange/ there, or `fedcollm pack --keys --client 2`"
    assert notes(keys, client=2) == [told]


@pytest.mark.parametrize("mode", ["plain", "secure"])
def test_whoever_has_keys_and_a_roster_is_told_to_join_before_a_round(mode: str, fresh: Path) -> None:
    (fresh / "fedcollm.toml").write_text(agreement().replace('mode = "secure"', f'mode = "{mode}"'))
    workspace = Workspace(fresh)
    for k in (1, 2, 3):
        keys(workspace, client=k)
    enrolled = enroll(workspace)
    broadcast(workspace, round=1)
    found = status(workspace, party="client-2")
    assert found.next_command is None
    assert found.waiting_for == "a person to compare the roster's fingerprint: fedcollm join --client 2"
    join(workspace, client=2, fingerprint=enrolled.fingerprint)
    assert str(status(workspace, party="client-2").next_command) == "fedcollm client-train --client 2 --round 1"


def test_a_roster_of_another_agreement_is_refused(enrolled: Path) -> None:
    found = roster.fingerprint((enrolled / ROSTER).read_bytes())
    (vault_of(enrolled, "client-2") / "federation.json").unlink()
    edit(enrolled / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused, match="the roster is of another agreement") as caught:
        join(Workspace(enrolled), client=2, fingerprint=found)
    assert "the very same bytes" in (caught.value.mend or "")


def test_in_secure_mode_everybodys_keys_must_have_come_along(enrolled: Path) -> None:
    found = roster.fingerprint((enrolled / ROSTER).read_bytes())
    (vault_of(enrolled, "client-2") / "federation.json").unlink()
    (enrolled / KEYS / "client-3.json").unlink()
    with pytest.raises(NotReady, match=r"client-3.json is not there") as caught:
        join(Workspace(enrolled), client=2, fingerprint=found)
    assert caught.value.mend == "copy all of exchange/keys from the server"
    assert Party(Workspace(enrolled), "client-2").keys.pinned is None


# --- by the command line


def test_enrolment_by_commands_and_copies_ends_in_one_roster(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    machines = Machines.set_up(tmp_path, base_models, fedcollm, agreement(aggregation=SECURE), (1, 2, 3))
    fingerprint = machines.enrol(1, 2, 3)
    pinned = {party: Party(Workspace(folder), party).members for party, folder in machines.folders.items()}
    assert len({found.sha256 for found in pinned.values() if found}) == 1
    assert len(pinned) == 4
    told = machines.client(2, "join", "--json").out
    assert json.loads(told) == {"client": 2, "fingerprint": fingerprint}
    assert json.loads(machines.client(2, "keys", "--json").out).keys() == {"path", "key_id"}
    assert json.loads(machines.give("server", "enroll", "--json").out) == {"path": ROSTER, "fingerprint": fingerprint}
    # Each has its own secrets, and only its own.
    for party, folder in machines.folders.items():
        assert [path.name for path in Workspace(folder).secrets.glob("*/*")] == [party]


# --- tasks


def test_an_edited_task_file_is_noticed_by_all_who_use_it_or_look(
    enrolled: Path, fedcollm: Callable[..., Outcome]
) -> None:
    changed = "tasks/ is not what the parties enrolled with"
    assert changed not in fedcollm("status", "-w", enrolled).out
    (enrolled / "data/test.jsonl").write_text((enrolled / "data/train.jsonl").read_text() * 2)  # data is everyone's own
    (enrolled / "tasks/__pycache__").mkdir()
    (enrolled / "tasks/__pycache__/x.pyc").write_bytes(b"a cache")
    assert fedcollm("verify", "-w", enrolled).code == 0
    edit(enrolled / "tasks/colours.yaml", '"{{question}}"', '"Say red: {{question}}"')
    assert changed in fedcollm("status", "-w", enrolled).out
    for words in (["verify"], ["evaluate", "--zero-shot"]):
        refused = fedcollm(*words, "-w", enrolled)
        assert (refused.code, changed in refused.err) == (5, True)
    audited = fedcollm("audit", enrolled)
    assert audited.code == 4
    assert changed in audited.out
    shutil.rmtree(enrolled / "tasks")  # as at a client that scores nothing
    assert changed not in fedcollm("status", "-w", enrolled).out
    assert fedcollm("verify", "-w", enrolled).code == 0
    assert changed in fedcollm("evaluate", "--zero-shot", "-w", enrolled).err


def test_nobody_joins_with_other_task_files(fresh: Path) -> None:
    for client in (1, 2, 3):
        keys(Workspace(fresh), client=client)
    found = enroll(Workspace(fresh)).fingerprint
    (fresh / "tasks/more.yaml").write_text("task: more\n")
    with pytest.raises(Refused, match="tasks/ is not what the parties enrolled with"):
        join(Workspace(fresh), client=2, fingerprint=found)
    (fresh / "tasks/more.yaml").unlink()
    assert join(Workspace(fresh), client=2, fingerprint=found) == found


def test_a_roster_of_an_earlier_version_names_no_tasks_and_is_taken(fresh: Path) -> None:
    for client in (1, 2, 3):
        keys(Workspace(fresh), client=client)
    enroll(Workspace(fresh))
    vault = Party(Workspace(fresh), "server").keys
    older = json.loads((fresh / ROSTER).read_text())
    del older["tasks_sha256"]
    content = json.dumps(older).encode()
    (fresh / ROSTER).write_bytes(content)
    (fresh / f"{ROSTER}.sig").write_bytes(signatures.sign(content, "federation", vault.identity))
    edit(fresh / "tasks/colours.yaml", '"{{question}}"', '"Say red: {{question}}"')
    assert join(Workspace(fresh), client=2, fingerprint=roster.fingerprint(content)) == roster.fingerprint(content)
    said = [finding.text for finding in audit([fresh])]
    assert [text for text in said if "whether tasks/ is what people agreed on" in text]


def test_task_files_that_the_server_did_not_send_are_named_before_anybody_joins(
    enrolled: Path, fedcollm: Callable[..., Outcome]
) -> None:
    found = roster.fingerprint((enrolled / ROSTER).read_bytes())
    (vault_of(enrolled, "client-2") / "federation.json").unlink()
    join_it = ["join", "--client", 2, "--fingerprint", found, "-w", enrolled]
    task = (enrolled / "tasks/colours.yaml").read_text()
    (enrolled / "tasks/arc_easy.yaml").write_text(task.replace("task: colours", "task: arc_easy"))
    (enrolled / "tasks/tasks").mkdir()
    (enrolled / "tasks/tasks/colours.yaml").write_text(task)  # by `cp -r tasks tasks`
    refused, said = fedcollm(*join_it), fedcollm("status", "-w", enrolled).out
    assert refused.code == 5
    for told in (refused.err, said):
        assert "tasks/ also holds arc_easy.yaml, tasks/colours.yaml" in told.replace("\n", " ")
        assert "remove what the server did not send" in told
    assert "fedcollm join" not in said
    (enrolled / "tasks/arc_easy.yaml").unlink()
    shutil.rmtree(enrolled / "tasks/tasks")
    assert "fedcollm join --client 2" in fedcollm("status", "-w", enrolled).out
    assert fedcollm(*join_it).code == 0
