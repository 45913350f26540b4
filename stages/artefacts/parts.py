"""The part of an adapter that travels where clients train A or B alone: cut out by whoever sends, told to be so."""

from __future__ import annotations

import math

import numpy as np

from stages.artefacts.adapter_files import Tensors, layout_of, part_of, read_adapter
from stages.artefacts.reading import Artefact
from stages.runtime.errors import Refused
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command


def cut(theta: Artefact, trained: Artefact, agreement: Agreement) -> tuple[Tensors, Tensors]:
    """What a client sends of its adapter, and the same of the broadcast, whose other matrices it must still have.

    Raises Refused where it has not: nobody would learn of that.
    """
    factors, lora = agreement.sent_in(theta.manifest.round), agreement.slm.lora
    before = read_adapter(theta, None, lora)
    after = read_adapter(trained, layout_of(before), lora)
    sent, start = part_of(after, factors), part_of(before, factors)
    for name in sorted(before.keys() - start.keys()):
        if not np.array_equal(after[name], before[name]):
            client, round = trained.manifest.client, trained.manifest.round
            combine = agreement.aggregation.combine
            message = f"{name} is not the broadcast's, and with combine = {combine!r} it stays as it is"
            mend = Command("client-train", client=client, round=round, overwrite=True)
            raise Refused(message, where=trained.path, mend=mend)
    return sent, start


def numbers_sent(theta: Artefact, agreement: Agreement) -> int:
    """How many numbers each client sends of an adapter that began with this broadcast."""
    factors = agreement.sent_in(theta.manifest.round)
    if factors == "AB":
        return theta.manifest.parameters
    sent = part_of(layout_of(read_adapter(theta, None, agreement.slm.lora)), factors)
    return sum(map(math.prod, sent.values()))
