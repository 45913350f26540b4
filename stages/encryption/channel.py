"""Encrypted aggregation as a channel: updates travel as ciphertexts, which the server adds and cannot open."""

from __future__ import annotations

from dataclasses import dataclass

from stages.artefacts.average import Arrived, Average
from stages.artefacts.manifest import Manifest
from stages.artefacts.parts import numbers_sent
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import read_sound
from stages.artefacts.sizes import encrypted_bytes
from stages.data.rows import Row
from stages.encryption import sending, summing
from stages.files import reading
from stages.parties import encryption_keys
from stages.parties.names import client as party_of
from stages.parties.party import Party
from stages.runtime.errors import BadNumbers
from stages.runtime.events import Event, Report
from stages.secagg import accepting
from stages.workspace.names import AGREEMENT

ALWAYS = "a round of encrypted aggregation begins with a broadcast"


@dataclass(frozen=True)
class ToServer:
    """The channel as a client has it; see aggregation.channels."""

    party: Party
    report: Report
    done: str = "already trained"  # and maybe still to be sent

    def accept(self, theta: Artefact | None) -> None:
        """As where there are keys. Raises UsageProblem without the library that will encrypt."""
        assert theta, ALWAYS
        encryption_keys.tenseal()
        accepting.accept(self.party, theta, self.report)

    def check(self, theta: Artefact | None, rows: list[Row], again: bool) -> None:
        """Raise for more examples than are agreed on, and for an adapter that is too large for one file."""
        assert theta, ALWAYS
        workspace = self.party.workspace
        numbers = numbers_sent(theta, workspace.agreement)
        if encrypted_bytes(numbers) > reading.LARGEST_ADAPTER_BYTES:
            message = f"{numbers} numbers are more than {reading.LARGEST_ADAPTER_BYTES >> 30} GiB once encrypted"
            mend = 'all parties agree on a smaller slm.lora.r, combine = "freeze-a" or mode = "secure"'
            raise BadNumbers(message, where=workspace.root / AGREEMENT, mend=mend)
        budget = workspace.agreement.client_training
        sending.weight_of(workspace, self.party.number, budget.steps_for(len(rows)) * budget.rows_per_step)

    def is_final(self, theta: Artefact | None) -> bool:
        """It can be trained and encrypted again until the server has closed the round over it."""
        return False

    def send(self, theta: Artefact | None, trained: Manifest, again: bool) -> Manifest:
        """Encrypt it, unless this very adapter has been sent."""
        assert theta, ALWAYS
        place = self.party.workspace.client_adapter(trained.round, self.party.number)
        return sending.send(self.party, theta, read_sound(place, by=self.party), self.report)


@dataclass(frozen=True)
class FromClients:
    """The channel as the server has it."""

    party: Party
    report: Report

    def arrived(self, theta: Artefact, again: bool) -> Arrived:
        """Close the round: which updates are added is decided once."""
        closed = summing.close(self.party, theta, self.report)
        for client in self.party.workspace.client_updates(theta.manifest.round):
            if party_of(client) not in closed.manifest.parents:
                words = f"client {client}'s update came after the close: it is left out"
                self.report(Event("warning", words))
        return Arrived(closed.manifest.parents | {"close": closed.sha256}, closed=closed)

    def combine(self, theta: Artefact, arrived: Arrived) -> Average:
        """The mean that was in the sum. Raises NotReady until it has been opened."""
        assert arrived.closed is not None
        return summing.taken_over(self.party, theta, arrived.closed, arrived.parents)
