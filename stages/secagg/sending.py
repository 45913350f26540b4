"""A client's two messages in secure mode: its masked update, and later the reveal that helps to unmask the sum.

What the client must remember to stay safe is in its vault before anything is published: at every masking a new secret
of its own, and, for ever, the one list of survivors that it has revealed for.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stages.artefacts.adapter_files import flat
from stages.artefacts.arrays import array_bytes
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest, Masking
from stages.artefacts.parts import cut, numbers_sent
from stages.artefacts.publishing import publish, spare_strangers
from stages.artefacts.reading import LEVELS, Artefact
from stages.artefacts.receiving import read_sound
from stages.files import reading, writing
from stages.parties.memory import Kept, recall, remember
from stages.parties.names import client as party_of
from stages.parties.party import Party
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.secagg import fixed_point, masking
from stages.secagg.one_round import opening_of, round_of, transcript_of
from stages.secagg.said import check_known
from stages.workspace import addressees
from stages.workspace.commands import Command
from stages.workspace.names import MANIFEST, MASKED_UPDATE, SEALED_SHARES, SIGNATURE


def sent(party: Party, theta: Artefact) -> Manifest | None:
    """The client's masked update of this opening of the round, if it has been published."""
    target = party.workspace.client_update(theta.manifest.round, party.number)
    kept = recall(party.keys, theta.manifest.round)
    if kept is None or kept.y_sha256 is None or not os.path.lexists(target):
        return None
    manifest = read_sound(target, by=party).manifest
    is_this = manifest.transcript == transcript_of(theta) and manifest.masking is not None
    return manifest if is_this and manifest.masking and manifest.masking.y_sha256 == kept.y_sha256 else None


def is_made(party: Party, theta: Artefact) -> bool:
    """Whether the client has masked its update of this opening of the round, be it still there or not."""
    kept = recall(party.keys, theta.manifest.round)
    return kept is not None and kept.broadcast_sha256 == theta.sha256 and kept.y_sha256 is not None


def whole(party: Party, theta: Artefact) -> Manifest | None:
    """The same, and None for a damaged one."""
    try:
        return sent(party, theta)
    except (Damaged, NotReady):
        return None


def send(
    party: Party, theta: Artefact, trained: Artefact, *, overwrite: bool = False, report: Report = ignore
) -> Manifest:
    """Mask a trained adapter's change and publish it, once for every opening of a round. Returns its manifest.

    overwrite: whether one that was sent and is damaged is replaced, by the same bytes.
    Publishes nothing and raises BadNumbers for a change beyond aggregation.max_update_value, or that is not finite;
    Refused once the client has revealed for this round, or has taken another attempt at it, and where it has sent what
    its vault does not know.
    """
    vault = party.keys
    check_known(party)
    with vault.alone(report):
        if done := whole(party, theta) if overwrite else sent(party, theta):
            report(Event("note", "already sent"))
            return done
        made = _send(party, theta, trained)
    pack = Command("pack", client=party.number, round=made.round)
    place = party.workspace.client_update(made.round, party.number)
    addressees.tell(party.workspace, place, pack, report, client=party.number)
    return made


def _send(party: Party, theta: Artefact, trained: Artefact) -> Manifest:
    kept = recall(party.keys, theta.manifest.round)
    _check_is_this_round_s(party, theta, kept)
    values = _encoded(party, theta, trained)
    if kept is None or kept.y_sha256 is None:
        kept = _mask(party, theta, trained, values, farthest=kept.slot if kept else None)
    return _send_again(party, theta, kept)


def _check_is_this_round_s(party: Party, theta: Artefact, kept: Kept | None) -> None:
    """Raise Refused where the client has revealed for this round, or has taken another broadcast of it."""
    workspace, client, round = party.workspace, party.number, theta.manifest.round
    if kept and kept.close_sha256:
        message = f"client {client} has revealed for round {round}: it masks no second update for it"
        mend = "the server has the first; put it back here from there if it is missed"
        raise Refused(message, where=workspace.client_update(round, client), mend=mend)
    if kept and kept.broadcast_sha256 != theta.sha256:
        message = f"client {client} has taken another broadcast of round {round} while it trained for this one"
        again = Command("client-train", client=client, round=round)
        raise Refused(message, where=theta.path, mend=f"copy the newer broadcast here; {again}")


