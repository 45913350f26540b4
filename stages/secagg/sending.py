"""A client's two messages in secure mode: its masked update, and later the reveal that helps to unmask the sum.

What the client must remember to stay safe is in its vault before anything is published: at every masking a new secret
of its own, and, for ever, the one list of survivors that it has revealed for.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stages.artefacts.adapter_files import layout_of, read_adapter
from stages.artefacts.manifest import (
    LEVELS,
    Artefact,
    Manifest,
    Masking,
    Opening,
    inbox,
    publish,
    read_sound,
    received,
    spare_strangers,
)
from stages.files import writing
from stages.parties import roster
from stages.parties.vault import Vault
from stages.parties.vault import client as party_of
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.secagg import fixed_point, masking, reveals
from stages.secagg.openings import Kept, recall, remember, transcript_of
from stages.secagg.said import check_known
from stages.secagg.shamir import SHARE_BYTES
from stages.secagg.vectors import array_bytes, read_array
from stages.workspace.paths import (
    MANIFEST,
    MASKED_UPDATE,
    SEALED_REVEAL,
    SEALED_SHARES,
    SIGNATURE,
    Workspace,
    require,
)


def round_of(theta: Artefact) -> masking.Round:
    """What the masks of a broadcast's round hang on."""
    opening = opening_of(theta)
    keys = {client: bytes.fromhex(key) for client, key in zip(opening.clients, opening.prekeys, strict=True)}
    return masking.Round(bytes.fromhex(transcript_of(theta)), keys)


def opening_of(theta: Artefact) -> Opening:
    """What a broadcast opens. Raises Damaged if it opens nothing."""
    opening = theta.manifest.opening
    if opening is None or len(opening.clients) != len(opening.prekeys):
        message = "the broadcast opens no round of secure aggregation"
        mend = f"on the server: fedcollm broadcast --round {theta.manifest.round} --overwrite"
        raise Damaged(message, where=theta.path, mend=mend)
    return opening


def sent(workspace: Workspace, theta: Artefact, client: int) -> Manifest | None:
    """The client's masked update of this opening of the round, if it has been published."""
    target = workspace.client_update(theta.manifest.round, client)
    kept = recall(Vault.need(workspace, party_of(client)), theta.manifest.round)
    if kept is None or kept.y_sha256 is None or not os.path.lexists(target):
        return None
    manifest = read_sound(target, workspace).manifest
    is_this = manifest.transcript == transcript_of(theta) and manifest.masking is not None
    return manifest if is_this and manifest.masking and manifest.masking.y_sha256 == kept.y_sha256 else None


def is_made(workspace: Workspace, theta: Artefact, client: int) -> bool:
    """Whether the client has masked its update of this opening of the round, be it still there or not."""
    kept = recall(Vault.need(workspace, party_of(client)), theta.manifest.round)
    return kept is not None and kept.broadcast_sha256 == theta.sha256 and kept.y_sha256 is not None


def whole(workspace: Workspace, theta: Artefact, client: int) -> Manifest | None:
    """The same, and None for a damaged one."""
    try:
        return sent(workspace, theta, client)
    except (Damaged, NotReady):
        return None


def send(
    workspace: Workspace,
    theta: Artefact,
    trained: Artefact,
    client: int,
    *,
    overwrite: bool = False,
    report: Report = ignore,
) -> Manifest:
    """Mask a trained adapter's change and publish it, once for every opening of a round. Returns its manifest.

    overwrite: whether one that was sent and is damaged is replaced, by the same bytes.
    Publishes nothing and raises BadNumbers for a change beyond aggregation.max_update_value, or that is not finite;
    Refused once the client has revealed for this round, or has taken another attempt at it, and where it has sent what
    its vault does not know.
    """
    vault = Vault.need(workspace, party_of(client))
    check_known(workspace, client)
    with vault.alone(report):
        if done := whole(workspace, theta, client) if overwrite else sent(workspace, theta, client):
            report(Event("note", "already sent"))
            return done
        return _send(workspace, theta, trained, vault, client)


def _send(workspace: Workspace, theta: Artefact, trained: Artefact, vault: Vault, client: int) -> Manifest:
    round = theta.manifest.round
    kept = recall(vault, round)
    if kept and kept.close_sha256:
        message = f"client {client} has revealed for round {round}: it masks no second update for it"
        mend = "the server has the first; put it back here from there if it is missed"
        raise Refused(message, where=workspace.client_update(round, client), mend=mend)
    if kept and kept.broadcast_sha256 != theta.sha256:
        message = f"client {client} has taken another broadcast of round {round} while it trained for this one"
        mend = f"copy the newer broadcast here; fedcollm client-train --client {client} --round {round}"
        raise Refused(message, where=theta.path, mend=mend)
    settings, lora, keys = workspace.agreement.aggregation, workspace.agreement.slm.lora, round_of(theta)
    before = read_adapter(theta, None, lora)
    after = read_adapter(trained, layout_of(before), lora)
    try:
        values = fixed_point.encode(
            fixed_point.flatten(after) - fixed_point.flatten(before),
            bound=settings.max_update_value,
            clients=len(keys.clients),
            examples=trained.manifest.examples if settings.weighting == "samples" else None,
            largest_examples=settings.max_examples or 1,
        )
    except BadNumbers as problem:
        problem.where = trained.path
        raise
    if kept and kept.y_sha256:
        return _send_again(workspace, theta, kept, client)
    slot = opening_of(theta).slot
    secret = _secret(vault, theta, client, farthest=kept.slot if kept else None)  # which was looked at then
    masked = masking.mask(values, keys, client=client, secret=secret)
    kept = Kept(
        attempt=theta.manifest.attempt,
        broadcast_sha256=theta.sha256,
        slot=slot,
        adapter_sha256=trained.sha256,
        y_sha256=masked.y_sha256,
        own_shares=masked.own_shares.tobytes().hex(),
    )
    # Made whole beside the adapter, remembered, then sent: whatever ends in between, the same is sent for ever.
    publish(
        workspace.masked_update(round, client),
        {MASKED_UPDATE: array_bytes("y", masked.y), SEALED_SHARES: array_bytes("s", masked.rows)},
        workspace,
        stage="client-train",
        round=round,
        attempt=theta.manifest.attempt,
        client=client,
        parents={theta.path.name: theta.sha256},
        base=theta.manifest.base,
        parameters=theta.manifest.parameters,
        privacy=trained.manifest.privacy,
        transcript=keys.transcript.hex(),
        masking=Masking(
            y_sha256=masked.y_sha256,
            commit_self=masked.commit_self,
            commit_pairs={party_of(other): commitment for other, commitment in masked.commit_pairs.items()},
        ),
    )
    remember(vault, round, kept)
    return _send_again(workspace, theta, kept, client)


