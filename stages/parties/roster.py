"""Who takes part: the clients' public keys, and the roster that every party pins after reading its fingerprint aloud.

A roster is bound to one agreement. Whoever has pinned one takes nothing that is not signed by the key it names.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from stages.files import reading
from stages.parties.names import SERVER, client, keys_made_by, number_of
from stages.parties.roster_files import Federation, PublicKeys, _parsed, read_federation, read_keys
from stages.parties.vault import NOT_ENROLLED, Vault
from stages.runtime.errors import Damaged, NotReady, Problem, Refused
from stages.workspace import edits, task_files
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

FINGERPRINT_LETTERS = 40
"""200 bits in base32, so that nobody finds two rosters of one fingerprint in fewer than some 2^100 trials."""

MOST_NAMED = 8
"""How many files are named before the rest is counted."""


@dataclass(frozen=True)
class Roster:
    """A roster that a party has pinned, and the digest of its bytes."""

    federation: Federation
    sha256: str

    def key_of(self, party: str) -> bytes:
        """The public key that a party signs with. Raises Refused for one that the roster does not have."""
        if party == SERVER:
            return bytes.fromhex(self.federation.server.ed25519)
        for member in self.federation.clients:
            if client(member.client) == party:
                return bytes.fromhex(member.ed25519)
        raise Refused(f"{party} is not in this federation's roster", mend="the server's `enroll` makes a roster")

    @property
    def server_box(self) -> bytes:
        """The public key that reveals are sealed to."""
        return bytes.fromhex(self.federation.server.x25519)

    @property
    def clients(self) -> list[int]:
        """Every client, ascending."""
        return [member.client for member in self.federation.clients]

    def prekeys(self, workspace: Workspace, number: int) -> list[str]:
        """A client's one-time public keys, from the very file that the roster names."""
        path = workspace.public_keys(number)
        found, content = read_keys(path)
        expected = next(member.keys_sha256 for member in self.federation.clients if member.client == number)
        if reading.sha256(content) != expected:
            message = f"{path.name} is not the file that the roster names, whose sha256 is {expected[:16]}..."
            raise Damaged(message, where=path, mend="copy exchange/keys again from the server")
        return found.prekeys


def fingerprint(roster: bytes) -> str:
    """The first 200 bits of the roster's sha256 in base32, in groups of four, to be read over the phone."""
    return spoken(reading.sha256(roster), FINGERPRINT_LETTERS)


def spoken(digest: str, letters: int) -> str:
    """The first letters of a hexadecimal digest in base32, in groups of four."""
    text = base64.b32encode(bytes.fromhex(digest)).decode()[:letters]
    return "-".join(text[start : start + 4] for start in range(0, letters, 4))


def is_fingerprint(typed: str, roster: bytes) -> bool:
    """Whether what a person typed is the roster's fingerprint: case, dashes and blanks do not matter."""
    return re.sub(r"[\s-]", "", typed).upper() == fingerprint(roster).replace("-", "")


def pinned(workspace: Workspace, party: str) -> Roster | None:
    """The roster that this party has pinned; None in plain mode where there are no keys.

    Raises NotReady if the federation has a roster, or needs one, that the party has not pinned yet; Refused if it is of
    another agreement than fedcollm.toml is now; Damaged if the party's own keys are not those that it names.
    """
    vault = Vault.find(workspace, party)
    content = vault.pinned if vault else None
    if content is None:
        if workspace.agreement.aggregation.is_secure or workspace.federation.exists():
            join = Command("enroll") if party == SERVER else Command("join", client=number_of(party))
            raise NotReady(f"{party} has not joined this federation", where=workspace.federation, mend=join)
        return None
    assert vault is not None
    try:
        roster = Roster(_parsed(Federation, content, workspace.federation), reading.sha256(content))
    except (Damaged, ValueError, RecursionError) as error:
        raise vault.damaged("federation.json") from error
    if roster.federation.agreement_sha256 != workspace.agreement_sha256:
        message = (
            f"fedcollm.toml has changed since the parties enrolled: sha256 {workspace.agreement_sha256[:16]}..., "
            f"enrolled {roster.federation.agreement_sha256[:16]}..."
        )
        if edited := edits.since(workspace, roster.federation.agreement_sha256):
            message += f"; {edited}"
        mend = "undo the edit; or agree anew: `keys --renew` at every client, `enroll --renew` at the server, `join`"
        raise Refused(message, where=workspace.root / AGREEMENT, mend=mend)
    _check_own_keys(vault, roster)
    return roster


def check_agreement(workspace: Workspace, party: str | None = None) -> None:
    """Raise Refused if a party, by default any with keys here, has pinned a roster of another agreement."""
    for one in [party] if party else [SERVER, *map(client, workspace.clients)]:
        vault = Vault.find(workspace, one)
        if vault is not None and vault.pinned is not None:
            pinned(workspace, one)


