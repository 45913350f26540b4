"""Channels: how updates travel from the clients to the server, and what the server sees of each.

One is chosen for a step, by aggregation.mode (and, at a client, by what it sends of an adapter), and each answers the
same questions. A new mode is a class for each end of it, and a row in each of the two tables.
"""

from __future__ import annotations

from typing import Protocol

from stages.aggregation import partly, plain
from stages.artefacts.average import Arrived, Average
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact
from stages.data.rows import Row
from stages.encryption import channel as encrypted
from stages.parties.party import Party
from stages.runtime.events import Report
from stages.secagg import channel as secure


class ToServer(Protocol):
    """One client's end. theta: the round's broadcast; None where the method has none."""

    @property
    def done(self) -> str:
        """What is said of an adapter that has been trained before."""

    def accept(self, theta: Artefact | None) -> None:
        """Take a broadcast as the round's, and no other from now on. Raises Refused for one that is not as agreed."""

    def check(self, theta: Artefact | None, rows: list[Row], again: bool) -> None:
        """Raise before training if what it gives could not be sent. again: whether an adapter is to be replaced."""

    def is_final(self, theta: Artefact | None) -> bool:
        """Whether an update was made for this broadcast that no other may replace: damaged, it is sent as it was."""

    def send(self, theta: Artefact | None, trained: Manifest, again: bool) -> Manifest:
        """Send what was trained. Returns the manifest of what goes to the server. again: over one that is damaged."""


class FromClients(Protocol):
    """The server's end."""

    def arrived(self, theta: Artefact, again: bool) -> Arrived:
        """The updates of this round that are here. Raises NotReady, naming the absent, where they are too few."""

    def combine(self, theta: Artefact, arrived: Arrived) -> Average:
        """Their average by the agreement's rule. Raises, naming the client, for an update that does not fit."""


TO_SERVER: dict[str, type[plain.ToServer | secure.ToServer | encrypted.ToServer]] = {
    "plain": plain.ToServer,
    "plain, A or B alone": partly.ToServer,
    "secure": secure.ToServer,
    "encrypted": encrypted.ToServer,
}
FROM_CLIENTS: dict[str, type[plain.FromClients | secure.FromClients | encrypted.FromClients]] = {
    "plain": plain.FromClients,
    "secure": secure.FromClients,
    "encrypted": encrypted.FromClients,
}


def to_server(client: Party, report: Report) -> ToServer:
    """A client's end of the agreed channel."""
    agreement = client.workspace.agreement
    is_partly = agreement.sends_part and not agreement.aggregation.is_hidden
    return TO_SERVER["plain, A or B alone" if is_partly else agreement.aggregation.mode](client, report)


def from_clients(server: Party, report: Report) -> FromClients:
    """The server's end of the agreed channel."""
    return FROM_CLIENTS[server.workspace.agreement.aggregation.mode](server, report)
