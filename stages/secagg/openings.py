"""How a round begins where there are keys: the server opens it, and each party remembers what it has seen of it.

A party takes one broadcast of a round, and a second only as a later attempt at it; after a reveal it takes none. So a
server that shows clients different rounds, or replays an old one, is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.artefacts.manifest import Artefact, Opening, read_manifest, received
from stages.parties import roster
from stages.parties.one_time_keys import transcript
from stages.parties.roster import Roster
from stages.parties.vault import LARGEST_JUMP, SERVER, Vault
from stages.parties.vault import client as party_of
from stages.runtime.errors import Damaged, Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.agreement import threshold
from stages.workspace.paths import AGREEMENT, Workspace

Hexadecimal = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]


class Kept(BaseModel):
    """What a party remembers of a round, in its vault. From slot on, in secure mode alone.

    own_shares: uint8 [K, 33] in hexadecimal. close_sha256: of the one close that the server made, or that the client
    revealed for. reveal: the sealed bytes in hexadecimal, to be sent again if need be.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    attempt: Annotated[int, Field(ge=0)]
    broadcast_sha256: str
    slot: Annotated[int, Field(ge=0)] | None = None
    adapter_sha256: str | None = None
    y_sha256: str | None = None
    own_shares: Hexadecimal | None = None
    close_sha256: str | None = None
    reveal: Hexadecimal | None = None


def recall(vault: Vault, round: int) -> Kept | None:
    """What the party remembers of a round."""
    value = vault.kept(_name(round))
    try:
        return None if value is None else Kept.model_validate(value)
    except ValidationError as error:
        raise vault.damaged(f"{_name(round)}.json") from error


def remember(vault: Vault, round: int, kept: Kept) -> None:
    """Keep this of a round, on disk when this returns."""
    vault.keep(_name(round), kept.model_dump())


def _name(round: int) -> str:
    return f"round-{round:04d}"


# --- at the server


def open_round(
    workspace: Workspace, round: int, *, again: bool, without: Collection[int] | None
) -> tuple[int, Opening | None]:
    """Which attempt at a round this is, and, in secure mode, what its broadcast says of keys and clients.

    again: whether what was opened before is given up. without: clients of the roster that are left out; None for as
    before, or for nobody.
    """
    members = roster.pinned(workspace, SERVER)
    if without and not workspace.agreement.aggregation.is_secure:
        mend = "leave --without out: set aggregation.min_clients to average without some"
        message = "only a round of secure aggregation is opened for some clients"
        raise UsageProblem(message, where=workspace.root / AGREEMENT, mend=mend)
    if members is None:
        return 0, None
    vault = Vault.need(workspace, SERVER)
    kept = recall(vault, round)
    attempt = kept.attempt + again if kept else 0
    if not workspace.agreement.aggregation.is_secure:
        return attempt, None
    slot = kept.slot if kept and not again else _next_slot(workspace, vault)
    assert slot is not None
    if without is None and kept and not again and workspace.broadcast(round).exists():
        earlier = read_manifest(workspace.broadcast(round))[0].opening
        without = [client for client in members.clients if earlier and client not in earlier.clients]
    return attempt, _opening(workspace, round, members, slot, without or ())


def _next_slot(workspace: Workspace, vault: Vault) -> int:
    """The first set of one-time keys that no round was opened with."""
    all_kept = [recall(vault, round) for round in range(1, workspace.agreement.federation.rounds + 1)]
    return 1 + max((kept.slot for kept in all_kept if kept and kept.slot is not None), default=-1)


def _opening(workspace: Workspace, round: int, members: Roster, slot: int, without: Collection[int]) -> Opening:
    clients = [client for client in members.clients if client not in without]
    unknown = sorted(set(without) - set(members.clients))
    if unknown or len(clients) < workspace.agreement.smallest_round:
        message = f"there is no client {unknown[0]}" if unknown else f"only {len(clients)} clients would be left"
        mend = f"leave at least {workspace.agreement.smallest_round} of clients {', '.join(map(str, members.clients))}"
        raise UsageProblem(message, where=workspace.federation, mend=mend)
    prekeys = [members.prekeys(workspace, client) for client in clients]
    if slot >= min(map(len, prekeys)):
        message = f"the clients' one-time keys are used up: rounds were opened {slot} times"
        mend = "begin a new federation: keys --renew at each client, enroll --renew, join"
        raise Refused(message, where=workspace.federation, mend=mend)
    return Opening(
        slot=slot,
        clients=clients,
        prekeys=[keys[slot] for keys in prekeys],
        threshold=threshold(len(clients)),
        previous_sha256=members.sha256 if round == 1 else read_manifest(workspace.broadcast(round - 1))[1],
    )


