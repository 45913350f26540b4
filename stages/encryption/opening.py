"""One client opens the sum of a round: once, and never the update of one client alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from stages.artefacts.arrays import array_bytes
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.parts import numbers_sent
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.artefacts.sizes import ciphertexts_of
from stages.encryption import ckks
from stages.encryption.ciphertext_files import read
from stages.encryption.sending import precision_of
from stages.encryption.summing import add, head_of
from stages.parties import encryption_keys
from stages.parties.memory import Kept, recall, remember
from stages.parties.names import client as party_of
from stages.parties.names import listed, number_of
from stages.parties.party import Party
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Refused, UsageProblem
from stages.runtime.events import Event, Report
from stages.secagg import accepting
from stages.workspace.commands import Command
from stages.workspace.names import ENCRYPTED, OPENED


def reveal(party: Party, theta: Artefact, report: Report) -> Manifest:
    """Open the sum that the server has closed the round with, and tell its mean; one sum of a round, for ever.

    Raises UsageProblem at a client without the key, NotReady before the round is closed; Refused for a sum of one
    client, or of fewer than are agreed on, for a second sum of the round and for one that is not that of the updates
    here; Damaged for one that the clients it names cannot have made.
    """
    workspace, client, round = party.workspace, party.number, theta.manifest.round
    if client != (opener := workspace.agreement.aggregation.key_holder):
        message = f"client {client} has no key to open a sum with; client {opener} has"
        raise UsageProblem(message, mend=Command("reveal", client=opener, round=round))
    accepting.accept(party, theta, report)
    close = workspace.close(round)
    mend = f"on the server: {Command('aggregate', round=round)}; then carry {workspace.shown(close)} here"
    missing = f"round {round} is not closed yet", mend
    closed = received(close, by=party, stage="close", round=round, missing=missing)
    with party.keys.alone(report):
        clients = _clients_of(party, theta, closed)
        kept = _check_once(party, closed)
        mean = _opened(party, theta, closed, clients, report)
        remember(party.keys, round, kept.model_copy(update={"close_sha256": closed.sha256}))
        words = f"round {round} is closed over {len(clients)} of {len(workspace.clients)} clients"
        report(Event("note", f"{words}; its sum is opened, and no other of this round will be"))
        return publish(
            workspace.reveal(round, client),
            {OPENED: array_bytes("mean", mean)},
            Draft(
                stage="reveal",
                round=round,
                attempt=theta.manifest.attempt,
                parents={"close": closed.sha256},
                base=theta.manifest.base,
                parameters=len(mean),
            ),
            by=party,
        )


_ASK = "open nothing, and ask the server; compare what other clients have"


def _clients_of(party: Party, theta: Artefact, closed: Artefact) -> list[int]:
    """Whose updates a sum is said to hold. Raises Refused unless these are clients of the round, and enough."""
    workspace, round, said = party.workspace, theta.manifest.round, closed.manifest
    clients = sorted(number_of(name) for name in said.closing or {})
    if said.parents.keys() != {"broadcast", *(said.closing or {})} or said.parents["broadcast"] != theta.sha256:
        message = f"the sum of round {round} is of another broadcast than the one here, or does not say of whom"
        raise Refused(message, where=closed.path, mend=f"copy both again; if it stays, {_ASK}")
    if strangers := [k for k in clients if k not in workspace.clients]:
        raise Refused(f"the sum of round {round} holds {listed(strangers)}", where=closed.path, mend=_ASK)
    least = workspace.agreement.aggregation.min_clients or len(workspace.clients)
    if len(clients) < max(least, 2):
        message = f"the sum of round {round} is of {listed(clients) if clients else 'nobody'}"
        message += ": to open it is to see that update" if len(clients) == 1 else f", it must be of {least} or more"
        raise Refused(message, where=closed.path, mend=_ASK)
    return clients


def _check_once(party: Party, closed: Artefact) -> Kept:
    """Raise Refused where another sum of this round was opened, or where another update of this client is in it."""
    round, client = closed.manifest.round, party.number
    kept = recall(party.keys, round)
    assert kept is not None, "the broadcast was accepted a moment ago"
    if kept.close_sha256 not in (None, closed.sha256):
        message = (
            f"this is a second sum of round {round}: sha256 {closed.sha256}; client {client} opened "
            f"{kept.close_sha256}, and opens one for ever"
        )
        mend = "ask the server why it closed the round twice: two sums could show one client's update"
        raise Refused(message, where=closed.path, mend=mend)
    own = (closed.manifest.closing or {}).get(party.name)
    if own is not None and own != kept.y_sha256:
        message = f"the server added another update of client {client} than the one encrypted here"
        update = party.workspace.shown(party.workspace.client_update(round, client))
        raise Refused(message, where=closed.path, mend=f"carry {update} there again; the server opens the round again")
    return kept


def _opened(party: Party, theta: Artefact, closed: Artefact, clients: list[int], report: Report) -> np.ndarray:
    """The mean that is in a sum, float32, as it may be told."""
    workspace, round = party.workspace, closed.manifest.round
    numbers, bound = numbers_sent(theta, workspace.agreement), workspace.agreement.aggregation.max_update_value
    precision, path = precision_of(workspace, numbers), closed.path / ENCRYPTED
    try:
        ciphertexts = read(closed.contents.get(ENCRYPTED, b""), path, ciphertexts_of(numbers))
        total = ckks.add([], ciphertexts, encryption_keys.secret_key(party.keys), precision)
        _check_is_theirs(party, theta, closed, total, report)
        seed = encryption_keys.seed_of(party.keys, closed.sha256)
        return ckks.opened(ckks.decrypted(total), len(clients), bound, seed, precision).mean
    except (Damaged, BadNumbers) as problem:
        again, give_up = Command("broadcast", round=round, overwrite=True), Command("aggregate", round=round)
        problem.where = problem.where or path
        anew = f"on the server: {again}, for which all train again; or {give_up.also(keep_old=True)}"
        problem.mend = f"{problem.mend}; {anew}" if problem.mend else anew
        raise


def _check_is_theirs(party: Party, theta: Artefact, closed: Artefact, total: list[Any], report: Report) -> None:
    """Raise Refused for a sum that is not that of the updates it names, where these are here."""
    try:
        clients = sorted(number_of(name) for name in closed.manifest.closing or {})
        heads = {k: head_of(party, theta, k, only=[]) for k in clients}
        found = {party_of(k): head.sha256 for k, head in heads.items()}
        is_theirs = found.items() <= closed.manifest.parents.items()
        is_theirs = is_theirs and ckks.same(total, add(party, theta, heads, report))
    except NotReady:
        words = "the updates are not all here, so that the server alone knows whether the sum is theirs"
        report(Event("note", words))
        return
    if not is_theirs:
        message = f"the sum of round {closed.manifest.round} is not that of the updates of {listed(clients)} here"
        raise Refused(message, where=closed.path, mend=_ASK)
