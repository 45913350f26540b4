"""Rounds that do not go as planned: absent clients, new attempts, late updates, half-copied folders, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import Outcome
from federations import SECURE, Machines, agreement
from stages.artefacts.reading import read_manifest
from stages.parties.party import Party
from stages.progress.status import status
from stages.workspace.paths import Workspace

FOUR = (1, 2, 3, 4)
ROUND = "exchange/round-0001"


@pytest.fixture
def four(tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]) -> Callable[..., Machines]:
    """Four clients and a server, all enrolled, and round 1 broadcast: four(aggregation lines)."""

    def set_up(aggregation: str = SECURE) -> Machines:
        text = agreement(aggregation=aggregation, clients=4)
        machines = Machines.set_up(tmp_path, base_models, fedcollm, text, FOUR)
        machines.enrol(*FOUR)
        machines.give("server", "broadcast", "--round", 1)
        machines.down(*FOUR)
        return machines

    return set_up


def train(machines: Machines, *clients: int, round: int = 1) -> None:
    for k in clients:
        machines.client(k, "client-train", "--round", round)
    machines.up(*clients)


def told(machines: Machines, party: str) -> tuple[str, str]:
    found = status(Workspace(machines.folders[party]))
    return str(found.next_command or ""), found.waiting_for


def conditions(machines: Machines, party: str) -> dict[str, str]:
    return {step.name: step.condition for step in status(Workspace(machines.folders[party])).rounds[0].steps}


def flat(folder: Path) -> np.ndarray:
    found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return np.concatenate([value.ravel().astype(np.float64) for _, value in sorted(found.items())])


def mean_is_of(machines: Machines, *clients: int) -> bool:
    """Whether what the server has unmasked is the mean of what these clients keep."""
    server = machines.folders["server"]
    before = flat(server / ROUND / "broadcast")
    own = [flat(machines.folders[f"client-{k}"] / f"private/client-{k}/round-0001/slm") - before for k in clients]
    found, expected = flat(server / "private/server/round-0001/aggregate") - before, np.mean(own, axis=0)
    return bool(np.sqrt(np.mean((found - expected) ** 2)) < 5e-6 * np.sqrt(np.mean(expected**2)))


def test_a_quorum_closes_without_an_absent_client_whose_late_update_stays_masked(
    four: Callable[..., Machines],
) -> None:
    machines = four(f"{SECURE}min_clients = 3\n")
    train(machines, 1, 2)
    awaited = "the update of 1 of clients 3 and 4, round 1 (exchange/round-0001/client-3, ...)"
    assert told(machines, "server") == ("", awaited)
    said = machines.give("server", "aggregate", "--round", 1, code=3).err
    assert "round 1 has 2 of the 3 updates it needs; absent: client 3, 4" in said
    assert not (machines.folders["server"] / ROUND / "close").exists()
    train(machines, 3)
    said = machines.give("server", "aggregate", "--round", 1, code=3).err
    assert "closing over 3 of 4 clients, for good; absent: client 4" in said
    assert "round 1 waits for 3 more reveals, of client 1, 2, 3" in said
    train(machines, 4)  # too late
    machines.down(*FOUR)
    assert told(machines, "client-4") == ("", "the broadcast of round 2, in exchange/")
    said = machines.client(4, "reveal", "--round", 1, code=5).err
    assert "the close of round 1 leaves client 4 out: there is nothing of it to unmask" in said
    assert "go on with the next round" in said
    for k in (3, 1):
        machines.client(k, "reveal", "--round", 1)
    machines.up(1, 3)
    assert told(machines, "server") == ("", "the reveal of client 2, round 1 (exchange/round-0001/reveal-2)")
    assert "waits for 1 more reveal, of client 2" in machines.give("server", "aggregate", "--round", 1, code=3).err
    machines.client(2, "reveal", "--round", 1)
    machines.up(2)
    said = machines.give("server", "aggregate", "--round", 1).err
    assert "client 4's update came after the close: it is left out, and stays masked" in said
    assert mean_is_of(machines, 1, 2, 3)
    assert not mean_is_of(machines, *FOUR)
    aggregate = read_manifest(machines.folders["server"] / "private/server/round-0001/aggregate")[0]
    assert aggregate.unmasking is not None
    assert (aggregate.unmasking.survivors, aggregate.unmasking.count) == ([1, 2, 3], 3)
    assert "late, not in the aggregate: client 4" in machines.give("server", "status").out
    assert told(machines, "server") == ("fedcollm co-distill --round 1", "")


def test_a_quorum_is_of_those_whom_the_round_was_opened_for(four: Callable[..., Machines]) -> None:
    """min_clients = 3 of four, and one of them left out: three are then all."""
    machines = four(f"{SECURE}min_clients = 3\n")
    machines.give("server", "broadcast", "--round", 1, "--overwrite", "--without", 2)
    machines.down(1, 3, 4)
    train(machines, 1, 3)
    assert told(machines, "server") == ("", "the update of client 4, round 1 (exchange/round-0001/client-4)")
    train(machines, 4)
    assert told(machines, "server") == ("fedcollm aggregate --round 1", "")
    machines.give("server", "next")
    assert conditions(machines, "server")["close"] == "done"


def test_a_vanished_client_is_left_out_of_a_new_attempt_that_the_others_follow(four: Callable[..., Machines]) -> None:
    machines = four()
    train(machines, 1, 2, 3)
    machines.give("server", "aggregate", "--round", 1, code=3)
    machines.give("server", "broadcast", "--round", 1, "--overwrite", "--without", 4)
    assert conditions(machines, "server")["client-1"] == "missing"
    lines = machines.give("server", "status").out
    assert "    client-1   missing  (is of an earlier attempt at the round)" in lines
    said = machines.give("server", "aggregate", "--round", 1, code=3).err
    assert "client 1's update is of an earlier attempt at this round" in said
    assert "round 1 has 0 of the 3 updates it needs; absent: client 1, 2, 3" in said
    machines.down(*FOUR)
    assert "round 1 was opened without client 4" in machines.client(4, "client-train", "--round", 1, code=5).err
    for k in (1, 2, 3):  # without --overwrite: the earlier attempt counts no more
        assert told(machines, f"client-{k}") == (f"fedcollm client-train --client {k} --round 1", "")
        machines.give(f"client-{k}", "next", "--client", k)
        manifest = read_manifest(machines.folders[f"client-{k}"] / ROUND / f"client-{k}")[0]
        assert manifest.attempt == 1
    machines.up(1, 2, 3)
    machines.give("server", "aggregate", "--round", 1, code=3)
    machines.down(1, 2, 3)
    for k in (1, 2, 3):
        machines.client(k, "reveal", "--round", 1)
    machines.up(1, 2, 3)
    machines.give("server", "aggregate", "--round", 1)
    assert mean_is_of(machines, 1, 2, 3)
    # The next round is open to all again, and who was left out takes part.
    machines.give("server", "co-distill", "--round", 1)
    machines.give("server", "broadcast", "--round", 2)
    machines.down(*FOUR)
    train(machines, *FOUR, round=2)
    assert "waits for 3 more reveals" in machines.give("server", "aggregate", "--round", 2, code=3).err


def test_cron_closes_a_new_attempt_over_the_close_of_the_one_before(four: Callable[..., Machines]) -> None:
    machines = four()
    train(machines, *FOUR)
    assert machines.give("server", "next").out == "fedcollm aggregate --round 1\n"
    first = read_manifest(machines.folders["server"] / ROUND / "close")[1]
    machines.give("server", "broadcast", "--round", 1, "--overwrite")
    assert conditions(machines, "server")["close"] == "stale"
    said = machines.give("server", "next", code=3).err
    assert "waiting for the updates of clients 1 to 4, round 1 (exchange/round-0001/client-1, ...)" in said
    machines.down(*FOUR)
    assert told(machines, "client-2") == ("fedcollm client-train --client 2 --round 1", "")
    train(machines, *FOUR)
    # The old close has been copied to client 2 and is not the round's.
    assert told(machines, "client-2") == ("", "the close of round 1, in exchange/: made from another broadcast")
    assert "is of another opening" in machines.client(2, "reveal", "--round", 1, code=5).err
    assert machines.give("server", "next").out == "fedcollm aggregate --round 1\n"
    assert read_manifest(machines.folders["server"] / ROUND / "close")[1] != first


def test_after_a_reveal_a_client_takes_no_new_attempt_and_reveals_no_second_time(four: Callable[..., Machines]) -> None:
    machines = four()
    train(machines, *FOUR)
    machines.give("server", "aggregate", "--round", 1, code=3)
    machines.down(*FOUR)
    first = machines.client(2, "reveal", "--round", 1)
    own = machines.folders["client-2"] / ROUND / "reveal-2"
    sent = {path.name: path.read_bytes() for path in own.iterdir()}
    shutil.rmtree(own)
    assert machines.client(2, "reveal", "--round", 1).out == first.out == f"{ROUND}/reveal-2\n"
    assert {path.name: path.read_bytes() for path in own.iterdir()} == sent  # sealed once, sent again
    machines.up(2)
    machines.give("server", "broadcast", "--round", 1, "--overwrite")
    machines.down(*FOUR)
    said = machines.client(2, "client-train", "--round", 1, code=5).err
    assert "this client has revealed for round 1 already; it takes no further attempt at it" in said
    assert "fedcollm broadcast --round 2" in said
    train(machines, 1, 3, 4)  # who has not revealed follows


def test_reveal_says_what_it_waits_for_and_where_it_has_no_place(
    four: Callable[..., Machines], finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    machines = four()
    said = machines.client(2, "reveal", "--round", 1, code=3).err
    assert "round 1 is not closed yet" in said
    assert "mend  on the server: fedcollm aggregate --round 1; then carry exchange/round-0001/close here" in said
    assert "the broadcast of round 2 is not there" in machines.client(2, "reveal", "--round", 2, code=3).err
    outcome = fedcollm("reveal", "--client", 2, "--round", 1, "-w", finished)
    assert outcome.code == 2
    assert "there is nothing to reveal: updates are sent readable" in outcome.err
    assert "leave it out" in outcome.err
    train(machines, *FOUR)
    machines.give("server", "aggregate", "--round", 1, code=3)
    machines.down(2)
    # On a machine with the keys, and without what it masked: such as one restored from an old copy.
    vault = Party(Workspace(machines.folders["client-2"]), "client-2").keys
    kept = vault.kept("round-0001") or {}
    vault.keep("round-0001", kept | {"own_shares": None})
    assert "client 2 has masked no update of this round here" in machines.client(2, "reveal", "--round", 1, code=5).err
    vault.keep("round-0001", kept | {"y_sha256": "0" * 64})
    said = machines.client(2, "reveal", "--round", 1, code=5).err
    assert "exchange/round-0001/client-2 is client-2's own, of attempt 0, and its keys know nothing of it" in said
    assert "mend  put the newest keys back" in said
    assert (vault.kept("round-0001") or {})["reveal"] is None
    vault.keep("round-0001", kept)
    machines.client(2, "reveal", "--round", 1)


# --- what is on its way, and what is damaged


@pytest.mark.parametrize("absent", ["adapter_model.safetensors", "manifest.json", "manifest.json.sig"])
def test_a_half_copied_broadcast_is_missing_with_the_reason_and_then_arrives(
    absent: str, four: Callable[..., Machines]
) -> None:
    machines = four()
    folder = machines.folders["client-2"] / ROUND / "broadcast"
    content = (folder / absent).read_bytes()
    (folder / absent).unlink()
    found = status(Workspace(machines.folders["client-2"])).rounds[0].steps[0]
    assert (found.name, found.condition) == ("broadcast", "missing")
    assert absent in found.reason
    assert str(found.command) == "fedcollm broadcast --round 1"
    assert f"  broadcast  missing  ({found.reason})" in machines.give("client-2", "status").out
    said = machines.give("client-2", "next", code=3).err
    assert f"waiting for the broadcast of round 1, in exchange/: {found.reason}" in said
    (folder / absent).write_bytes(content)
    assert told(machines, "client-2") == ("fedcollm client-train --client 2 --round 1", "")


def test_an_update_that_is_still_arriving_is_waited_for_and_a_longer_one_is_damaged(
    four: Callable[..., Machines],
) -> None:
    machines = four()
    train(machines, *FOUR)
    path = machines.folders["server"] / ROUND / "client-2/masked.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    step = next(one for one in status(Workspace(machines.folders["server"])).rounds[0].steps if one.name == "client-2")
    assert step.condition == "missing"
    assert step.reason == f"masked.safetensors has 100 bytes of {len(content)}: still arriving, or cut short"
    assert told(machines, "server") == ("", "the update of client 2, round 1 (exchange/round-0001/client-2)")
    said = machines.give("server", "aggregate", "--round", 1, code=3).err
    assert "client 2's update has not arrived whole: masked.safetensors has 100 bytes" in said
    path.write_bytes(content + b"x")
    assert conditions(machines, "server")["client-2"] == "damaged"
    assert told(machines, "server")[1].startswith("a sound update: client-2 of round 1 is damaged")
    path.write_bytes(content)
    assert told(machines, "server") == ("fedcollm aggregate --round 1", "")


def test_cron_never_replaces_a_damaged_update_and_a_person_can(four: Callable[..., Machines]) -> None:
    machines = four()
    machines.client(2, "client-train", "--round", 1)
    path = machines.folders["client-2"] / ROUND / "client-2/shares.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    command = "fedcollm client-train --client 2 --round 1 --overwrite"
    assert told(machines, "client-2") == (command, "")
    damaged = path.read_bytes()
    said = machines.give("client-2", "next", code=3).err
    assert f"the next step replaces what is there: {command}" in said
    assert "then give that command" in said
    assert path.read_bytes() == damaged
    machines.give("client-2", *command.split()[1:])
    assert told(machines, "client-2") == ("", "the close of round 1, in exchange/")


def test_two_parties_at_once_are_no_next_step(four: Callable[..., Machines]) -> None:
    machines = four()
    said = machines.give("server", "next", "--client", 2, "--server", code=2).err
    assert "--client and --server are two parties" in said
    assert "there is no client 9" in machines.give("server", "next", "--client", 9, code=2).err
    assert json.loads(machines.give("server", "next", "--server", "--json", code=3).out)["error"]["code"] == 3


def test_status_as_json_says_whose_each_step_is(four: Callable[..., Machines]) -> None:
    machines = four()
    found = json.loads(machines.give("client-2", "status", "--json").out)
    assert found.keys() == {
        "rounds",
        "next_command",
        "waiting_for",
        "unfit",
        "changed",
        "not_covered",
        "stale",
        "refused",
        "unfinished",
        "seconds_left",
        "scores",
        "edited",
    }
    first = found["rounds"][0]
    assert first.keys() == {"number", "steps", "late", "unheard"}
    fields = {"name", "condition", "reason", "command", "here", "sha256", "party", "changed"}
    assert all(step.keys() == fields for step in first["steps"])
    clients = [f"client-{k}" for k in FOUR]
    assert [(step["name"], step["party"], step["here"]) for step in first["steps"]] == [
        ("broadcast", "server", False),
        *((party, party, party == "client-2") for party in clients),
        ("close", "server", False),
        *((f"reveal-{k}", f"client-{k}", k == 2) for k in FOUR),
        *((name, "server", False) for name in ("aggregate", "llm", "slm")),
    ]
