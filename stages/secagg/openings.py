"""How a round begins where there are keys: the server opens it, and each party remembers what it has seen of it.

A party takes one broadcast of a round, and a second only as a later attempt at it; after a reveal it takes none. So a
server that shows clients different rounds, or replays an old one, is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection

from stages.artefacts.manifest import Opening
from stages.artefacts.reading import read_manifest
from stages.parties.memory import Kept, recall, remember
from stages.parties.party import Party
from stages.parties.roster import Roster
from stages.runtime.errors import Problem, Refused, UsageProblem
from stages.workspace.averaging import threshold
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

# --- at the server


def open_round(
    server: Party, round: int, *, again: bool, without: Collection[int] | None
) -> tuple[int, Opening | None]:
    """Which attempt at a round this is, and, in secure mode, what its broadcast says of keys and clients.

    again: whether what was opened before is given up. without: clients of the roster that are left out; None for as
    before, or for nobody.
    """
    workspace, members = server.workspace, server.members
    if without and not workspace.agreement.aggregation.is_secure:
        mend = "leave --without out: set aggregation.min_clients to average without some"
        message = "only a round of secure aggregation is opened for some clients"
        raise UsageProblem(message, where=workspace.root / AGREEMENT, mend=mend)
    if members is None:
        return 0, None
    kept = recall(server.keys, round)
    if kept and again:
        _check_not_opened(workspace, round, kept.attempt)
    attempt = kept.attempt + again if kept else 0
    if not workspace.agreement.aggregation.is_secure:
        return attempt, None
    slot = kept.slot if kept and not again else _next_slot(server)
    assert slot is not None
    if without is None and kept and not again and workspace.broadcast(round).exists():
        earlier = read_manifest(workspace.broadcast(round))[0].opening
        without = [client for client in members.clients if earlier and client not in earlier.clients]
    return attempt, _opening(workspace, round, members, slot, without or ())


def _check_not_opened(workspace: Workspace, round: int, attempt: int) -> None:
    """Raise Refused where the one client that opens encrypted sums has opened this attempt's: it opens no other."""
    opener = workspace.agreement.aggregation.key_holder
    try:
        revealed = opener and read_manifest(workspace.reveal(round, opener))[0].attempt
    except Problem:  # none has arrived, or none that could be taken
        return
    if revealed == attempt and opener:
        message = f"client {opener} has opened the sum of round {round}, and opens no other of this round"
        take = Command("aggregate", round=round)
        mend = f"{take} takes it over; {take.also(keep_old=True, overwrite=True)} gives the round up"
        raise Refused(message, where=workspace.reveal(round, opener), mend=mend)


def _next_slot(server: Party) -> int:
    """The first set of one-time keys that no round was opened with."""
    rounds = range(1, server.workspace.agreement.federation.rounds + 1)
    all_kept = [recall(server.keys, round) for round in rounds]
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


def opened(server: Party, round: int) -> None:
    """Remember, at the server, the broadcast that is there now."""
    if server.members is None:
        return
    manifest, digest = read_manifest(server.workspace.broadcast(round))
    slot = manifest.opening.slot if manifest.opening else None
    kept = recall(server.keys, round)
    if kept is None or kept.broadcast_sha256 != digest:
        remember(server.keys, round, Kept(attempt=manifest.attempt, broadcast_sha256=digest, slot=slot))
