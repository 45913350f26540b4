"""The part of an adapter that travels where clients send A or B alone, and the part that is each client's own."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from stages.artefacts.adapter_files import Tensors, layout_of, numbers_in, part_of, read_adapter, weights_bytes
from stages.artefacts.lineage import own_parent
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.artefacts.subjects import theta_of
from stages.parties.party import Party
from stages.runtime.errors import Refused
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_WEIGHTS


def cut(theta: Artefact, trained: Artefact, agreement: Agreement) -> tuple[Tensors, Tensors]:
    """What a client sends of its adapter, and the same of the broadcast, whose other matrices it must still have.

    Raises Refused where it has not: nobody would learn of that. What is a client's own may be any.
    """
    factors, lora = agreement.sent_in(theta.manifest.round), agreement.slm.lora
    before = read_adapter(theta, None, lora)
    after = read_adapter(trained, layout_of(before), lora)
    sent, start = part_of(after, factors), part_of(before, factors)
    for name in () if agreement.personal else sorted(before.keys() - start.keys()):
        if not np.array_equal(after[name], before[name]):
            client, round = trained.manifest.client, trained.manifest.round
            combine = agreement.aggregation.combine
            message = f"{name} is not the broadcast's, and with combine = {combine!r} it stays as it is"
            mend = Command("client-train", client=client, round=round, overwrite=True)
            raise Refused(message, where=trained.path, mend=mend)
    return sent, start


class Start(NamedTuple):
    """What a client begins a round with, theta^t.

    theta: the broadcast, or where nothing is averaged its own adapter of the round before; None: it makes one itself.
    own: the adapter of an earlier round whose A, or B, it goes on with where that is personal.
    """

    theta: Artefact | None
    own: Artefact | None = None

    @property
    def parents(self) -> dict[str, str]:
        """What is made from it is made from these."""
        received = {self.theta.path.name: self.theta.sha256} if self.theta else {}
        return received | ({own_parent(self.own.manifest.round): self.own.sha256} if self.own else {})

    @property
    def attempt(self) -> int:
        """At the round."""
        return self.theta.manifest.attempt if self.theta else 0

    def adapter(self, agreement: Agreement) -> Artefact | None:
        """What training begins with: the broadcast, with the client's own A or B in the place of the server's."""
        if self.theta is None or self.own is None:
            return self.theta
        of_all = read_adapter(self.theta, None, agreement.slm.lora)
        its = read_adapter(self.own, layout_of(of_all), agreement.slm.lora)
        weights = weights_bytes(its | part_of(of_all, agreement.sent_in(self.theta.manifest.round)))
        return replace(self.theta, contents=self.theta.contents | {ADAPTER_WEIGHTS: weights})


def start_of(client: Party, round: int) -> Start:
    """What a client begins a round with. Raises as subjects.theta_of does."""
    return Start(theta_of(client, round), _own(client, round))


def _own(client: Party, round: int) -> Artefact | None:
    """The adapter that a client ended its last round with, where a part of it is its own; None if it has none."""
    workspace = client.workspace
    if not workspace.agreement.personal:
        return None
    for before in range(round - 1, 0, -1):
        place = workspace.client_adapter(before, client.number)
        if place.exists():
            return received(place, by=client, stage="client-train", round=before, client=client.number)
    return None


def numbers_sent(theta: Artefact, agreement: Agreement) -> int:
    """How many numbers each client sends of an adapter that began with this broadcast."""
    layout = layout_of(read_adapter(theta, None, agreement.slm.lora))
    return numbers_in(part_of(layout, agreement.sent_in(theta.manifest.round)))