def check_is_new(workspace: Workspace, party: str) -> None:
    """Raise Refused if a party without a vault here has its keys elsewhere: new ones would replace those enrolled."""
    if Vault.find(workspace, party) is not None:
        return
    own = workspace.federation if party == SERVER else workspace.public_keys(int(party.removeprefix("client-")))
    joined = [one for one in (SERVER, *map(client, workspace.clients)) if _has_joined(workspace, one)]
    if not joined and not own.exists() and not workspace.federation.exists():
        return
    name = party.replace("-", " ")
    arrived = "the roster has arrived" if workspace.federation.exists() else f"public keys of {name} are here"
    here = ", ".join(joined).replace("-", " ")
    who = f"{here} {'have' if len(joined) > 1 else 'has'} joined here" if joined else arrived
    mend = f"give the command on the machine of {name}; only for a new federation: {keys_made_by(party, renew=True)}"
    raise Refused(f"{who}; the keys of {name} are on its own machine", where=own, mend=mend)


def _has_joined(workspace: Workspace, party: str) -> bool:
    try:
        vault = Vault.find(workspace, party)
        return vault is not None and vault.pinned is not None
    except (Problem, OSError):  # whoever acts as this party says why
        return False


def _check_own_keys(vault: Vault, roster: Roster) -> None:
    """Raise Damaged unless the party's secret keys are those that the roster names: what they sign, others refuse."""
    if vault.identity.public_key().public_bytes_raw() != roster.key_of(vault.party):
        raise vault.damaged("identity.pem", NOT_ENROLLED)
    if vault.party == SERVER and public_of(vault.box) != roster.federation.server.x25519:
        raise vault.damaged("box.pem", NOT_ENROLLED)


def check_tasks(workspace: Workspace, federation: Federation | None = None, *, may_be_absent: bool = True) -> None:
    """Raise Refused if tasks/ is not what the parties enrolled with, where a roster says what that is.

    federation: by default the one that a party here has pinned, else the one in the exchange. may_be_absent: for who
    uses no task; a party without tasks/ would otherwise take lm-eval's own in their place.
    """
    federation = federation or _trusted(workspace)
    if federation is None or federation.tasks_sha256 is None:
        return
    reading.check_plain(workspace.tasks)
    if may_be_absent and not task_files.own_files(workspace.tasks):
        return
    found = task_files.own_digest(workspace.tasks)
    if found != federation.tasks_sha256:
        message = f"tasks/ is not what the parties enrolled with: sha256 {found[:16]}..., enrolled"
        message = f"{message} {federation.tasks_sha256[:16]}..."
        mend = "copy tasks/ from the server, or undo the edit; or agree anew: `keys --renew`, `enroll --renew`, `join`"
        agreement = workspace.agreement
        if spare := task_files.spare_files(workspace.tasks, [*agreement.evaluation.tasks, *agreement.data.tasks]):
            more = f" and {len(spare) - MOST_NAMED} more" if len(spare) > MOST_NAMED else ""
            message += f"; tasks/ also holds {', '.join(spare[:MOST_NAMED])}{more}"
            mend = f"remove what the server did not send, or {mend}"
        raise Refused(message, where=workspace.tasks, mend=mend)


def _trusted(workspace: Workspace) -> Federation | None:
    for party in (SERVER, *map(client, workspace.clients)):
        try:
            vault = Vault.find(workspace, party)
            if vault and vault.pinned is not None:
                return _parsed(Federation, vault.pinned, workspace.federation)
        except (Problem, OSError, ValueError, RecursionError):  # whoever acts as this party says why
            continue
    found = anyones(workspace)
    return found.federation if found else None


def anyones(workspace: Workspace) -> Roster | None:
    """The roster in the workspace, for those who take no part, such as auditors; it is pinned by nobody here."""
    if not workspace.federation.exists():
        return None
    federation, content = read_federation(workspace.federation)
    return Roster(federation, reading.sha256(content))


def slots(workspace: Workspace) -> int:
    """How many times rounds can be opened with a client's keys: each round twice, and a few more."""
    return 2 * workspace.agreement.federation.rounds + 8


def check_prekeys(workspace: Workspace, keys: PublicKeys, path: Path) -> None:
    """Raise Damaged unless a client gave one key for each slot, no two alike, and a secret can be agreed on with each.

    With one of low order (RFC 7748, 6.1) nobody could mask: this client would stop every round.
    """
    mend = f"there: {keys_made_by(client(keys.client), renew=True)}; then carry exchange/keys here"
    if not len(keys.prekeys) == len(set(keys.prekeys)) == slots(workspace):
        message = f"client {keys.client} gives {len(set(keys.prekeys))} one-time keys, not {slots(workspace)}"
        raise Damaged(message, where=path, mend=mend)
    throwaway = X25519PrivateKey.generate()
    for slot, key in enumerate(keys.prekeys):
        try:
            throwaway.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(key)))
        except ValueError as error:
            message = f"the one-time key {slot} of client {keys.client} is no X25519 key to agree on a secret with"
            raise Damaged(message, where=path, mend=mend) from error


def public_of(secret: X25519PrivateKey) -> str:
    """A public key as it stands in our files."""
    return secret.public_key().public_bytes_raw().hex()
