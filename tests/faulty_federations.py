"""Federations with keys on disk, each party's secrets beside them, and what a party that cheats can sign."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from builders import edit, make_workspace, rows, sign, write_rows
from stages.aggregate import aggregate
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.parties import signatures
from stages.parties.enroll import enroll
from stages.parties.join import join
from stages.parties.keys import keys
from stages.parties.party import Party
from stages.parties.vault import Vault
from stages.reveal import reveal as give_reveal
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace

CLIENTS = (1, 2, 3, 4)
SECURE = '[aggregation]\nmode = "secure"\nmin_clients = 3\n'
ROUND, RESULT = "exchange/round-0001", "private/server/round-0001/aggregate"
AGGREGATE = ("aggregate", "--round", 1)
STATES = ("opened", "answered", "closed", "revealed")


def make_federation(folder: Path, base_models: Path, settings: str = SECURE) -> Path:
    """A workspace of four clients that train one step and average; all have keys and have joined."""
    make_workspace(folder, base_models)
    toml = folder / "fedcollm.toml"
    edit(toml, "clients = 3", 'clients = 4\nmethod = "fedavg"')
    edit(toml, "steps = 6", "steps = 1")
    edit(toml, "[distillation]", f"{settings}\n[distillation]")
    write_rows(folder / "private/client-4/train.jsonl", rows(12, start=48))
    workspace = Workspace(folder)
    for client in CLIENTS:
        keys(workspace, client=client)
    fingerprint = enroll(workspace).fingerprint
    for client in CLIENTS:
        join(workspace, client=client, fingerprint=fingerprint)
    return folder


def make_states(place: Path, base_models: Path, settings: str = SECURE) -> Path:
    """One round of such a federation as it stands after each step: STATES, a folder for each with study and secrets.

    Keys go to where XDG_DATA_HOME points, which has to be place / "secrets".
    """
    folder = make_federation(place / "study", base_models, settings)
    workspace = Workspace(folder)

    def keep(state: str) -> None:
        for part in ("study", "secrets"):
            shutil.copytree(place / part, place / state / part, symlinks=True)

    broadcast(workspace, round=1)
    keep("opened")
    for client in CLIENTS:
        client_train(workspace, client=client, round=1)
    keep("answered")
    if workspace.agreement.aggregation.is_secure:
        with contextlib.suppress(NotReady):
            aggregate(workspace, round=1)
        keep("closed")
        for client in CLIENTS:
            give_reveal(workspace, client=client, round=1)
        keep("revealed")
    return place


def state(states: Path, name: str, target: Path) -> Path:
    """A copy of one's own: target/study, and target/secrets, where a test has its keys."""
    for part in ("study", "secrets"):
        shutil.copytree(states / name / part, target / part, symlinks=True)
    return target / "study"


def secrets_of(folder: Path, party: str) -> Path:
    """Where the keys of a party lie."""
    vault = Vault.find(Workspace(folder), party)
    assert vault is not None
    return vault.root


def signed(folder: Path, party: str, **claims: object) -> None:
    """As builders.sign, with that party's true signature: what it could send if it ran other software than ours."""
    sign(folder, **claims)
    content = (folder / "manifest.json").read_bytes()
    identity = Party(Workspace.find(folder), party).keys.identity
    (folder / "manifest.json.sig").write_bytes(signatures.sign(content, json.loads(content)["stage"], identity))


def train(client: int, *words: object) -> tuple[object, ...]:
    return "client-train", "--client", client, "--round", 1, *words


def reveal(client: int) -> tuple[object, ...]:
    return "reveal", "--client", client, "--round", 1


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
