"""The server closes a round: whose masked updates have arrived is fixed, and told to all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from stages.artefacts.arrays import array_bytes
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.parts import numbers_sent
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact, inbox, read_manifest
from stages.artefacts.receiving import received
from stages.files import seen_places
from stages.parties.memory import Kept, recall, remember
from stages.parties.names import client as party_of
from stages.parties.party import Party
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.events import Event, Report
from stages.secagg import unmasking
from stages.secagg.masked_update import digest, masking_of, names_of, shares_of, vector_of
from stages.secagg.one_round import opening_of, transcript_of
from stages.secagg.revealing import survivors_of
from stages.workspace.commands import Command
from stages.workspace.names import MASKED_UPDATE
from stages.workspace.paths import Workspace

# --- closing


def close(server: Party, theta: Artefact, report: Report, *, overwrite: bool = False) -> Artefact:
    """The close of a round: the one that is there, or a new one over all sound updates that have arrived.

    overwrite: whether one that an earlier roster's server made may be replaced; no other ever is.
    Raises NotReady below the quorum; Damaged, naming both ends, where two clients derived different pair keys, before
    any secret is opened; Refused for an update of another round.
    """
    with server.keys.alone(report):
        return _close(server, theta, report, overwrite)


def _close(server: Party, theta: Artefact, report: Report, overwrite: bool) -> Artefact:
    round = theta.manifest.round
    target = server.workspace.close(round)
    place, before = seen_places.Place(target), _closed_before(server, theta)
    if os.path.lexists(target) and not (overwrite and is_former(read_manifest(target)[0], theta)):
        closed = received(target, by=server, stage="close", round=round)
        if closed.manifest.transcript == transcript_of(theta):
            return _kept(server, theta, closed)
        if closed.manifest.attempt >= theta.manifest.attempt:
            survivors_of(closed, theta, None)  # says what is wrong with it
    if before:
        raise _lost(server.workspace, round, before)
    updates = dict(_arrived(server, theta, report))
    _check_quorum(server.workspace, theta, updates, report)
    _check_pairs(theta, updates)
    publish(
        target,
        _inboxes(theta, updates),
        Draft(
            stage="close",
            round=round,
            attempt=theta.manifest.attempt,
            parents={"broadcast": theta.sha256} | {party_of(k): update.sha256 for k, update in updates.items()},
            base=theta.manifest.base,
            parameters=0,
            transcript=transcript_of(theta),
            closing={party_of(k): masking_of(update).y_sha256 for k, update in updates.items()},
        ),
        by=server,
        over=place,
    )
    report(Event("note", f"round {round} is closed over client {names_of(updates)}"))
    return _kept(server, theta, received(target, by=server, stage="close", round=round))


def _closed_before(server: Party, theta: Artefact) -> str | None:
    """The digest of the close that was made of this opening of the round, whether it is still there or not."""
    kept = recall(server.keys, theta.manifest.round)
    return kept.close_sha256 if kept and kept.broadcast_sha256 == theta.sha256 else None


def _kept(server: Party, theta: Artefact, closed: Artefact) -> Artefact:
    """The close, remembered for good. Raises Refused if another one was made before."""
    round, opening = theta.manifest.round, opening_of(theta)
    before = _closed_before(server, theta)
    if before not in (None, closed.sha256):
        raise _lost(server.workspace, round, before)
    if before is None:
        kept = Kept(
            attempt=theta.manifest.attempt,
            broadcast_sha256=theta.sha256,
            slot=opening.slot,
            close_sha256=closed.sha256,
        )
        remember(server.keys, round, kept)
    return closed


def _lost(workspace: Workspace, round: int, before: str | None) -> Refused:
    message = f"round {round} was closed before, by a close of sha256 {before}, which is not here"
    again = Command("broadcast", round=round, overwrite=True)
    mend = f"put that one back, of which clients have copies; or {again}"
    return Refused(message, where=workspace.close(round), mend=mend)


def is_former(manifest: Manifest, theta: Artefact) -> bool:
    """Whether an artefact is of an earlier opening of the round."""
    """Whether it was made before the parties enrolled anew."""
    return manifest.federation_sha256 != theta.manifest.federation_sha256


def late(workspace: Workspace, closed: Artefact) -> list[int]:
    """Clients whose updates came after the close: their own masks are never opened."""
    arrived = workspace.client_updates(closed.manifest.round)
    return [k for k in arrived if party_of(k) not in (closed.manifest.closing or {})]


def _arrived(server: Party, theta: Artefact, report: Report) -> Iterator[tuple[int, Artefact]]:
    """The shares and the manifest of each update of this opening of the round, by client."""
    round, numbers = theta.manifest.round, numbers_sent(theta, server.workspace.agreement)
    for client, place in server.workspace.client_updates(round).items():
        try:
            if read_manifest(place)[0].attempt < theta.manifest.attempt:
                report(Event("warning", f"client {client}'s update is of an earlier attempt at this round"))
                continue
            update = received(place, by=server, stage="client-train", round=round, client=client)
            _check_update(theta, update, client, numbers)
        except NotReady as problem:
            report(Event("warning", f"client {client}'s update has not arrived whole: {problem.message}"))
            continue
        # The masked vectors are read again when they are added; here one at a time, for their shape and digest.
        del update.contents[MASKED_UPDATE]
        yield client, update


def _check_update(theta: Artefact, update: Artefact, client: int, numbers: int) -> None:
    round, opening = theta.manifest.round, opening_of(theta)
    again = f"there: {Command('client-train', client=client, round=round)}; then carry exchange/ here"
    if client not in opening.clients:
        raise Refused(
            f"round {round} was opened without client {client}", where=update.path, mend="take that folder out"
        )
    if update.manifest.transcript != transcript_of(theta) or update.manifest.parents != {"broadcast": theta.sha256}:
        message = (
            f"client {client}'s update was masked for another opening of round {round} "
            f"(transcript {str(update.manifest.transcript)[:16]}..., here {transcript_of(theta)[:16]}...)"
        )
        raise Refused(message, where=update.path, mend=f"carry the broadcast there; {again}")
    masked = masking_of(update)
    others = {party_of(k) for k in opening.clients if k != client}
    if masked.commit_pairs.keys() != others:
        odd = ", ".join(sorted(masked.commit_pairs.keys() ^ others))[:80]
        message = f"client {client} commits to pair keys with other clients than the round's: {odd}"
        raise Damaged(message, where=update.path, mend=again)
    y = vector_of(update, numbers)
    if digest(y) != masked.y_sha256:
        raise Damaged(f"client {client}'s masked vector is not the one it commits to", where=update.path, mend=again)
    shares_of(update, len(opening.clients))


def _check_quorum(workspace: Workspace, theta: Artefact, updates: dict[int, Artefact], report: Report) -> None:
    opening, round = opening_of(theta), theta.manifest.round
    needed = workspace.agreement.quorum(len(opening.clients))
    absent = [k for k in opening.clients if k not in updates]
    if len(updates) < needed:
        message = (
            f"round {round} has {len(updates)} of the {needed} updates it needs; absent: client {names_of(absent)}"
        )
        first = Command("client-train", client=absent[0], round=round)
        mend = f"{first}, there; then carry exchange/ here"
        raise NotReady(message, where=workspace.client_update(round, absent[0]), mend=mend)
    if absent:
        whom = f"{len(updates)} of {len(opening.clients)} clients"
        words = f"closing over {whom}, for good; absent: client {names_of(absent)}"
        report(Event("warning", words))


def _check_pairs(theta: Artefact, updates: dict[int, Artefact]) -> None:
    committed = {
        k: {j: masking_of(update).commit_pairs[party_of(j)] for j in updates if j != k} for k, update in updates.items()
    }
    apart = unmasking.disagreements(committed)
    if apart:
        pairs = ", ".join(f"{u} and {v}" for u, v in apart[:8])
        message = f"clients {pairs} derived different pair keys: they were shown different rounds, or have damaged keys"
        again = Command("broadcast", round=theta.manifest.round, overwrite=True)
        mend = f"compare the sha256sum of their broadcast/manifest.json; then, on the server: {again}"
        raise Damaged(message, where=theta.path, mend=mend)


def _inboxes(theta: Artefact, updates: dict[int, Artefact]) -> dict[str, bytes]:
    """For each survivor the rows that were sealed to it, of all survivors, ascending."""
    clients = opening_of(theta).clients
    rows = {k: shares_of(update, len(clients)) for k, update in updates.items()}
    return {
        inbox(holder): array_bytes("s", np.stack([rows[dealer][clients.index(holder)] for dealer in updates]))
        for holder in updates
    }
