"""keys, a client's first step: its secret keys, outside the workspace, and the public ones, for the server.

Writes exchange/keys/client-k.json and its .sig; the secrets go to a folder of the user's own (see parties/vault).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.files import locks, reading, writing
from stages.parties import encryption_keys, roster, roster_files, signatures
from stages.parties.enrolment import check_is_new
from stages.parties.names import client as party_of
from stages.parties.party import Party
from stages.parties.vault import NOT_ENROLLED, Vault
from stages.runtime.errors import Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace import addressees, edits
from stages.workspace.commands import Command
from stages.workspace.names import signature_beside
from stages.workspace.paths import Workspace

PUBLIC = "public"
"""The vault's own copy of what was published, to publish it again."""


@dataclass(frozen=True)
class Made:
    """What a client sends, and the short name of its signing key, which the roster will show."""

    path: Path
    key_id: str


def keys(workspace: Workspace, *, client: int, renew: bool = False, report: Report = ignore) -> Made:
    """Make a client's keys, or publish those it has again.

    renew: for a new federation; the old keys stay where they are and are used no more. Raises Refused if there are keys
    for another agreement, and on a machine that is not this client's.
    """
    workspace.check_client(client)
    report(Event("stage", f"keys, client {client}"))
    if not renew:
        check_is_new(Party.client(workspace, client))
    with locks.held(workspace.secrets_pointer(party_of(client)).with_suffix(".lock"), report=report):
        made = _keys(workspace, client, renew, report)
    addressees.tell(workspace, made.path, Command("pack", keys=True, client=client), report, client=client)
    return made


def _keys(workspace: Workspace, client: int, renew: bool, report: Report) -> Made:
    party, path = party_of(client), workspace.public_keys(client)
    Vault.erase_unfinished(workspace, party)
    vault = None if renew else Party.client(workspace, client).vault
    if vault is None:
        vault = Vault.make(workspace, party)
    else:
        report(Event("note", "already made"))
    with vault.alone(report):
        public = vault.kept(PUBLIC)
        if public is None:  # stopped before it was kept: nobody has seen these keys
            public = _public(workspace, client, vault)
    try:
        roster_files.PublicKeys.model_validate(public)
    except ValidationError as error:
        raise vault.damaged(f"{PUBLIC}.json") from error
    if public["agreement_sha256"] != workspace.agreement_sha256:
        anew = Command("keys", client=client, renew=True)
        mend = f"undo the edit of fedcollm.toml; or, for a new federation: {anew}"
        raise Refused(f"client {client} has keys for another agreement", where=path, mend=mend)
    if public["ed25519"] != vault.identity.public_key().public_bytes_raw().hex():
        raise vault.damaged("identity.pem", NOT_ENROLLED)
    edits.keep(workspace)
    content = reading.json_bytes(public)
    # The signature first, since what it signs counts from its arrival on.
    writing.write(signature_beside(path), signatures.sign(content, "keys", vault.identity))
    writing.write(path, content)
    return Made(path, signatures.key_id(bytes.fromhex(public["ed25519"])))


def _public(workspace: Workspace, client: int, vault: Vault) -> dict[str, Any]:
    """The client's public keys, kept in its vault."""
    opens_sums = client == workspace.agreement.aggregation.key_holder
    public = roster_files.PublicKeys(
        federation=workspace.agreement.federation.name,
        agreement_sha256=workspace.agreement_sha256,
        client=client,
        ed25519=vault.identity.public_key().public_bytes_raw().hex(),
        prekeys=vault.prekeys(roster.slots(workspace)),
        ckks=encryption_keys.make(vault) if opens_sums else None,
    ).model_dump(exclude_none=True)
    vault.keep(PUBLIC, public)
    return public
