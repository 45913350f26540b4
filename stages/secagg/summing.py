"""The server's side of secure aggregation: close a round over the updates that have arrived, then open their sum.

Closing is final: the list of survivors is written once, and clients reveal for one list only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.artefacts.adapter_files import Tensors, layout_of, read_adapter
from stages.artefacts.manifest import (
    Artefact,
    Manifest,
    Masking,
    Unmasking,
    inbox,
    publish,
    read_manifest,
    read_sound,
    received,
)
from stages.files import writing
from stages.parties.vault import SERVER, Vault
from stages.parties.vault import client as party_of
from stages.runtime.errors import Damaged, NotReady, Problem, Refused
from stages.runtime.events import Event, Report
from stages.secagg import fixed_point, masking, reveals, unmasking
from stages.secagg.openings import Kept, recall, remember, transcript_of
from stages.secagg.sending import opening_of, round_of, survivors_of
from stages.secagg.vectors import array_bytes, read_array
from stages.workspace.paths import MASKED_UPDATE, SEALED_REVEAL, SEALED_SHARES, Workspace


@dataclass(frozen=True)
class Sum:
    """The mean of the survivors' updates added to the broadcast, and how it was opened."""

    average: Tensors
    unmasking: Unmasking
    warnings: list[str]


# --- closing


def close(workspace: Workspace, theta: Artefact, report: Report, *, overwrite: bool = False) -> Artefact:
    """The close of a round: the one that is there, or a new one over all sound updates that have arrived.

    overwrite: whether one that an earlier roster's server made may be replaced; no other ever is.
    Raises NotReady below the quorum; Damaged, naming both ends, where two clients derived different pair keys, before
    any secret is opened; Refused for an update of another round.
    """
    with Vault.need(workspace, SERVER).alone(report):
        return _close(workspace, theta, report, overwrite)


def _close(workspace: Workspace, theta: Artefact, report: Report, overwrite: bool) -> Artefact:
    round = theta.manifest.round
    target = workspace.close(round)
    place, before = writing.Place(target), _closed_before(workspace, theta)
    if os.path.lexists(target) and not (overwrite and _is_former(read_manifest(target)[0], theta)):
        closed = received(target, workspace, reader=SERVER, stage="close", round=round)
        if closed.manifest.transcript == transcript_of(theta):
            return _kept(workspace, theta, closed)
        if closed.manifest.attempt >= theta.manifest.attempt:
            survivors_of(closed, theta, None)  # says what is wrong with it
    if before:
        raise _lost(workspace, round, before)
    updates = dict(_arrived(workspace, theta, report))
    _check_quorum(workspace, theta, updates, report)
    _check_pairs(theta, updates)
    publish(
        target,
        _inboxes(theta, updates),
        workspace,
        stage="close",
        round=round,
        attempt=theta.manifest.attempt,
        parents={"broadcast": theta.sha256} | {party_of(k): update.sha256 for k, update in updates.items()},
        base=theta.manifest.base,
        parameters=0,
        transcript=transcript_of(theta),
        closing={party_of(k): _masking(update).y_sha256 for k, update in updates.items()},
        over=place,  # of an earlier attempt, or an earlier roster
    )
    report(Event("note", f"round {round} is closed over client {_names(updates)}"))
    return _kept(workspace, theta, received(target, workspace, reader=SERVER, stage="close", round=round))


def _closed_before(workspace: Workspace, theta: Artefact) -> str | None:
    """The digest of the close that was made of this opening of the round, whether it is still there or not."""
    kept = recall(Vault.need(workspace, SERVER), theta.manifest.round)
    return kept.close_sha256 if kept and kept.broadcast_sha256 == theta.sha256 else None


def _kept(workspace: Workspace, theta: Artefact, closed: Artefact) -> Artefact:
    """The close, remembered for good. Raises Refused if another one was made before."""
    round, opening = theta.manifest.round, opening_of(theta)
    before = _closed_before(workspace, theta)
    if before not in (None, closed.sha256):
        raise _lost(workspace, round, before)
    if before is None:
        kept = Kept(
            attempt=theta.manifest.attempt,
            broadcast_sha256=theta.sha256,
            slot=opening.slot,
            close_sha256=closed.sha256,
        )
        remember(Vault.need(workspace, SERVER), round, kept)
    return closed


def _lost(workspace: Workspace, round: int, before: str | None) -> Refused:
    message = f"round {round} was closed before, by a close of sha256 {before}, which is not here"
    mend = f"put that one back, of which clients have copies; or fedcollm broadcast --round {round} --overwrite"
    return Refused(message, where=workspace.close(round), mend=mend)


def _is_former(manifest: Manifest, theta: Artefact) -> bool:
    """Whether it was made before the parties enrolled anew."""
    return manifest.federation_sha256 != theta.manifest.federation_sha256


def late(workspace: Workspace, closed: Artefact) -> list[int]:
    """Clients whose updates came after the close: their own masks are never opened."""
    arrived = workspace.client_updates(closed.manifest.round)
    return [k for k in arrived if party_of(k) not in (closed.manifest.closing or {})]


