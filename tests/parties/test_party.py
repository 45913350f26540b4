"""A party, opened once by a command: its number and its roster, and how often they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from federations import vault_of
from stages.aggregate import aggregate
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.files import reading
from stages.parties import names
from stages.parties.party import Onlooker, Party, all_of
from stages.reveal import reveal
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([2], "client 2"),
        ([3, 1], "clients 1 and 3"),
        ([1, 2], "clients 1 and 2"),
        ([1, 2, 3], "clients 1 to 3"),
        ([*range(1, 8), 9, 20, 21], "clients 1 to 7, 9, 20 and 21"),
        (range(1, 40, 2), "20 clients, 1, 3, 5, 7, 9, 11, 13, 15 and so on"),
    ],
)
def test_many_clients_are_named_shortly(numbers: list[int], said: str) -> None:
    assert names.listed(numbers) == said


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file has been read since."""
    found: Counter[Path] = Counter()
    original = reading.read

    def read(path: Path, **named: object) -> bytes:
        found[path] += 1
        return original(path, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "read", read)
    return found


def of_roster(reads: Counter[Path], folder: Path, party: str) -> dict[str, int]:
    """How often a party's vault was looked for and its pinned roster read, and how often the roster in exchange/."""
    pointer = Workspace(folder).secrets_pointer(party)
    pinned = vault_of(folder, party) / "federation.json"
    return {"vault": reads[pointer], "pinned": reads[pinned], "exchange": reads[Workspace(folder).federation]}


def test_parties_of_a_workspace_are_the_server_and_its_clients_by_number(enrolled: Path) -> None:
    server, *clients = all_of(Workspace(enrolled))
    assert (server.name, server.is_server) == ("server", True)
    assert [(one.name, one.number, one.is_server) for one in clients] == [(f"client-{k}", k, False) for k in (1, 2, 3)]
    with pytest.raises(ValueError, match="server"):
        _ = server.number


def test_roster_and_keys_are_read_once_however_often_they_are_asked_for(enrolled: Path, reads: Counter[Path]) -> None:
    party, onlooker = Party.client(Workspace(enrolled), 2), Onlooker(Workspace(enrolled))
    for _ in range(3):
        assert party.members == onlooker.members
        assert party.keys is party.vault
    assert of_roster(reads, enrolled, "client-2") == {"vault": 1, "pinned": 1, "exchange": 1}


def test_in_a_plain_federation_a_party_has_neither_keys_nor_roster(finished: Path) -> None:
    party = Party.client(Workspace(finished), 2)
    assert (party.vault, party.pinned, party.members) == (None, None, None)
    with pytest.raises(NotReady, match="client-2 has no keys on this machine"):
        _ = party.keys


def as_client(step: Callable[..., object], folder: Path) -> None:
    for client in (1, 2, 3):
        step(Workspace(folder), client=client, round=1)


def test_a_secure_round_reads_roster_and_vault_once_a_command(enrolled: Path, reads: Counter[Path]) -> None:
    once = {"vault": 1, "pinned": 1, "exchange": 0}

    def took_once(party: str, step: Callable[[], object]) -> None:
        reads.clear()
        step()
        assert of_roster(reads, enrolled, party) == once

    took_once("server", lambda: broadcast(Workspace(enrolled), round=1))
    took_once("client-2", lambda: client_train(Workspace(enrolled), client=2, round=1))
    as_client(client_train, enrolled)
    with pytest.raises(NotReady, match="waits for 3 more reveals"):
        aggregate(Workspace(enrolled), round=1)
    took_once("client-2", lambda: reveal(Workspace(enrolled), client=2, round=1))
    as_client(reveal, enrolled)
    took_once("server", lambda: aggregate(Workspace(enrolled), round=1))
