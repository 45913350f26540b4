"""join, a client's second step where there are keys: pin the roster, after reading its fingerprint to another client.

Reads exchange/federation.json and exchange/keys. Writes nothing into the workspace.
"""

from __future__ import annotations

from stages.files import reading
from stages.parties import agreed, encryption_keys, roster, roster_files
from stages.parties.party import Party
from stages.parties.vault import Vault
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace import edits
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace, require


def join(workspace: Workspace, *, client: int, fingerprint: str | None, report: Report = ignore) -> str:
    """Trust the roster from now on. Returns its fingerprint.

    Raises UsageProblem naming the fingerprint to compare where none is given, Refused for another one, for a roster
    without this client's keys, and for a second roster.
    """
    workspace.check_client(client)
    report(Event("stage", f"join, client {client}"))
    party = Party.client(workspace, client)
    vault = party.keys
    path = workspace.federation
    require(path, "the roster has not arrived", f"on the server: {Command('enroll')}; then carry exchange/ here")
    federation, content = roster_files.read_federation(path)
    found = roster.fingerprint(content)
    if party.pinned == content:
        report(Event("note", "already joined"))
        return found
    if party.pinned is not None:
        message = f"this is another roster than the one joined: {found}, joined {roster.fingerprint(party.pinned)}"
        anew = Command("keys", client=client, renew=True)
        mend = f"ask the server which is right; for a new federation: {anew}"
        raise Refused(message, where=path, mend=mend)
    if fingerprint is None:
        message = f"the roster's fingerprint is {found}; read it to another client, by phone: is it the same there?"
        # The mend leaves out what is to be typed: a command to copy would compare the roster with itself.
        command = Command("join", client=client, fingerprint=...)
        mend = f"{command} with what that client reads out of the roster there"
        raise UsageProblem(message, where=path, mend=mend)
    if not roster.is_fingerprint(fingerprint, content):
        message = f"the roster here has the fingerprint {found}, not {fingerprint}"
        mend = "copy exchange/federation.json again; if it stays, the server gave you another roster than the others"
        raise Refused(message, where=path, mend=mend)
    _check_own(workspace, client, vault, federation)
    agreed.check_tasks(workspace, federation)
    _check_others(workspace, roster.Roster(federation, reading.sha256(content)))
    edits.keep(workspace)
    with vault.alone(report):
        vault.pin(content)
    return found


def _check_own(workspace: Workspace, client: int, vault: Vault, federation: roster_files.Federation) -> None:
    path = workspace.federation
    if federation.agreement_sha256 != workspace.agreement_sha256:
        mend = "give all parties the same fedcollm.toml, the very same bytes"
        raise Refused("the roster is of another agreement (sha256 of fedcollm.toml)", where=path, mend=mend)
    own = vault.identity.public_key().public_bytes_raw().hex()
    if [member.ed25519 for member in federation.clients if member.client == client] != [own]:
        message = f"the roster does not have the keys that client {client} made"
        keys, again = Command("keys", client=client), Command("enroll", renew=True)
        mend = f"{keys} writes them again; carry exchange/keys/client-{client}.json to the server; there: {again}"
        raise Refused(message, where=path, mend=mend)
    if [member.client for member in federation.clients] != list(workspace.clients):
        message = f"the roster has other clients than the agreement, which has 1 to {len(workspace.clients)}"
        raise Refused(message, where=path, mend="ask the server to enroll all clients")


def _check_others(workspace: Workspace, found: roster.Roster) -> None:
    """The keys of others that updates are masked or encrypted with are here, and are those that the roster names."""
    aggregation = workspace.agreement.aggregation
    for number in found.clients if aggregation.is_secure else filter(None, [aggregation.key_holder]):
        try:
            encryption_keys.check(workspace, found.keys_of(workspace, number), workspace.public_keys(number))
        except NotReady as problem:
            problem.mend = "copy all of exchange/keys from the server"
            raise