def opened(workspace: Workspace, round: int) -> None:
    """Remember, at the server, the broadcast that is there now."""
    if roster.pinned(workspace, SERVER) is None:
        return
    manifest, digest = read_manifest(workspace.broadcast(round))
    slot = manifest.opening.slot if manifest.opening else None
    vault = Vault.need(workspace, SERVER)
    kept = recall(vault, round)
    if kept is None or kept.broadcast_sha256 != digest:
        remember(vault, round, Kept(attempt=manifest.attempt, broadcast_sha256=digest, slot=slot))


# --- at a client


def accept(workspace: Workspace, theta: Artefact, client: int, report: Report = ignore) -> None:
    """Take a broadcast as this round's, from now on and no other.

    Raises Refused for a second one, for one of an earlier attempt, for any after a reveal, and in secure mode for one
    whose keys, clients, threshold or chain are not what the roster and the round before say.
    """
    members = roster.pinned(workspace, party_of(client))
    if members is None or theta.manifest.stage != "broadcast":
        return
    vault = Vault.need(workspace, party_of(client))
    with vault.alone(report):
        _accept(workspace, theta, members, vault, client)
    if opening := theta.manifest.opening:
        vault.check_own(opening.slot, opening.prekeys[opening.clients.index(client)])
        report(Event("note", f"round {theta.manifest.round} is opened for {said_of(opening, workspace)}"))


def said_of(opening: Opening, workspace: Workspace) -> str:
    """For how many of how many clients a round is opened, without whom, and how many will be in its sum."""
    without = [k for k in workspace.clients if k not in opening.clients]
    left_out = f", without client {', '.join(map(str, without))}" if without else ""
    least = workspace.agreement.quorum(len(opening.clients))
    return f"{len(opening.clients)} of {len(workspace.clients)} clients{left_out}; its sum is of {least} or more"


def _accept(workspace: Workspace, theta: Artefact, members: Roster, vault: Vault, client: int) -> None:
    round = theta.manifest.round
    kept = recall(vault, round)
    if kept and kept.broadcast_sha256 == theta.sha256:
        return  # looked at when it was taken; keys of later rounds may have been used since
    if kept:
        _check_newer(theta, kept)
    opening = theta.manifest.opening
    if workspace.agreement.aggregation.is_secure:
        if opening is None:
            raise Refused("this broadcast opens no round of secure aggregation", where=theta.path, mend=_ASK)
        _check_opening(workspace, theta, opening, members, vault, client)
    slot = opening.slot if opening else None
    if slot is not None:
        vault.check_slot(slot, farthest=_farthest(vault, round))
    if opening:
        vault.check_own(opening.slot, opening.prekeys[opening.clients.index(client)])
    remember(vault, round, Kept(attempt=theta.manifest.attempt, broadcast_sha256=theta.sha256, slot=slot))


def _farthest(vault: Vault, round: int) -> int:
    """The last slot that a round may be opened with: a server opens each round that this client missed once or more."""
    seen = {number: kept.slot for number in range(1, round + 1) if (kept := recall(vault, number))}
    missed = max(0, round - 1 - max(seen, default=0))
    used = [slot for slot in seen.values() if slot is not None]
    return max(used, default=0) + missed + LARGEST_JUMP


_ASK = "ask the server; compare what other clients have"


def _check_newer(theta: Artefact, kept: Kept) -> None:
    """The broadcast is a later attempt than the one that is remembered, at a round that was not revealed."""
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
        mend = f"on the server, go on with the next round: fedcollm broadcast --round {round + 1}"
        raise Refused(message, where=theta.path, mend=mend)


def _check_opening(
    workspace: Workspace, theta: Artefact, opening: Opening, members: Roster, vault: Vault, client: int
) -> None:
    round = theta.manifest.round
    before = recall(vault, round - 1) if round > 1 else None
    expected = members.sha256 if round == 1 else before and before.broadcast_sha256
    if (
        expected
        and opening.previous_sha256 != expected
        and not _has_followed(workspace, opening, before, round, client)
    ):
        message = (
            f"round {round} follows another broadcast of round {round - 1} than this client's: "
            f"sha256 {opening.previous_sha256[:16]}..., here {expected[:16]}..."
        )
        mend = f"copy exchange/round-{round - 1:04d}/broadcast here again; if it stays, {_ASK}"
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


def _has_followed(workspace: Workspace, opening: Opening, before: Kept | None, round: int, client: int) -> bool:
    """Whether the round before was opened again, without this client it may be, by the broadcast that is here."""
    place = workspace.broadcast(round - 1)
    if before is None or before.close_sha256 or not place.exists():
        return False
    later = received(place, workspace, reader=party_of(client), stage="broadcast", round=round - 1)
    return later.sha256 == opening.previous_sha256 and later.manifest.attempt > before.attempt


def transcript_of(theta: Artefact) -> str:
    """What all keys of a round hang on, in hexadecimal: a hash of the exact bytes of the broadcast's manifest."""
    return transcript(theta.signed).hex()