def _arrived(workspace: Workspace, theta: Artefact, report: Report) -> Iterator[tuple[int, Artefact]]:
    """The shares and the manifest of each update of this opening of the round, by client."""
    round = theta.manifest.round
    for client, place in workspace.client_updates(round).items():
        try:
            if read_manifest(place)[0].attempt < theta.manifest.attempt:
                report(Event("warning", f"client {client}'s update is of an earlier attempt at this round"))
                continue
            update = received(place, workspace, reader=SERVER, stage="client-train", round=round, client=client)
            _check_update(theta, update, client)
        except NotReady as problem:
            report(Event("warning", f"client {client}'s update has not arrived whole: {problem.message}"))
            continue
        # The masked vectors are read again when they are added; here one at a time, for their shape and digest.
        del update.contents[MASKED_UPDATE]
        yield client, update


def _check_update(theta: Artefact, update: Artefact, client: int) -> None:
    round, opening = theta.manifest.round, opening_of(theta)
    again = f"there: fedcollm client-train --client {client} --round {round}; then carry exchange/ here"
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
    masked = _masking(update)
    others = {party_of(k) for k in opening.clients if k != client}
    if masked.commit_pairs.keys() != others:
        odd = ", ".join(sorted(masked.commit_pairs.keys() ^ others))[:80]
        message = f"client {client} commits to pair keys with other clients than the round's: {odd}"
        raise Damaged(message, where=update.path, mend=again)
    y = _vector(update, theta.manifest.parameters)
    if _digest(y) != masked.y_sha256:
        raise Damaged(f"client {client}'s masked vector is not the one it commits to", where=update.path, mend=again)
    _rows(update, len(opening.clients))


def _check_quorum(workspace: Workspace, theta: Artefact, updates: dict[int, Artefact], report: Report) -> None:
    opening, round = opening_of(theta), theta.manifest.round
    needed = workspace.agreement.quorum(len(opening.clients))
    absent = [k for k in opening.clients if k not in updates]
    if len(updates) < needed:
        message = f"round {round} has {len(updates)} of the {needed} updates it needs; absent: client {_names(absent)}"
        mend = f"fedcollm client-train --client {absent[0]} --round {round}, there; then carry exchange/ here"
        raise NotReady(message, where=workspace.client_update(round, absent[0]), mend=mend)
    if absent:
        words = (
            f"closing over {len(updates)} of {len(opening.clients)} clients, for good; absent: client {_names(absent)}"
        )
        report(Event("warning", words))


def _check_pairs(theta: Artefact, updates: dict[int, Artefact]) -> None:
    committed = {
        k: {j: _masking(update).commit_pairs[party_of(j)] for j in updates if j != k} for k, update in updates.items()
    }
    apart = unmasking.disagreements(committed)
    if apart:
        pairs = ", ".join(f"{u} and {v}" for u, v in apart[:8])
        message = f"clients {pairs} derived different pair keys: they were shown different rounds, or have damaged keys"
        again = f"fedcollm broadcast --round {theta.manifest.round} --overwrite"
        mend = f"compare the sha256sum of their broadcast/manifest.json; then, on the server: {again}"
        raise Damaged(message, where=theta.path, mend=mend)


def _inboxes(theta: Artefact, updates: dict[int, Artefact]) -> dict[str, bytes]:
    """For each survivor the rows that were sealed to it, of all survivors, ascending."""
    clients = opening_of(theta).clients
    rows = {k: _rows(update, len(clients)) for k, update in updates.items()}
    return {
        inbox(holder): array_bytes("s", np.stack([rows[dealer][clients.index(holder)] for dealer in updates]))
        for holder in updates
    }


# --- opening the sum


def open_sum(workspace: Workspace, theta: Artefact, closed: Artefact, report: Report) -> Sum:
    """The survivors' mean, from at least a threshold of reveals; the same to the bit whichever these are.

    Raises NotReady naming those who may still reveal, Damaged naming who is to blame where secrets do not open.
    """
    round, keys = theta.manifest.round, round_of(theta)
    survivors = survivors_of(closed, theta, None)
    updates = {k: workspace.client_update(round, k) for k in survivors}
    manifests = {k: _listed(workspace, closed, k, place) for k, place in updates.items()}
    given = _reveals(workspace, theta, closed, list(survivors), report)
    if len(given) < keys.threshold:
        absent = [k for k in survivors if k not in given]
        number = keys.threshold - len(given)
        more = "1 more reveal" if number == 1 else f"{number} more reveals"
        message = f"round {round} waits for {more}, of client {_names(absent)}"
        close = workspace.shown(workspace.close(round))
        mend = f"carry {close} there; fedcollm reveal --client {absent[0]} --round {round}; carry its reveal here"
        raise NotReady(message, where=workspace.reveal(round, absent[0]), mend=mend)
    try:
        opened = unmasking.open_secrets(
            given,
            keys,
            survivors=list(survivors),
            commit_selves={k: _masking(update).commit_self for k, update in manifests.items()},
            commit_pairs={k: _commitments(update) for k, update in manifests.items()},
        )
        total = unmasking.unmask(_vectors(workspace, updates, closed, theta, report), opened, keys)
    except Problem as problem:
        problem.where = problem.where or closed.path
        give_up = f"fedcollm aggregate --round {round} --keep-old, then fedcollm broadcast --round {round + 1}"
        problem.mend = f"{problem.mend}: {give_up}, --without whom you leave out"
        raise
    settings, before = workspace.agreement.aggregation, read_adapter(theta, None, workspace.agreement.slm.lora)
    mean, _, count = fixed_point.decode(total, bound=settings.max_update_value, clients=len(keys.clients))
    average = fixed_point.unflatten((fixed_point.flatten(before) + mean).astype(np.float32), layout_of(before))
    how = Unmasking(survivors=list(survivors), revealed=sorted(given), count=count)
    return Sum(average, how, opened.warnings)


