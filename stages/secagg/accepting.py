"""A client accepts the opening of a round, once, and only one that is as agreed."""

from __future__ import annotations

from stages.artefacts.manifest import Opening
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.parties.memory import Kept, recall, remember
from stages.parties.party import Party
from stages.parties.roster import Roster
from stages.parties.vault import LARGEST_JUMP, Vault
from stages.runtime.errors import Damaged, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.averaging import threshold
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

# --- at a client


def accept(party: Party, theta: Artefact, report: Report = ignore) -> None:
    """Take a broadcast as this round's, from now on and no other.

    Raises Refused for a second one, for one of an earlier attempt, for any after a reveal, and in secure mode for one
    whose keys, clients, threshold or chain are not what the roster and the round before say.
    """
    members = party.members
    if members is None or theta.manifest.stage != "broadcast":
        return
    with party.keys.alone(report):
        _accept(party, theta, members)
    if opening := theta.manifest.opening:
        _check_own_key(party, opening)
        report(Event("note", f"round {theta.manifest.round} is opened for {said_of(opening, party.workspace)}"))


def said_of(opening: Opening, workspace: Workspace) -> str:
    """For how many of how many clients a round is opened, without whom, and how many will be in its sum."""
    without = [k for k in workspace.clients if k not in opening.clients]
    left_out = f", without client {', '.join(map(str, without))}" if without else ""
    least = workspace.agreement.quorum(len(opening.clients))
    return f"{len(opening.clients)} of {len(workspace.clients)} clients{left_out}; its sum is of {least} or more"


def _check_own_key(party: Party, opening: Opening) -> None:
    """Raise Damaged unless the one-time key of the party that a round is opened with is its own."""
    party.keys.check_own(opening.slot, opening.prekeys[opening.clients.index(party.number)])


def _accept(party: Party, theta: Artefact, members: Roster) -> None:
    round, vault = theta.manifest.round, party.keys
    kept = recall(vault, round)
    if kept and kept.broadcast_sha256 == theta.sha256:
        return  # looked at when it was taken; keys of later rounds may have been used since
    if kept:
        holder = party.workspace.agreement.aggregation.key_holder
        _check_newer(theta, kept, opens_all=party.number == holder)
    opening = theta.manifest.opening
    if party.workspace.agreement.aggregation.is_secure:
        if opening is None:
            raise Refused("this broadcast opens no round of secure aggregation", where=theta.path, mend=_ASK)
        _check_opening(party, theta, opening, members)
    slot = opening.slot if opening else None
    if slot is not None:
        vault.check_slot(slot, farthest=_farthest(vault, round))
    if opening:
        _check_own_key(party, opening)
    remember(vault, round, Kept(attempt=theta.manifest.attempt, broadcast_sha256=theta.sha256, slot=slot))


def _farthest(vault: Vault, round: int) -> int:
    """The last slot that a round may be opened with: a server opens each round that this client missed once or more."""
    seen = {number: kept.slot for number in range(1, round + 1) if (kept := recall(vault, number))}
    missed = max(0, round - 1 - max(seen, default=0))
    used = [slot for slot in seen.values() if slot is not None]
    return max(used, default=0) + missed + LARGEST_JUMP


_ASK = "ask the server; compare what other clients have"


def _check_newer(theta: Artefact, kept: Kept, *, opens_all: bool) -> None:
    """The broadcast is a later attempt than the one that is remembered, at a round that was not revealed.

    opens_all: whether no round can be without this client, since it alone opens sums.
    """
    round, attempt = theta.manifest.round, theta.manifest.attempt
    if attempt == kept.attempt:
        message = (
            f"this is a second broadcast of round {round}: sha256 {theta.sha256}, the one taken before "
            f"{kept.broadcast_sha256}"
        )
        raise Refused(message, where=theta.path, mend=f"{_ASK}: it may be showing clients different rounds")
    if attempt < kept.attempt:
        message = f"this is attempt {attempt} at round {round}, which is at attempt {kept.attempt} here"
        raise Refused(message, where=theta.path, mend="copy the newer broadcast here again")
    if kept.close_sha256:
        message = f"this client has revealed for round {round} already; it takes no further attempt at it"
        mend = f"on the server, go on with the next round: {Command('broadcast', round=round + 1)}"
        if opens_all:
            mend = (
                f"on the server, give the round up: {Command('aggregate', round=round, keep_old=True, overwrite=True)}"
            )
        raise Refused(message, where=theta.path, mend=mend)


def _check_opening(party: Party, theta: Artefact, opening: Opening, members: Roster) -> None:
    round, workspace, vault, client = theta.manifest.round, party.workspace, party.keys, party.number
    before = recall(vault, round - 1) if round > 1 else None
    expected = members.sha256 if round == 1 else before and before.broadcast_sha256
    if expected and opening.previous_sha256 != expected and not _has_followed(party, opening, before, round):
        message = (
            f"round {round} follows another broadcast of round {round - 1} than this client's: "
            f"sha256 {opening.previous_sha256[:16]}..., here {expected[:16]}..."
        )
        mend = f"copy {workspace.shown(workspace.broadcast(round - 1))} here again; if it stays, {_ASK}"
        raise Refused(message, where=theta.path, mend=mend if round > 1 else _ASK)
    clients = opening.clients
    if clients != sorted(set(clients) & set(members.clients)):
        raise Refused(
            f"round {round} is opened for {clients}, not for clients of the roster", where=theta.path, mend=_ASK
        )
    least = workspace.agreement.smallest_round
    if len(clients) < least:
        message = (
            f"round {round} is opened for {clients}, {len(clients)} of {len(members.clients)} clients; by the "
            f"agreement it takes {least} or more: among few, those who work together see the update of the one left"
        )
        raise Refused(message, where=theta.path, mend=_ASK)
    if client not in clients:
        mend = "wait for the next round: the server opened this one --without you"
        raise Refused(f"round {round} was opened without client {client}", where=theta.path, mend=mend)
    if opening.threshold != threshold(len(clients)):
        message = f"round {round} would be opened by {opening.threshold} reveals, not by {threshold(len(clients))}"
        raise Refused(message, where=theta.path, mend=_ASK)
    slot = slice(opening.slot, opening.slot + 1)
    if [key for k in clients for key in members.prekeys(workspace, k)[slot]] != opening.prekeys:
        message = f"round {round} names other keys than the clients' own for slot {opening.slot}"
        raise Damaged(message, where=theta.path, mend=_ASK)
    earlier = [recall(vault, number) for number in range(1, workspace.agreement.federation.rounds + 1)]
    used = [kept.slot for kept in earlier if kept and kept.slot is not None]
    if opening.slot <= max(used, default=-1):
        message = f"round {round} is opened with keys {opening.slot}, and keys {max(used)} were used before"
        raise Refused(message, where=theta.path, mend=_ASK)


def _has_followed(party: Party, opening: Opening, before: Kept | None, round: int) -> bool:
    """Whether the round before was opened again, without this client it may be, by the broadcast that is here."""
    place = party.workspace.broadcast(round - 1)
    if before is None or before.close_sha256 or not place.exists():
        return False
    later = received(place, by=party, stage="broadcast", round=round - 1)
    return later.sha256 == opening.previous_sha256 and later.manifest.attempt > before.attempt
