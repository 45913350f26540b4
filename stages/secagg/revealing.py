"""A client reveals shares of its peers' secrets: once in a round, for one list of survivors."""

from __future__ import annotations

import shutil

import numpy as np

from stages.artefacts.arrays import read_array
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact, inbox
from stages.artefacts.receiving import received
from stages.artefacts.sizes import SHARE_BYTES
from stages.parties.memory import Kept, recall, remember
from stages.parties.names import client as party_of
from stages.parties.party import Party
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.secagg import masking, reveals
from stages.secagg.one_round import opening_of, round_of, transcript_of
from stages.secagg.said import check_known
from stages.secagg.sending import secret_of
from stages.workspace.commands import Command
from stages.workspace.names import SEALED_REVEAL, round_name


def reveal(party: Party, theta: Artefact, report: Report = ignore) -> Manifest:
    """Reveal, to the server, what unmasks the sum of the survivors that it has named; once for every round.

    Raises NotReady before the round is closed; Refused for a close that leaves this client's update out, lists another,
    has too few survivors, or is a second one.
    """
    workspace, client, round, vault = party.workspace, party.number, theta.manifest.round, party.keys
    check_known(party)
    closed, survivors = _closed(party, theta)
    with vault.alone(report):
        sealed = _once(party, theta, closed, survivors)
        shutil.rmtree(workspace.masked_update(round, client), ignore_errors=True)  # the server has it
        opened = len(opening_of(theta).clients)
        words = f"round {round} is closed over {len(survivors)} of {opened} clients, {len(workspace.clients)} in all"
        report(Event("note", words))
        return publish(
            workspace.reveal(round, client),
            {SEALED_REVEAL: sealed},
            Draft(
                stage="reveal",
                round=round,
                attempt=theta.manifest.attempt,
                parents={"close": closed.sha256},
                base=theta.manifest.base,
                parameters=0,
                transcript=transcript_of(theta),
            ),
            by=party,
        )


def _once(party: Party, theta: Artefact, closed: Artefact, survivors: dict[int, str]) -> bytes:
    """The reveal for the first close that this client sees, remembered before it is told; the same bytes ever after."""
    workspace, client, round, vault = party.workspace, party.number, theta.manifest.round, party.keys
    kept = recall(vault, round)
    if kept is None or kept.own_shares is None or kept.broadcast_sha256 != theta.sha256:
        mend = f"the round goes on without client {client}, if enough others reveal"
        raise Refused(f"client {client} has masked no update of this round here", where=vault.root, mend=mend)
    if kept.close_sha256 not in (None, closed.sha256):
        message = (
            f"this is a second close of round {round}: sha256 {closed.sha256}; client {client} revealed for "
            f"{kept.close_sha256}, and reveals once for ever"
        )
        mend = "ask the server why it closed the round twice: two sums could show one client's update"
        raise Refused(message, where=closed.path, mend=mend)
    if survivors[client] != kept.y_sha256:
        message = f"the server lists another update of client {client} than the one masked here"
        update = workspace.shown(workspace.client_update(round, client))
        raise Refused(message, where=closed.path, mend=f"carry {update} there again")
    if kept.reveal is None:
        sealed = _sealed(party, theta, closed, survivors, kept)
        kept = kept.model_copy(update={"close_sha256": closed.sha256, "reveal": sealed.hex()})
        remember(vault, round, kept)
    assert kept.reveal is not None
    return bytes.fromhex(kept.reveal)


