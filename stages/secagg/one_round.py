"""A round of secure aggregation, as its opening says: who takes part, with which keys."""

from __future__ import annotations

from stages.artefacts.manifest import Opening
from stages.artefacts.reading import Artefact
from stages.parties.one_time_keys import transcript
from stages.runtime.errors import Damaged
from stages.secagg import masking
from stages.workspace.commands import Command


def transcript_of(theta: Artefact) -> str:
    """What all keys of a round hang on, in hexadecimal: a hash of the exact bytes of the broadcast's manifest."""
    return transcript(theta.signed).hex()


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
        again = Command("broadcast", round=theta.manifest.round, overwrite=True)
        mend = f"on the server: {again}"
        raise Damaged(message, where=theta.path, mend=mend)
    return opening
