"""The server's side of encrypted aggregation: add the ciphertexts that have arrived, and take over what was opened.

Closing is final, as only one sum of a round is ever opened: two of them could show one client's update.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from stages.artefacts.adapter_files import flat, layout_of, part_of, read_adapter, unflat
from stages.artefacts.arrays import read_array
from stages.artefacts.average import Average
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest, Unmasking
from stages.artefacts.parts import numbers_sent
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import received
from stages.artefacts.sizes import ciphertexts_of
from stages.encryption import ckks
from stages.encryption.ciphertext_files import read, written
from stages.encryption.sending import precision_of
from stages.files import seen_places
from stages.parties import encryption_keys
from stages.parties.names import client as party_of
from stages.parties.names import listed, number_of
from stages.parties.party import Party, Reader
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.events import Event, Report
from stages.workspace.commands import Command
from stages.workspace.names import ENCRYPTED, OPENED
from stages.workspace.paths import Workspace


def close(server: Party, theta: Artefact, report: Report) -> Artefact:
    """The sum of a round: the one that is there, or a new one of all sound updates that have arrived.

    Raises NotReady below the quorum; Refused for an update of another broadcast; Damaged, naming the client, for one
    that is no ciphertext under this federation's parameters.
    """
    workspace, round = server.workspace, theta.manifest.round
    target = workspace.close(round)
    with server.keys.alone(report):
        place = seen_places.Place(target)
        if os.path.lexists(target) and _is_of(read_manifest(target)[0], theta):
            return received(target, by=server, stage="close", round=round)
        updates = dict(_arrived(server, theta, report))
        _check_quorum(workspace, round, list(updates), report)
        total = [one.serialize() for one in add(server, theta, updates, report)]
        publish(
            target,
            {ENCRYPTED: written(total)},
            Draft(
                stage="close",
                round=round,
                attempt=theta.manifest.attempt,
                parents={"broadcast": theta.sha256} | {party_of(k): one.sha256 for k, one in updates.items()},
                base=theta.manifest.base,
                parameters=numbers_sent(theta, workspace.agreement),
                closing={party_of(k): one.manifest.files[ENCRYPTED].sha256 for k, one in updates.items()},
            ),
            by=server,
            over=place,
        )
        report(Event("note", f"round {round} is closed over {listed(updates)}"))
        return received(target, by=server, stage="close", round=round)


def add(reader: Reader, theta: Artefact, updates: dict[int, Artefact], report: Report) -> list[Any]:
    """The sum of these updates' ciphertexts; one file in memory at a time. Raises Damaged, naming whose is unsound."""
    workspace, members = reader.workspace, reader.members
    assert members is not None, "where updates are encrypted there is a roster"
    numbers, total = numbers_sent(theta, workspace.agreement), list[Any]()
    key, precision = encryption_keys.public_key(workspace, members), precision_of(workspace, numbers)
    for number, (client, head) in enumerate(updates.items(), 1):
        update = head_of(reader, theta, client, only=[ENCRYPTED])
        if update.sha256 != head.sha256:
            message = f"client {client}'s update was replaced while it was read"
            raise NotReady(message, where=head.path, mend="wait until it is there, and give the same command again")
        ciphertexts = read(update.contents[ENCRYPTED], head.path / ENCRYPTED, ciphertexts_of(numbers))
        try:
            total = ckks.add(total, ciphertexts, key, precision)
        except Damaged as problem:
            again = Command("client-train", client=client, round=theta.manifest.round)
            mend = f"take it out; there: {again}; then carry it here"
            message = f"client {client}'s update: {problem.message}"
            raise Damaged(message, where=head.path / ENCRYPTED, mend=mend) from problem
        report(Event("step", f"client {client}", step=number, total=len(updates)))
    return total


def head_of(reader: Reader, theta: Artefact, client: int, *, only: list[str]) -> Artefact:
    """A client's update of this round, with these of its files."""
    round = theta.manifest.round
    place = reader.workspace.client_update(round, client)
    update = received(place, by=reader, stage="client-train", round=round, client=client, only=only)
    if ENCRYPTED not in update.manifest.files:
        message = f"client {client}'s update is not encrypted, which this federation's are"
        raise Refused(message, where=place, mend="take it out: what it holds should not have been sent")
    if update.manifest.parents != {"broadcast": theta.sha256}:
        message = f"client {client}'s update of round {round} was trained from another broadcast than the one here"
        again = Command("client-train", client=client, round=round)
        raise Refused(message, where=place, mend=f"carry the broadcast there; there: {again}; then carry it here")
    return update