def _encoded(party: Party, theta: Artefact, trained: Artefact) -> np.ndarray:
    """The update in the ring, as fixed_point.encode has it. Raises BadNumbers for one that is too large for it."""
    settings = party.workspace.agreement.aggregation
    after, before = cut(theta, trained, party.workspace.agreement)
    try:
        return fixed_point.encode(
            flat(after) - flat(before),
            bound=settings.max_update_value,
            clients=len(round_of(theta).clients),
            examples=trained.manifest.examples if settings.weighting == "samples" else None,
            largest_examples=settings.max_examples or 1,
        )
    except BadNumbers as problem:
        problem.where = trained.path
        raise


def _mask(party: Party, theta: Artefact, trained: Artefact, values: np.ndarray, *, farthest: int | None) -> Kept:
    """Mask the update with a secret of this once. Made whole beside the adapter, then remembered: it is sent for ever.

    farthest: the slot that was looked at when the broadcast was taken.
    """
    keys, round = round_of(theta), theta.manifest.round
    secret = secret_of(party, theta, farthest=farthest)
    masked = masking.mask(values, keys, client=party.number, secret=secret)
    publish(
        party.workspace.masked_update(round, party.number),
        {MASKED_UPDATE: array_bytes("y", masked.y), SEALED_SHARES: array_bytes("s", masked.rows)},
        Draft(
            stage="client-train",
            round=round,
            attempt=theta.manifest.attempt,
            parents={theta.path.name: theta.sha256},
            base=theta.manifest.base,
            parameters=numbers_sent(theta, party.workspace.agreement),
            privacy=trained.manifest.privacy,
            transcript=keys.transcript.hex(),
            masking=Masking(
                y_sha256=masked.y_sha256,
                commit_self=masked.commit_self,
                commit_pairs={party_of(other): commitment for other, commitment in masked.commit_pairs.items()},
            ),
        ),
        by=party,
    )
    kept = Kept(
        attempt=theta.manifest.attempt,
        broadcast_sha256=theta.sha256,
        slot=opening_of(theta).slot,
        adapter_sha256=trained.sha256,
        y_sha256=masked.y_sha256,
        own_shares=masked.own_shares.tobytes().hex(),
    )
    remember(party.keys, round, kept)
    return kept


def _send_again(party: Party, theta: Artefact, kept: Kept) -> Manifest:
    """Send the masked update of this opening, byte for byte as it was made: a second one is never made."""
    workspace, client, round = party.workspace, party.number, theta.manifest.round
    target, own = workspace.client_update(round, client), workspace.masked_update(round, client)
    try:
        made = read_sound(own, by=party)
        signature = reading.read(own / SIGNATURE, limit_bytes=reading.LARGEST_JSON_BYTES)
    except (Damaged, NotReady):
        made = None
    if made is None or made.manifest.masking is None or made.manifest.masking.y_sha256 != kept.y_sha256:
        message = (
            f"client {client} has masked its update of this opening of round {round} before, once and for all, and "
            f"{workspace.shown(target)} is not here whole"
        )
        again = Command("broadcast", round=round, overwrite=True)
        mend = f"fetch it back from where it was sent; or, on the server: {again}"
        raise Refused(message, where=target, mend=mend)
    whole = {**made.contents, MANIFEST: made.signed, SIGNATURE: signature}
    writing.publish(target, whole, levels=LEVELS - 1, spares=spare_strangers)
    return made.manifest


def secret_of(party: Party, theta: Artefact, farthest: int | None = None) -> X25519PrivateKey:
    """The client's one-time key of a round, which must be the one that the others know."""
    opening, vault = opening_of(theta), party.keys
    vault.check_slot(opening.slot, farthest=farthest)
    vault.check_own(opening.slot, opening.prekeys[opening.clients.index(party.number)])
    return vault.advance(opening.slot, farthest=farthest)
