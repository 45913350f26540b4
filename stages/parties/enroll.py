"""enroll, the server's first step where there are keys: the roster of all clients, which every party pins.

Reads exchange/keys/client-k.json of every client. Writes exchange/federation.json and its .sig.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from stages.files import locks, reading, writing
from stages.parties import encryption_keys, roster, roster_files, signatures
from stages.parties.enrolment import check_is_new
from stages.parties.names import SERVER, listed
from stages.parties.party import Party
from stages.parties.vault import Vault
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace import addressees, edits, task_files
from stages.workspace.commands import Command
from stages.workspace.names import signature_beside
from stages.workspace.paths import Workspace


@dataclass(frozen=True)
class Enrolled:
    """The roster, and the fingerprint that clients read to each other."""

    path: Path
    fingerprint: str


def enroll(workspace: Workspace, *, renew: bool = False, report: Report = ignore) -> Enrolled:
    """Make the roster, or publish it again. Raises NotReady naming the clients whose keys have not arrived.

    renew: a new federation with the keys that are there now. Raises Refused on a machine that is not the server's.
    """
    report(Event("stage", "enroll"))
    if not renew:
        check_is_new(Party.server(workspace))
    with locks.held(workspace.secrets_pointer(SERVER).with_suffix(".lock"), report=report):
        enrolled = _enroll(workspace, renew, report)
    addressees.tell(workspace, enrolled.path, Command("pack", roster=True), report, client=None)
    return enrolled


def _enroll(workspace: Workspace, renew: bool, report: Report) -> Enrolled:
    members = _members(workspace)
    Vault.erase_unfinished(workspace, SERVER)
    server = Party.server(workspace)
    vault = None if renew else server.vault
    if vault is None:
        vault = Vault.make(workspace, SERVER)
    content = vault.pinned
    if content is None:
        content = _roster(workspace, vault, members)
        edits.keep(workspace)
        with vault.alone(report):
            vault.pin(content)
    else:
        report(Event("note", "already enrolled"))
        before = server.members.federation.clients if server.members else []
        if others := [member.client for member in members if member not in before]:
            message = f"{listed(others)} sent other keys than those enrolled"
            mend = f"put the earlier files back; or, for a new federation: {Command('enroll', renew=True)}"
            raise Refused(message, where=workspace.public_keys(members[0].client).parent, mend=mend)
    path = workspace.federation
    # The signature first, since what it signs counts from its arrival on.
    writing.write(signature_beside(path), signatures.sign(content, "federation", vault.identity))
    writing.write(path, content)
    return Enrolled(path, roster.fingerprint(content))


def _members(workspace: Workspace) -> list[roster_files.Member]:
    """Every client of the agreement, with keys for this agreement, no two of them alike."""
    absent = [client for client in workspace.clients if not workspace.public_keys(client).exists()]
    if absent:
        message = f"the public keys of client {', '.join(map(str, absent))} are not there"
        mend = f"there: {Command('keys', client=absent[0])}; then carry exchange/keys here"
        raise NotReady(message, where=workspace.public_keys(absent[0]), mend=mend)
    members: list[roster_files.Member] = []
    for client in workspace.clients:
        path = workspace.public_keys(client)
        keys, content = roster_files.read_keys(path)
        if (keys.agreement_sha256, keys.client) != (workspace.agreement_sha256, client):
            message = f"client {client} made its keys under another agreement (sha256 of fedcollm.toml)"
            again = Command("keys", client=client, renew=True)
            mend = f"give all parties the same fedcollm.toml; then, there: {again}"
            raise Refused(message, where=path, mend=mend)
        roster.check_prekeys(workspace, keys, path)
        encryption_keys.check(workspace, keys, path)
        if any(member.ed25519 == keys.ed25519 for member in members):
            raise Damaged(f"client {client} has the key of another client", where=path, mend="each makes its own keys")
        members.append(roster_files.Member(client=client, ed25519=keys.ed25519, keys_sha256=reading.sha256(content)))
    return members


def _roster(workspace: Workspace, vault: Vault, members: list[roster_files.Member]) -> bytes:
    federation = roster_files.Federation(
        federation=workspace.agreement.federation.name,
        id=secrets.token_hex(16),
        agreement_sha256=workspace.agreement_sha256,
        tasks_sha256=task_files.own_digest(workspace.tasks),
        clients=members,
        server=roster_files.ServerKeys(
            ed25519=vault.identity.public_key().public_bytes_raw().hex(), x25519=roster.public_of(vault.box)
        ),
    )
    return reading.json_bytes(federation.model_dump())
