"""The server's side of secure aggregation: close a round over the updates that have arrived, then open their sum.

Closing is final: the list of survivors is written once, and clients reveal for one list only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.artefacts.adapter_files import Tensors, flat, layout_of, part_of, read_adapter, unflat
from stages.artefacts.manifest import Unmasking
from stages.artefacts.parts import numbers_sent
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import read_sound, received
from stages.parties.names import client as party_of
from stages.parties.party import Party
from stages.runtime.errors import Damaged, NotReady, Problem, Refused
from stages.runtime.events import Event, Report
from stages.secagg import fixed_point, reveals, unmasking
from stages.secagg.closing import is_former
from stages.secagg.masked_update import commitments, digest, masking_of, names_of, vector_of
from stages.secagg.one_round import opening_of, round_of
from stages.secagg.revealing import survivors_of
from stages.workspace.commands import Command
from stages.workspace.names import MASKED_UPDATE, SEALED_REVEAL


@dataclass(frozen=True)
class Sum:
    """The mean of the survivors' updates added to the broadcast, and how it was opened."""

    average: Tensors
    unmasking: Unmasking
    warnings: list[str]


# --- opening the sum


def open_sum(server: Party, theta: Artefact, closed: Artefact, report: Report) -> Sum:
    """The survivors' mean, from at least a threshold of reveals; the same to the bit whichever these are.

    Raises NotReady naming those who may still reveal, Damaged naming who is to blame where secrets do not open.
    """
    workspace, round, keys = server.workspace, theta.manifest.round, round_of(theta)
    survivors = survivors_of(closed, theta, None)
    updates = {k: workspace.client_update(round, k) for k in survivors}
    manifests = {k: _listed(server, closed, k, place) for k, place in updates.items()}
    given = _reveals(server, theta, closed, list(survivors), report)
    if len(given) < keys.threshold:
        absent = [k for k in survivors if k not in given]
        number = keys.threshold - len(given)
        more = "1 more reveal" if number == 1 else f"{number} more reveals"
        message = f"round {round} waits for {more}, of client {names_of(absent)}"
        close = workspace.shown(workspace.close(round))
        command = Command("reveal", client=absent[0], round=round)
        mend = f"carry {close} there; {command}; carry its reveal here"
        raise NotReady(message, where=workspace.reveal(round, absent[0]), mend=mend)
    try:
        opened = unmasking.open_secrets(
            given,
            keys,
            survivors=list(survivors),
            commit_selves={k: masking_of(update).commit_self for k, update in manifests.items()},
            commit_pairs={k: commitments(update) for k, update in manifests.items()},
        )
        total = unmasking.unmask(_vectors(server, updates, closed, theta, report), opened, keys)
    except Problem as problem:
        problem.where = problem.where or closed.path
        give_up, go_on = Command("aggregate", round=round, keep_old=True), Command("broadcast", round=round + 1)
        problem.mend = f"{problem.mend}: {give_up}, then {go_on}, --without whom you leave out"
        raise
    agreement = workspace.agreement
    settings, whole = agreement.aggregation, read_adapter(theta, None, agreement.slm.lora)
    before = part_of(whole, agreement.sent_in(round))
    mean, _, count = fixed_point.decode(total, bound=settings.max_update_value, clients=len(keys.clients))
    average = unflat((flat(before) + mean).astype(np.float32), layout_of(before))
    how = Unmasking(survivors=list(survivors), revealed=sorted(given), count=count)
    return Sum(whole | average, how, opened.warnings)


def _listed(server: Party, closed: Artefact, client: int, place: Path) -> Artefact:
    """A survivor's update, which must be the one that was closed over; its vector is read later."""
    round = closed.manifest.round
    update = received(place, by=server, stage="client-train", round=round, client=client, only=[])
    if update.sha256 != closed.manifest.parents.get(party_of(client)):
        message = f"client {client}'s update is not the one that the round was closed over"
        raise Damaged(message, where=place, mend="put the update back that arrived before the close")
    return update


def _reveals(
    server: Party, theta: Artefact, closed: Artefact, survivors: list[int], report: Report
) -> dict[int, np.ndarray]:
    """What each client has revealed so far for this close. Raises Damaged or Refused for one that is not sound."""
    found: dict[int, np.ndarray] = {}
    missing = len(opening_of(theta).clients) - len(survivors)
    box = server.keys.box
    for client in survivors:
        place = server.workspace.reveal(theta.manifest.round, client)
        if not os.path.lexists(place):
            continue
        try:
            if is_former(read_manifest(place)[0], theta):
                report(Event("warning", f"client {client}'s reveal is of another roster, and is passed over"))
                continue
            round = theta.manifest.round
            reveal = received(place, by=server, stage="reveal", round=round, client=client)
        except NotReady:
            continue
        if reveal.manifest.parents != {"close": closed.sha256}:
            message = f"client {client} revealed for another close of round {theta.manifest.round} than the one here"
            raise Refused(message, where=place, mend=f"take it out; there: {Command('reveal', client=client)}")
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
            again = Command("reveal", client=client, round=theta.manifest.round)
            problem.where, problem.mend = place, f"take it out; there: {again}; then carry it here again"
            raise
    return found


def _vectors(
    server: Party, updates: dict[int, Path], closed: Artefact, theta: Artefact, report: Report
) -> Iterator[np.ndarray]:
    """The survivors' masked vectors, one in memory at a time."""
    count = numbers_sent(theta, server.workspace.agreement)
    for number, (client, place) in enumerate(updates.items(), 1):
        update = read_sound(place, by=server, only=[MASKED_UPDATE])
        y = vector_of(update, count)
        if digest(y) != (closed.manifest.closing or {}).get(party_of(client)):
            raise Damaged(f"client {client}'s masked vector is not the one closed over", where=place)
        yield y
        report(Event("step", f"client {client}", step=number, total=len(updates)))