def _send_again(workspace: Workspace, theta: Artefact, kept: Kept, client: int) -> Manifest:
    """Send the masked update of this opening, byte for byte as it was made: a second one is never made."""
    round = theta.manifest.round
    target, own = workspace.client_update(round, client), workspace.masked_update(round, client)
    try:
        made = read_sound(own, workspace)
        signature = writing.read(own / SIGNATURE, limit_bytes=writing.LARGEST_JSON_BYTES)
    except (Damaged, NotReady):
        made = None
    if made is None or made.manifest.masking is None or made.manifest.masking.y_sha256 != kept.y_sha256:
        message = (
            f"client {client} has masked its update of this opening of round {round} before, once and for all, and "
            f"{workspace.shown(target)} is not here whole"
        )
        mend = (
            f"fetch it back from where it was sent; or, on the server: fedcollm broadcast --round {round} --overwrite"
        )
        raise Refused(message, where=target, mend=mend)
    whole = {**made.contents, MANIFEST: made.signed, SIGNATURE: signature}
    writing.publish(target, whole, levels=LEVELS - 1, spares=spare_strangers)
    return made.manifest


def _secret(vault: Vault, theta: Artefact, client: int, farthest: int | None = None) -> X25519PrivateKey:
    """The client's one-time key of a round, which must be the one that the others know."""
    opening = opening_of(theta)
    vault.check_slot(opening.slot, farthest=farthest)
    vault.check_own(opening.slot, opening.prekeys[opening.clients.index(client)])
    return vault.advance(opening.slot, farthest=farthest)


def reveal(workspace: Workspace, theta: Artefact, client: int, report: Report = ignore) -> Manifest:
    """Reveal, to the server, what unmasks the sum of the survivors that it has named; once for every round.

    Raises NotReady before the round is closed; Refused for a close that leaves this client's update out, lists another,
    has too few survivors, or is a second one.
    """
    round, vault = theta.manifest.round, Vault.need(workspace, party_of(client))
    check_known(workspace, client)
    closed, survivors = _closed(workspace, theta, client)
    with vault.alone(report):
        sealed = _once(workspace, theta, closed, survivors, vault, client)
        shutil.rmtree(workspace.masked_update(round, client), ignore_errors=True)  # the server has it
        opened = len(opening_of(theta).clients)
        words = f"round {round} is closed over {len(survivors)} of {opened} clients, {len(workspace.clients)} in all"
        report(Event("note", words))
        return publish(
            workspace.reveal(round, client),
            {SEALED_REVEAL: sealed},
            workspace,
            stage="reveal",
            round=round,
            attempt=theta.manifest.attempt,
            client=client,
            parents={"close": closed.sha256},
            base=theta.manifest.base,
            parameters=0,
            transcript=transcript_of(theta),
        )


def _once(
    workspace: Workspace, theta: Artefact, closed: Artefact, survivors: dict[int, str], vault: Vault, client: int
) -> bytes:
    """The reveal for the first close that this client sees, remembered before it is told; the same bytes ever after."""
    round = theta.manifest.round
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
        raise Refused(message, where=closed.path, mend=f"carry exchange/round-{round:04d}/client-{client} there again")
    if kept.reveal is None:
        sealed = _sealed(workspace, theta, closed, survivors, kept, vault, client)
        kept = kept.model_copy(update={"close_sha256": closed.sha256, "reveal": sealed.hex()})
        remember(vault, round, kept)
    assert kept.reveal is not None
    return bytes.fromhex(kept.reveal)


def _closed(workspace: Workspace, theta: Artefact, client: int) -> tuple[Artefact, dict[int, str]]:
    """The server's close, as far as this client reads it, and the digest of each survivor's masked update."""
    round = theta.manifest.round
    place = workspace.close(round)
    mend = f"on the server: fedcollm aggregate --round {round}; then carry {workspace.shown(place)} here"
    require(place, f"round {round} is not closed yet", mend)
    reader = party_of(client)
    closed = received(place, workspace, reader=reader, stage="close", round=round, only=[inbox(client)])
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


def _sealed(
    workspace: Workspace,
    theta: Artefact,
    closed: Artefact,
    survivors: dict[int, str],
    kept: Kept,
    vault: Vault,
    client: int,
) -> bytes:
    keys, secret = round_of(theta), _secret(vault, theta, client)
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
                raise vault.damaged(f"round-{theta.manifest.round:04d}.json")
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
    members = roster.pinned(workspace, party_of(client))
    assert members is not None
    return reveals.seal_reveal(revealed, client=client, server=members.server_box, close_sha256=closed.sha256)