def _closed(party: Party, theta: Artefact) -> tuple[Artefact, dict[int, str]]:
    """The server's close, as far as this client reads it, and the digest of each survivor's masked update."""
    workspace, client, round = party.workspace, party.number, theta.manifest.round
    place = workspace.close(round)
    mend = f"on the server: {Command('aggregate', round=round)}; then carry {workspace.shown(place)} here"
    missing = f"round {round} is not closed yet", mend
    try:
        closed = received(place, by=party, stage="close", round=round, missing=missing, only=[inbox(client)])
    except NotReady as problem:
        if inbox(client) in problem.message:  # what is packed for another client has all but this
            pack = Command("pack", server=True, round=round, to=client)
            problem.mend = f"{problem.mend}; or it was packed for another client: on the server: {pack}"
        raise
    survivors = survivors_of(closed, theta, client)
    least = workspace.agreement.quorum(len(opening_of(theta).clients))
    if len(survivors) < least:
        message = (
            f"round {round} is closed over {len(survivors)} of {len(workspace.clients)} clients; by the agreement its "
            f"sum is of {least} or more"
        )
        raise Refused(message, where=closed.path, mend=_ASK)
    return closed, survivors


_ASK = "reveal nothing, and ask the server; compare what other clients have"


def survivors_of(closed: Artefact, theta: Artefact, client: int | None) -> dict[int, str]:
    """The digest of the masked update of each client that a close lists. Raises Refused unless it is a legal list."""
    round, clients = theta.manifest.round, opening_of(theta).clients
    listed = closed.manifest.closing or {}
    survivors = {k: listed[party_of(k)] for k in clients if party_of(k) in listed}
    if closed.manifest.transcript != transcript_of(theta) or closed.manifest.parents.get("broadcast") != theta.sha256:
        message = f"the close of round {round} is of another opening of the round than the broadcast here"
        raise Refused(message, where=closed.path, mend="copy both again from the server")
    if len(survivors) != len(listed):
        unknown = ", ".join(sorted(listed.keys() - {party_of(k) for k in clients}))[:80]
        message = f"the close of round {round} lists {unknown}, which the round does not have"
        raise Refused(message, where=closed.path, mend=_ASK)
    try:
        reveals.check_survivors(clients, list(survivors))
    except Refused as problem:
        problem.where, problem.mend = closed.path, _ASK
        raise
    if client is not None and client not in survivors:
        message = f"the close of round {round} leaves client {client} out: there is nothing of it to unmask"
        raise Refused(
            message, where=closed.path, mend="its update came too late, or did not arrive; go on with the next round"
        )
    return survivors


def _sealed(party: Party, theta: Artefact, closed: Artefact, survivors: dict[int, str], kept: Kept) -> bytes:
    client, keys, secret = party.number, round_of(theta), secret_of(party, theta)
    path = closed.path / inbox(client)
    width = masking.sealed_row_bytes(len(keys.clients))
    shape = (len(survivors), width)
    if path.name not in closed.contents:
        message = f"the close holds no shares for client {client}, whose update it lists"
        raise Damaged(message, where=closed.path, mend="copy it again from the server")
    rows = read_array(closed.contents[path.name], path, name="s", kind="U8", shape=shape)
    assert kept.own_shares is not None
    shares: dict[int, np.ndarray] = {}
    for row, (dealer, y_sha256) in zip(rows, survivors.items(), strict=True):
        if dealer == client:
            own = np.frombuffer(bytes.fromhex(kept.own_shares), np.uint8)
            if own.size != len(keys.clients) * SHARE_BYTES:
                raise party.keys.damaged(f"{round_name(theta.manifest.round)}.json")
            shares[dealer] = own.reshape(-1, SHARE_BYTES)
        else:
            try:
                shares[dealer] = masking.open_row(
                    row, keys, dealer=dealer, holder=client, secret=secret, y_sha256=y_sha256
                )
            except Damaged as problem:
                mend = f"tell the server: client {dealer}, or the server, altered them; the round goes on without you"
                problem.where, problem.mend = path, mend
                raise
    revealed = reveals.reveal_shares(shares, client=client, clients=keys.clients, survivors=list(survivors))
    assert party.members is not None
    return reveals.seal_reveal(revealed, client=client, server=party.members.server_box, close_sha256=closed.sha256)