def _listed(workspace: Workspace, closed: Artefact, client: int, place: Path) -> Artefact:
    """A survivor's update, which must be the one that was closed over; its vector is read later."""
    round = closed.manifest.round
    update = received(place, workspace, reader=SERVER, stage="client-train", round=round, client=client, only=[])
    if update.sha256 != closed.manifest.parents.get(party_of(client)):
        message = f"client {client}'s update is not the one that the round was closed over"
        raise Damaged(message, where=place, mend="put the update back that arrived before the close")
    return update


def _reveals(
    workspace: Workspace, theta: Artefact, closed: Artefact, survivors: list[int], report: Report
) -> dict[int, np.ndarray]:
    """What each client has revealed so far for this close. Raises Damaged or Refused for one that is not sound."""
    found: dict[int, np.ndarray] = {}
    missing = len(opening_of(theta).clients) - len(survivors)
    box = Vault.need(workspace, SERVER).box
    for client in survivors:
        place = workspace.reveal(theta.manifest.round, client)
        if not os.path.lexists(place):
            continue
        try:
            if _is_former(read_manifest(place)[0], theta):
                report(Event("warning", f"client {client}'s reveal is of another roster, and is passed over"))
                continue
            round = theta.manifest.round
            reveal = received(place, workspace, reader=SERVER, stage="reveal", round=round, client=client)
        except NotReady:
            continue
        if reveal.manifest.parents != {"close": closed.sha256}:
            message = f"client {client} revealed for another close of round {theta.manifest.round} than the one here"
            raise Refused(message, where=place, mend=f"take it out; there: fedcollm reveal --client {client}")
        try:
            found[client] = reveals.open_reveal(
                reveal.contents[SEALED_REVEAL],
                client=client,
                box=box,
                close_sha256=closed.sha256,
                survivors=len(survivors),
                missing=missing,
            )
        except Problem as problem:
            again = f"fedcollm reveal --client {client} --round {theta.manifest.round}"
            problem.where, problem.mend = place, f"take it out; there: {again}; then carry it here again"
            raise
    return found


def _vectors(
    workspace: Workspace, updates: dict[int, Path], closed: Artefact, theta: Artefact, report: Report
) -> Iterator[np.ndarray]:
    """The survivors' masked vectors, one in memory at a time."""
    for number, (client, place) in enumerate(updates.items(), 1):
        update = read_sound(place, workspace, only=[MASKED_UPDATE])
        y = _vector(update, theta.manifest.parameters)
        if _digest(y) != (closed.manifest.closing or {}).get(party_of(client)):
            raise Damaged(f"client {client}'s masked vector is not the one closed over", where=place)
        yield y
        report(Event("step", f"client {client}", step=number, total=len(updates)))


def _vector(update: Artefact, parameters: int) -> np.ndarray:
    path = update.path / MASKED_UPDATE
    return read_array(update.contents[path.name], path, name="y", kind="U32", shape=(parameters + 3,))


def _rows(update: Artefact, clients: int) -> np.ndarray:
    path = update.path / SEALED_SHARES
    shape = (clients, masking.sealed_row_bytes(clients))
    return read_array(update.contents[path.name], path, name="s", kind="U8", shape=shape)


def _digest(y: np.ndarray) -> str:
    return hashlib.sha256(y.data).hexdigest()


def _masking(update: Artefact) -> Masking:
    if update.manifest.masking is None:
        message = f"{update.path.name} is not masked; this federation aggregates securely"
        raise Refused(message, where=update.path, mend="take it out: what it holds should not have been sent")
    return update.manifest.masking


def _commitments(update: Artefact) -> dict[int, str]:
    """What a client commits to for each other."""
    return {int(party.partition("-")[2]): digest for party, digest in _masking(update).commit_pairs.items()}


def _names(clients: Iterable[int]) -> str:
    return ", ".join(map(str, clients))
