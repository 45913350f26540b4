"""Federations with keys, as tests set them up: on one machine, or on one for each party that share what is copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builders import AGREEMENT, Outcome, make_workspace
from stages.parties.enroll import enroll
from stages.parties.join import join
from stages.parties.keys import keys
from stages.workspace.paths import Workspace

CLIENTS = (1, 2, 3)
FROM_SERVER = ("broadcast", "close", "vocabulary-server", "server")
SECURE = 'mode = "secure"\n'
Fedcollm = Callable[..., Outcome]


def agreement(*, aggregation: str = SECURE, clients: int = 3, rounds: int = 2, method: str = "fedcollm") -> str:
    """fedcollm.toml of tests, with these lines under [aggregation]."""
    text = AGREEMENT.replace("clients = 3\nrounds = 2", f'clients = {clients}\nrounds = {rounds}\nmethod = "{method}"')
    assert method in text
    return f"{text}\n[aggregation]\n{aggregation}"


def with_keys(folder: Path, secrets: Path) -> Path:
    """Have a workspace keep its keys there, instead of in the user's data folder."""
    (folder / "machine.toml").write_text(f'secrets = "{secrets}"\n')
    return folder


def enrol(workspace: Workspace, clients: Sequence[int] = CLIENTS, *, renew: bool = False) -> str:
    """Keys for every party, a roster, and everybody in it. Returns the roster's fingerprint."""
    for client in clients:
        keys(workspace, client=client, renew=renew)
    found = enroll(workspace, renew=renew).fingerprint
    for client in clients:
        join(workspace, client=client, fingerprint=found)
    return found


def copied(source: tuple[Path, Path], place: Path) -> Path:
    """A workspace and its keys, in a place of one's own."""
    folder = shutil.copytree(source[0], place / "study", symlinks=True)
    return with_keys(folder, shutil.copytree(source[1], place / "keys"))


def secrets_of(folder: Path) -> Path:
    """Where a workspace of tests keeps its keys."""
    return Workspace(folder).secrets


def vault_of(folder: Path, party: str) -> Path:
    """The folder of a party's secrets."""
    name = json.loads((folder / "private" / party / "keys.json").read_text())["folder"]
    return secrets_of(folder) / str(name) / party


@dataclass
class Machines:
    """A server and its clients, each with a folder and keys of its own; only exchange/ is copied between them."""

    top: Path
    fedcollm: Fedcollm
    folders: dict[str, Path] = field(default_factory=dict)

    @staticmethod
    def set_up(top: Path, base_models: Path, fedcollm: Fedcollm, text: str, clients: Sequence[int]) -> Machines:
        """Machines on which nothing has been done."""
        whole, found = make_workspace(top / "whole", base_models), Machines(top, fedcollm)
        for client in clients[3:]:
            shutil.copytree(whole / "private/client-1", whole / f"private/client-{client}")
        for name in ("tasks", "data"):  # the server scores
            (top / "machine of server").mkdir(exist_ok=True)
            shutil.copytree(whole / name, top / "machine of server" / name)
        for party in ("server", *(f"client-{client}" for client in clients)):
            folder = top / f"machine of {party}"
            folder.mkdir(exist_ok=True)
            (folder / "fedcollm.toml").write_text(text)
            (folder / "models").symlink_to(base_models)
            shutil.copytree(whole / "private" / party, folder / "private" / party)
            found.folders[party] = with_keys(folder, top / f"keys of {party}")
        return found

    def give(self, party: str, *words: object, code: int = 0) -> Outcome:
        """A command on a party's machine, which ends with this code."""
        outcome = self.fedcollm(*words, "-w", self.folders[party])
        assert outcome.code == code, outcome.err
        return outcome

    def client(self, number: int, verb: str, *words: object, code: int = 0) -> Outcome:
        """A command of a client."""
        return self.give(f"client-{number}", verb, "--client", number, *words, code=code)

    def down(self, *clients: int) -> None:
        """What the server has made, copied to these clients."""
        for client in clients:
            self.carry("server", f"client-{client}", *FROM_SERVER, "keys", "federation.json")

    def up(self, *clients: int) -> None:
        """What these clients have made, copied to the server."""
        for client in clients:
            party = f"client-{client}"
            also = (f"vocabulary-{party}", f"adapter-{party}", f"reveal-{client}", f"{party}.json")
            self.carry(party, "server", party, *also)

    def carry(self, source: str, target: str, *names: str) -> None:
        """rsync -a --delete, of what in exchange/ begins with these names."""
        there = self.folders[source] / "exchange"
        copies = {
            path: self.folders[target] / "exchange" / path.relative_to(there)
            for path in there.rglob("*")
            if path.is_file() and any(part.startswith(names) for part in path.relative_to(there).parts)
        }
        for folder in {here.parent for path, here in copies.items() if path.name == "manifest.json"}:
            shutil.rmtree(folder, ignore_errors=True)
        for path, here in copies.items():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, here)

    def enrol(self, *clients: int) -> str:
        """Keys, a roster, and everybody in it, by commands and copies. Returns the fingerprint."""
        for client in clients:
            self.client(client, "keys")
        self.up(*clients)
        fingerprint = self.give("server", "enroll").out.strip()
        self.down(*clients)
        for client in clients:
            self.client(client, "join", "--fingerprint", fingerprint)
        return fingerprint