def _is_of(manifest: Manifest, theta: Artefact) -> bool:
    """Whether a close is of this broadcast."""
    return manifest.parents.get("broadcast") == theta.sha256


def _arrived(server: Party, theta: Artefact, report: Report) -> Iterator[tuple[int, Artefact]]:
    """The manifest of each update of this attempt at the round, by client."""
    for client, place in server.workspace.client_updates(theta.manifest.round).items():
        try:
            if read_manifest(place)[0].attempt < theta.manifest.attempt:
                report(Event("warning", f"client {client}'s update is of an earlier attempt at this round"))
                continue
            yield client, head_of(server, theta, client, only=[])
        except NotReady as problem:
            report(Event("warning", f"client {client}'s update has not arrived whole: {problem.message}"))


def _check_quorum(workspace: Workspace, round: int, arrived: list[int], report: Report) -> None:
    needed = workspace.agreement.aggregation.min_clients or len(workspace.clients)
    absent = [k for k in workspace.clients if k not in arrived]
    if len(arrived) < needed:
        message = f"round {round} has {len(arrived)} of the {needed} updates it needs; absent: {listed(absent)}"
        first = Command("client-train", client=absent[0], round=round)
        mend = f"{first}, there; then carry exchange/ here"
        raise NotReady(message, where=workspace.client_update(round, absent[0]), mend=mend)
    if absent:
        words = f"closing over {len(arrived)} of {len(workspace.clients)} clients, for good; absent: {listed(absent)}"
        report(Event("warning", words))


# --- when it has been opened


def taken_over(server: Party, theta: Artefact, closed: Artefact, parents: dict[str, str]) -> Average:
    """The mean that its one client has opened, added to the broadcast."""
    workspace, round = server.workspace, theta.manifest.round
    opener = workspace.agreement.aggregation.key_holder
    assert opener is not None, "somebody opens what is encrypted"
    place, command = workspace.reveal(round, opener), Command("reveal", client=opener, round=round)
    mend = f"carry {workspace.shown(workspace.close(round))} there; {command}; carry its reveal here"
    missing = f"round {round} waits for client {opener} to open the sum", mend
    roster = server.members and server.members.sha256
    if os.path.lexists(place) and read_manifest(place)[0].federation_sha256 != roster:  # from before all made new keys
        raise NotReady(missing[0], where=place, mend=mend)
    reveal = received(place, by=server, stage="reveal", round=round, client=opener, missing=missing)
    if reveal.manifest.parents != {"close": closed.sha256} or OPENED not in reveal.manifest.files:
        message = f"client {opener} opened another sum of round {round} than the one here"
        raise Refused(message, where=place, mend=f"take it out; {command}, there")
    whole = read_adapter(theta, None, workspace.agreement.slm.lora)
    before = part_of(whole, workspace.agreement.sent_in(round))
    mean = mean_of(reveal, flat(before).size, workspace.agreement.aggregation.max_update_value)
    average = unflat((flat(before) + mean.astype(np.float64)).astype(np.float32), layout_of(before))
    survivors = sorted(number_of(name) for name in closed.manifest.closing or {})
    how = Unmasking(survivors=survivors, revealed=[opener], count=len(survivors))
    return Average(whole | average, parents, unmasking=how)


def mean_of(reveal: Artefact, numbers: int, bound: float) -> np.ndarray:
    """The mean that was opened, float32 [numbers]. Raises Damaged for one that no clients within the bound have."""
    path, manifest = reveal.path / OPENED, reveal.manifest
    mean = read_array(reveal.contents[OPENED], path, name="mean", kind="F32", shape=(numbers,))
    largest = float(np.abs(mean).max(initial=0.0))
    if not largest <= bound * (1 + ckks.TOLERANCE):  # true of NaN too
        message = f"the mean that client {manifest.client} opened holds {largest:.4g}, "
        give_up = Command("aggregate", round=manifest.round, keep_old=True)
        mend = f"ask that client; {give_up} gives the round up"
        raise Damaged(f"{message}aggregation.max_update_value allows {bound:g}", where=path, mend=mend)
    return mean
