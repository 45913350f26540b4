"""A party as one command acts for it: its keys and the roster that it trusts, each read from disk once.

A command opens its party once and hands it on. Secrets themselves are not held: the vault reads each when it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from stages.files import reading
from stages.parties import names
from stages.parties.roster import Roster, public_of
from stages.parties.roster_files import Federation, parsed, read_federation
from stages.parties.vault import NOT_ENROLLED, Vault
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.workspace import edits
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace


@dataclass(frozen=True)
class Party:
    """A party of one workspace, by its name: "server", "client-2"."""

    workspace: Workspace
    name: str

    @staticmethod
    def server(workspace: Workspace) -> Party:
        """The server of a workspace."""
        return Party(workspace, names.SERVER)

    @staticmethod
    def client(workspace: Workspace, number: int) -> Party:
        """A client of a workspace, which it sees with its own model as the SLM."""
        return Party(workspace.of_client(number), names.client(number))

    @staticmethod
    def of(workspace: Workspace, client: int | None) -> Party:
        """A client, or, without its number, the server."""
        return Party.server(workspace) if client is None else Party.client(workspace, client)

    @property
    def is_server(self) -> bool:
        """Whether it is the server."""
        return self.name == names.SERVER

    @property
    def number(self) -> int:
        """The number of a client. Raises ValueError for the server, which has none."""
        return names.number_of(self.name)

    @functools.cached_property
    def vault(self) -> Vault | None:
        """Its keys, if it has any on this machine. Raises Refused if others than the user can read them."""
        return Vault.find(self.workspace, self.name)

    @property
    def keys(self) -> Vault:
        """Its keys. Raises NotReady if it has none on this machine."""
        if self.vault is None:
            message, where = f"{self.name} has no keys on this machine", self.workspace.secrets_pointer(self.name)
            make: object = names.keys_made_by(self.name)
            here = [one.name for one in all_of(self.workspace) if self.workspace.secrets_pointer(one.name).exists()]
            if here:
                make = f"those of {', '.join(here)} are here: is that meant? Else on {self.name}'s machine: {make}"
            raise NotReady(message, where=where, mend=make)
        return self.vault

    @functools.cached_property
    def pinned(self) -> bytes | None:
        """The roster that it has pinned, byte for byte. Raises Damaged if it is not the one that was pinned."""
        return self.vault.pinned if self.vault else None

    @functools.cached_property
    def members(self) -> Roster | None:
        """The roster that it has pinned; None in plain mode where there are no keys.

        Raises NotReady if the federation has a roster, or needs one, that the party has not pinned yet; Refused if it
        is of another agreement than fedcollm.toml is now; Damaged if its own keys are not those that it names.
        """
        workspace, content = self.workspace, self.pinned
        if content is None:
            if workspace.agreement.aggregation.is_hidden or workspace.federation.exists():
                join = Command("enroll") if self.is_server else Command("join", client=self.number)
                raise NotReady(f"{self.name} has not joined this federation", where=workspace.federation, mend=join)
            return None
        try:
            members = Roster(parsed(Federation, content, workspace.federation), reading.sha256(content))
        except (Damaged, ValueError, RecursionError) as error:
            raise self.keys.damaged("federation.json") from error
        _check_agreement(workspace, members.federation.agreement_sha256)
        _check_own_keys(self.keys, members)
        return members


@dataclass(frozen=True)
class Onlooker:
    """Somebody who takes no part, such as an auditor."""

    workspace: Workspace

    @functools.cached_property
    def members(self) -> Roster | None:
        """The roster in exchange/, if there is one; it is pinned by nobody here."""
        if not self.workspace.federation.exists():
            return None
        federation, content = read_federation(self.workspace.federation)
        return Roster(federation, reading.sha256(content))


Reader = Party | Onlooker
"""Who is about to use a folder: whose roster says who signed it."""


def all_of(workspace: Workspace) -> Iterator[Party]:
    """Every party of a workspace, the server first."""
    yield Party.server(workspace)
    yield from (Party.client(workspace, number) for number in workspace.clients)


def _check_agreement(workspace: Workspace, enrolled: str) -> None:
    """Raise Refused unless the parties enrolled with fedcollm.toml as it is now; enrolled: the sha256 of theirs."""
    if enrolled == workspace.agreement_sha256:
        return
    message = (
        f"fedcollm.toml has changed since the parties enrolled: sha256 {workspace.agreement_sha256[:16]}..., "
        f"enrolled {enrolled[:16]}..."
    )
    if edited := edits.since(workspace, enrolled):
        message += f"; {edited}"
    mend = "undo the edit; or agree anew: `keys --renew` at every client, `enroll --renew` at the server, `join`"
    raise Refused(message, where=workspace.root / AGREEMENT, mend=mend)


def _check_own_keys(vault: Vault, members: Roster) -> None:
    """Raise Damaged unless the party's secret keys are those that the roster names: what they sign, others refuse."""
    if vault.identity.public_key().public_bytes_raw() != members.key_of(vault.party):
        raise vault.damaged("identity.pem", NOT_ENROLLED)
    if vault.party == names.SERVER and public_of(vault.box) != members.federation.server.x25519:
        raise vault.damaged("box.pem", NOT_ENROLLED)
