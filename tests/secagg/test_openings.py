"""openings: one broadcast for a round, a later attempt at most, none after a reveal; keys that no round had before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from builders import edit
from federations import vault_of
from stages.artefacts.draft import Draft
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact, inbox, read_artefact
from stages.audit.audit import audit
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.parties import signatures
from stages.parties.memory import Kept, recall, remember
from stages.parties.names import SERVER
from stages.parties.party import Party
from stages.parties.vault import LARGEST_JUMP
from stages.reveal import reveal
from stages.runtime.errors import Damaged, NotReady, Problem, Refused, UsageProblem
from stages.secagg import accepting, one_round, openings
from stages.secagg.accepting import accept
from stages.workspace.paths import Workspace

PLACE = "exchange/round-0001/broadcast"


@pytest.fixture
def opened(enrolled: Path) -> Path:
    """A workspace whose first round is open."""
    broadcast(Workspace(enrolled), round=1)
    return enrolled


def theta_of(folder: Path, round: int = 1) -> Artefact:
    return read_artefact(folder / f"exchange/round-{round:04d}/broadcast")


def kept(folder: Path, party: str = "client-2", round: int = 1) -> Kept | None:
    return recall(Party(Workspace(folder), party).keys, round)


def reopened(folder: Path, change: Callable[[dict[str, Any]], object]) -> Artefact:
    """The broadcast with another manifest that the server has signed, as a server that lies would show it."""
    place = folder / PLACE
    manifest = json.loads((place / "manifest.json").read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    (place / "manifest.json").write_bytes(content)
    identity = Party(Workspace(folder), SERVER).keys.identity
    (place / "manifest.json.sig").write_bytes(signatures.sign(content, "broadcast", identity))
    return theta_of(folder)


def refusal(folder: Path, theta: Artefact, client: int = 2) -> Problem:
    """How accepting it ends; what the client remembers stays as it was."""
    before = kept(folder, f"client-{client}")
    with pytest.raises((Refused, Damaged)) as caught:
        accept(Party.client(Workspace(folder), client), theta)
    assert kept(folder, f"client-{client}") == before
    assert caught.value.mend
    assert caught.value.where
    return caught.value


# --- at the server


def test_a_round_is_opened_for_all_with_the_first_keys_that_no_round_had(opened: Path) -> None:
    opening = theta_of(opened).manifest.opening
    assert opening is not None
    roster = (opened / "exchange/federation.json").read_bytes()
    assert (opening.slot, opening.clients, opening.threshold) == (0, [1, 2, 3], 3)  # floor(2 * 3 / 3) + 1
    assert opening.previous_sha256 == signatures.reading.sha256(roster)
    keys = [json.loads((opened / f"exchange/keys/client-{k}.json").read_text())["prekeys"][0] for k in (1, 2, 3)]
    assert opening.prekeys == keys
    assert kept(opened, SERVER) == Kept(attempt=0, broadcast_sha256=theta_of(opened).sha256, slot=0)


def test_a_broadcast_given_again_opens_nothing_again(opened: Path) -> None:
    before = theta_of(opened)
    broadcast(Workspace(opened), round=1)
    assert theta_of(opened) == before


def test_every_new_attempt_has_new_keys_until_they_are_used_up(opened: Path) -> None:
    """Two rounds: each client made 2 * 2 + 8 keys."""
    for attempt in range(1, 12):
        broadcast(Workspace(opened), round=1, overwrite=True)
        manifest = theta_of(opened).manifest
        assert manifest.opening is not None
        assert (manifest.attempt, manifest.opening.slot) == (attempt, attempt)
    with pytest.raises(Refused, match="one-time keys are used up: rounds were opened 12 times") as caught:
        broadcast(Workspace(opened), round=1, overwrite=True)
    assert "keys --renew" in (caught.value.mend or "")
    assert theta_of(opened).manifest.attempt == 11


@pytest.mark.parametrize(("without", "message"), [([9], "there is no client 9"), ([2], "only 2 clients would be left")])
def test_a_round_is_opened_for_three_clients_or_more(without: list[int], message: str, enrolled: Path) -> None:
    with pytest.raises(UsageProblem, match=message) as caught:
        broadcast(Workspace(enrolled), round=1, without=without)
    assert caught.value.mend == "leave at least 3 of clients 1, 2, 3"
    assert not (enrolled / PLACE).exists()


def test_in_plain_mode_nobody_is_left_out(workspace_folder: Path) -> None:
    with pytest.raises(UsageProblem, match="only a round of secure aggregation") as caught:
        broadcast(Workspace(workspace_folder), round=1, without=[2])
    assert "min_clients" in (caught.value.mend or "")
    assert caught.value.where == workspace_folder / "fedcollm.toml"


def test_a_server_that_was_stopped_before_it_remembered_goes_on_with_the_same_keys(opened: Path) -> None:
    before = theta_of(opened)
    (vault_of(opened, SERVER) / "round-0001.json").unlink()
    broadcast(Workspace(opened), round=1)
    assert theta_of(opened) == before
    assert kept(opened, SERVER) is not None


# --- at a client


def test_a_client_takes_a_broadcast_and_takes_it_again(opened: Path) -> None:
    for _ in range(2):
        accept(Party.client(Workspace(opened), 2), theta_of(opened))
    assert kept(opened) == Kept(attempt=0, broadcast_sha256=theta_of(opened).sha256, slot=0)
    assert kept(opened, "client-1") is None


def test_a_second_broadcast_of_a_round_is_refused_with_both_digests(opened: Path) -> None:
    first = theta_of(opened)
    accept(Party.client(Workspace(opened), 2), first)
    second = reopened(opened, lambda manifest: manifest["metrics"].update(x=1.0))
    problem = refusal(opened, second)
    assert problem.message.startswith("this is a second broadcast of round 1")
    assert first.sha256 in problem.message
    assert second.sha256 in problem.message
    assert problem.exit_code == 5


def test_a_later_attempt_is_followed_and_an_earlier_one_never_again(opened: Path) -> None:
    first = theta_of(opened)
    accept(Party.client(Workspace(opened), 2), first)
    broadcast(Workspace(opened), round=1, overwrite=True)
    accept(Party.client(Workspace(opened), 2), theta_of(opened))
    found = kept(opened)
    assert found is not None
    assert (found.attempt, found.slot) == (1, 1)
    problem = refusal(opened, first)
    assert problem.message == "this is attempt 0 at round 1, which is at attempt 1 here"


def test_after_a_reveal_no_further_attempt_is_taken(opened: Path) -> None:
    accept(Party.client(Workspace(opened), 2), theta_of(opened))
    vault, before = Party(Workspace(opened), "client-2").keys, kept(opened)
    assert before is not None
    remember(vault, 1, before.model_copy(update={"close_sha256": "0" * 64}))
    broadcast(Workspace(opened), round=1, overwrite=True)
    problem = refusal(opened, theta_of(opened))
    assert problem.message == "this client has revealed for round 1 already; it takes no further attempt at it"
    assert problem.mend == "on the server, go on with the next round: fedcollm broadcast --round 2"


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no opening": (lambda found: found.update(opening=None), "opens no round of secure aggregation"),
    "another roster": (
        lambda found: found["opening"].update(previous_sha256="0" * 64),
        "round 1 follows another broadcast of round 0",
    ),
    "a stranger": (lambda found: found["opening"].update(clients=[1, 2, 9]), r"opened for \[1, 2, 9\]"),
    "twice the same": (lambda found: found["opening"].update(clients=[1, 2, 2]), r"opened for \[1, 2, 2\]"),
    "another order": (lambda found: found["opening"].update(clients=[2, 1, 3]), r"opened for \[2, 1, 3\]"),
    "too few": (lambda found: found["opening"].update(clients=[1, 2]), r"opened for \[1, 2\]"),
    "a higher threshold": (lambda found: found["opening"].update(threshold=4), "opened by 4 reveals, not by 3"),
    "a key of its own": (
        lambda found: found["opening"]["prekeys"].__setitem__(0, "0" * 64),
        "names other keys than the clients' own for slot 0",
    ),
    "one key fewer": (
        lambda found: found["opening"]["prekeys"].pop(),
        "names other keys than the clients' own for slot 0",
    ),
    "keys of another slot": (
        lambda found: found["opening"].update(slot=1),
        "names other keys than the clients' own for slot 1",
    ),
    "keys beyond all": (
        lambda found: found["opening"].update(slot=99, prekeys=[]),
        "opened with key 99; client-2 is at key 0",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_a_round_is_refused(lie: str, opened: Path) -> None:
    change, message = LIES[lie]
    theta = reopened(opened, change)
    import re

    assert re.search(message, refusal(opened, theta).message)


def test_keys_of_a_round_before_are_refused(opened: Path) -> None:
    accept(Party.client(Workspace(opened), 2), theta_of(opened))
    vault = Party(Workspace(opened), "client-2").keys
    remember(vault, 2, Kept(attempt=0, broadcast_sha256="0" * 64, slot=4))
    later = reopened(opened, lambda manifest: manifest.update(attempt=1))
    assert refusal(opened, later).message == "round 1 is opened with keys 0, and keys 4 were used before"


def test_a_jump_that_would_burn_keys_is_refused_before_anything_is_trained(opened: Path) -> None:
    for _ in range(9):
        broadcast(Workspace(opened), round=1, overwrite=True)
    problem = refusal(opened, theta_of(opened))
    assert problem.message == "this round was opened with key 9; client-2 is at key 0"


def test_a_client_may_be_absent_for_many_rounds_and_a_far_jump_stays_refused(opened: Path) -> None:
    """It took round 1 with keys 0 and was away: an honest server opened each round since with the next keys."""
    vault = Party(Workspace(opened), "client-2").keys
    assert accepting._farthest(vault, 1) == LARGEST_JUMP
    remember(vault, 1, Kept(attempt=0, broadcast_sha256="0" * 64, slot=0))
    assert accepting._farthest(vault, 11) == 9 + LARGEST_JUMP
    vault.check_slot(10, farthest=accepting._farthest(vault, 11))
    remember(vault, 11, Kept(attempt=0, broadcast_sha256="0" * 64, slot=10))  # taken, and nothing masked with it
    assert accepting._farthest(vault, 12) == 10 + LARGEST_JUMP
    with pytest.raises(Refused, match="opened with key 19; client-2 is at key 0"):
        vault.check_slot(19, farthest=accepting._farthest(vault, 12))
    assert vault.advance(18, farthest=accepting._farthest(vault, 12))
    assert (vault.kept("ratchet") or {})["slot"] == 18


def test_a_jump_past_missed_rounds_is_taken_by_accept_and_not_beyond(opened: Path) -> None:
    vault = Party(Workspace(opened), "client-2").keys
    remember(vault, 1, Kept(attempt=0, broadcast_sha256="0" * 64, slot=2))
    for _ in range(10):
        broadcast(Workspace(opened), round=1, overwrite=True)
    accept(Party.client(Workspace(opened), 2), theta_of(opened))  # keys 10: eight after those that it took before
    found = kept(opened)
    assert found is not None
    assert found.slot == 10


def test_a_broadcast_is_taken_by_one_process_at_a_time(opened: Path) -> None:
    with ThreadPoolExecutor() as pool:
        with Party(Workspace(opened), "client-2").keys.alone():
            taken = pool.submit(accept, Party.client(Workspace(opened), 2), theta_of(opened))
            with pytest.raises(TimeoutError):
                taken.result(timeout=0.5)
            assert kept(opened) is None
        taken.result(timeout=60)
    assert kept(opened) is not None


@pytest.mark.parametrize("harm", [{"own_shares": "zz"}, {"reveal": "0"}, {"slot": -1}])
def test_a_memory_that_is_damaged_is_named(harm: dict[str, object], opened: Path) -> None:
    accept(Party.client(Workspace(opened), 2), theta_of(opened))
    path = vault_of(opened, "client-2") / "round-0001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | harm))
    with pytest.raises(Damaged, match=r"the secret round-0001.json of client-2 is damaged"):
        accept(Party.client(Workspace(opened), 2), theta_of(opened))


def test_without_anybodys_keys_a_client_waits(opened: Path) -> None:
    (opened / "exchange/keys/client-3.json").unlink()
    with pytest.raises(NotReady, match=r"client-3.json is not there"):
        accept(Party.client(Workspace(opened), 2), theta_of(opened))


def test_a_key_that_is_not_the_rosters_is_refused_before_it_signs(opened: Path) -> None:
    identity = vault_of(opened, "client-2") / "identity.pem"
    identity.write_bytes((vault_of(opened, "client-1") / "identity.pem").read_bytes())
    with pytest.raises(Damaged, match=r"identity.pem of client-2 is not the one that it enrolled with"):
        accept(Party.client(Workspace(opened), 2), theta_of(opened))


def test_a_round_that_cannot_be_opened_leaves_nothing_behind(enrolled: Path) -> None:
    edit(enrolled / "fedcollm.toml", "steps = 6", "steps = 7")
    with pytest.raises(Refused, match="has changed since the parties enrolled"):
        broadcast(Workspace(enrolled), round=1)
    assert not Workspace(enrolled).log("broadcast", 1).parent.exists()


def test_a_servers_box_that_is_not_the_rosters_is_refused(enrolled: Path) -> None:
    box = vault_of(enrolled, SERVER) / "box.pem"
    box.write_bytes((vault_of(enrolled, "client-1") / "box.pem").read_bytes())
    with pytest.raises(Damaged, match=r"box.pem of server is not the one that it enrolled with"):
        broadcast(Workspace(enrolled), round=1)


def test_a_seed_that_is_not_the_one_enrolled_is_refused_before_anything_is_trained(opened: Path) -> None:
    Party(Workspace(opened), "client-2").keys.keep("ratchet", {"slot": 0, "seed": "11" * 32})
    assert "ratchet.json of client-2 is not the one" in refusal(opened, theta_of(opened)).message


# --- left out


def four(folder: Path, top: Path) -> Path:
    """The same with a fourth client, in which all have joined anew."""
    from federations import enrol

    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text().replace("clients = 3", "clients = 4"))
    shutil.rmtree(folder / "exchange")
    shutil.rmtree(top / "keys")
    for path in (folder / "private").rglob("keys.json"):
        path.unlink()
    shutil.copytree(folder / "private/client-1", folder / "private/client-4")
    enrol(Workspace(folder), (1, 2, 3, 4))
    return folder


def test_a_round_for_fewer_than_was_agreed_is_refused_and_what_it_is_for_is_said(
    enrolled: Path, tmp_path: Path
) -> None:
    """min_clients = 4 of four: three would be enough for t, and are not what the parties agreed on."""
    toml = enrolled / "fedcollm.toml"
    toml.write_text(toml.read_text().replace('mode = "secure"', 'mode = "secure"\nmin_clients = 4'))
    toml.write_text(toml.read_text().replace("clients = 3", "clients = 4", 1))
    folder = four(enrolled, tmp_path)
    with pytest.raises(UsageProblem, match="only 3 clients would be left"):
        broadcast(Workspace(folder), round=1, without=[4])
    broadcast(Workspace(folder), round=1)
    said: list[str] = []
    accept(Party.client(Workspace(folder), 2), theta_of(folder), lambda event: said.append(event.text))
    assert said == ["round 1 is opened for 4 of 4 clients; its sum is of 4 or more"]

    def few(manifest: dict[str, Any]) -> None:
        keys = manifest["opening"]["prekeys"]
        manifest["opening"].update(clients=[1, 2, 3], prekeys=keys[:3], threshold=3)

    problem = refusal(folder, reopened(folder, few), client=3)
    assert "round 1 is opened for [1, 2, 3], 3 of 4 clients; by the agreement it takes 4 or more" in problem.message
    assert problem.exit_code == 5


def test_a_client_that_is_left_out_is_told_so_and_the_choice_stays(enrolled: Path, tmp_path: Path) -> None:
    folder = four(enrolled, tmp_path)
    broadcast(Workspace(folder), round=1, without=[2])
    opening = theta_of(folder).manifest.opening
    assert opening is not None
    assert (opening.clients, opening.threshold) == ([1, 3, 4], 3)
    problem = refusal(folder, theta_of(folder))
    assert problem.message == "round 1 was opened without client 2"
    accept(Party.client(Workspace(folder), 4), theta_of(folder))
    before = theta_of(folder)
    broadcast(Workspace(folder), round=1)  # given again, without saying it again
    assert theta_of(folder) == before
    with pytest.raises(Refused, match="the clients, or the keys, that the round is opened for") as caught:
        broadcast(Workspace(folder), round=1, without=[3])
    assert "--overwrite" in (caught.value.mend or "")
    broadcast(Workspace(folder), round=1, overwrite=True)
    again = theta_of(folder).manifest.opening
    assert again is not None
    assert again.clients == [1, 2, 3, 4]


def test_who_was_left_out_of_a_later_attempt_takes_part_in_the_next_round(enrolled: Path, tmp_path: Path) -> None:
    """It had taken the first attempt; the round was opened again without it, and the next follows that one."""
    folder = four(enrolled, tmp_path)
    broadcast(Workspace(folder), round=1)
    first = shutil.copytree(folder / PLACE, tmp_path / "round-0001/broadcast")
    accept(Party.client(Workspace(folder), 2), theta_of(folder))
    broadcast(Workspace(folder), round=1, without=[2], overwrite=True)
    second = shutil.copytree(folder / PLACE, tmp_path / "second")
    opening, slot, _ = openings.open_round(Party.server(Workspace(folder)), 2, again=False, without=None)[1], 2, None
    assert opening is not None
    assert opening.slot == slot
    assert opening.previous_sha256 == theta_of(folder).sha256
    following = reopened(folder, lambda manifest: manifest.update(round=2, attempt=0, opening=opening.model_dump()))
    shutil.rmtree(folder / PLACE)
    shutil.copytree(first, folder / PLACE)
    problem = refusal_of_round_2(folder, following)
    assert problem.message.startswith("round 2 follows another broadcast of round 1 than this client's")
    assert "copy exchange/round-0001/broadcast here again" in (problem.mend or "")
    shutil.rmtree(folder / PLACE)
    shutil.copytree(second, folder / PLACE)
    accept(Party.client(Workspace(folder), 2), following)
    found = kept(folder, round=2)
    assert found is not None
    assert found.broadcast_sha256 == following.sha256


def refusal_of_round_2(folder: Path, theta: Artefact) -> Problem:
    with pytest.raises(Refused) as caught:
        accept(Party.client(Workspace(folder), 2), theta)
    return caught.value


def test_a_close_over_fewer_than_was_agreed_is_not_revealed_for_and_fails_the_audit(
    enrolled: Path, tmp_path: Path
) -> None:
    """Three of four are enough to unmask; without min_clients the parties agreed on all."""
    folder = four(enrolled, tmp_path)
    workspace = Workspace(folder)
    theta = broadcast(workspace, round=1)
    sent = {f"client-{k}": client_train(workspace, client=k, round=1) for k in (1, 2, 3)}
    publish(
        workspace.close(1),
        {inbox(k): b"-" for k in (1, 2, 3)},
        Draft(
            stage="close",
            round=1,
            parents={"broadcast": theta_of(folder).sha256}
            | {party: read_artefact(workspace.client_update(1, int(party[-1])), only=[]).sha256 for party in sent},
            base=theta.base,
            parameters=0,
            transcript=one_round.transcript_of(theta_of(folder)),
            closing={party: one.masking.y_sha256 for party, one in sent.items() if one.masking},
        ),
        by=Party.server(workspace),
    )
    with pytest.raises(
        Refused, match=r"closed over 3 of 4 clients; by the agreement its sum is of 4 or more"
    ) as caught:
        reveal(workspace, client=2, round=1)
    assert "reveal nothing" in (caught.value.mend or "")
    assert not workspace.reveal(1, 2).exists()
    said = [one.text for one in audit([folder]) if (one.id, one.level) == ("A9", "FAIL")]
    assert said == ["exchange/round-0001/close: closes over 3 clients; expected 4 or more"]


def test_a_broadcast_beyond_the_agreed_rounds_is_taken_by_nobody(opened: Path) -> None:
    with pytest.raises(UsageProblem, match="there is no round 3: the agreement has rounds 1 to 2"):
        client_train(Workspace(opened), client=2, round=3)
    theta = reopened(opened, lambda manifest: manifest.update(round=3))
    with pytest.raises(Refused, match="is of another round: 3, here it is 1"):
        client_train(Workspace(opened), client=2, round=1)
    assert kept(opened) is None
    assert theta.manifest.round == 3
