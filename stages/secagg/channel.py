"""Secure aggregation as a channel: updates travel masked, and the server learns their sum alone."""

from __future__ import annotations

from dataclasses import dataclass

from stages.artefacts.average import Arrived, Average
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import read_sound
from stages.data.rows import Row
from stages.parties.party import Party
from stages.runtime.errors import BadNumbers, Refused
from stages.runtime.events import Event, Report
from stages.secagg import accepting, closing, said, sending, summing
from stages.workspace.commands import Command

ALWAYS = "a round of secure aggregation begins with a broadcast"


@dataclass(frozen=True)
class ToServer:
    """The channel as a client has it; see aggregation.channels."""

    party: Party
    report: Report
    done: str = "already trained"  # and maybe still to be sent

    def accept(self, theta: Artefact | None) -> None:
        """Raises Refused where this client's vault has forgotten what it sent, too."""
        assert theta, ALWAYS
        said.check_known(self.party)
        accepting.accept(self.party, theta, self.report)

    def check(self, theta: Artefact | None, rows: list[Row], again: bool) -> None:
        """Raise for an update that is masked already, and for one of more examples than can be summed."""
        assert theta, ALWAYS
        workspace, client = self.party.workspace, self.party.number
        if again and sending.whole(self.party, theta):
            round = theta.manifest.round
            message = f"client {client} has sent its masked update of this opening of round {round}"
            mend = f"on the server, open the round again: {Command('broadcast', round=round, overwrite=True)}"
            where = workspace.client_update(round, client)
            raise Refused(f"{message}, which cannot be replaced", where=where, mend=mend)
        settings, budget = workspace.agreement.aggregation, workspace.agreement.client_training
        examples, most = budget.steps_for(len(rows)) * budget.rows_per_step, settings.max_examples or 0
        if settings.weighting == "samples" and examples > most:
            message = f"client {client} would train on {examples} examples, aggregation.max_examples is {most}"
            mend = f"all parties agree on max_examples = {examples} or more, or on fewer steps"
            raise BadNumbers(message, where=workspace.client_data(client), mend=mend)

    def is_final(self, theta: Artefact | None) -> bool:
        """Once it is masked."""
        assert theta, ALWAYS
        return sending.is_made(self.party, theta)

    def send(self, theta: Artefact | None, trained: Manifest, again: bool) -> Manifest:
        """Mask it, once for every opening of a round."""
        assert theta, ALWAYS
        place = self.party.workspace.client_adapter(trained.round, self.party.number)
        adapter = read_sound(place, by=self.party)
        return sending.send(self.party, theta, adapter, overwrite=again, report=self.report)


@dataclass(frozen=True)
class FromClients:
    """The channel as the server has it."""

    party: Party
    report: Report

    def arrived(self, theta: Artefact, again: bool) -> Arrived:
        """Close the round: whose updates are summed is decided once."""
        closed = closing.close(self.party, theta, self.report, overwrite=again)
        for client in closing.late(self.party.workspace, closed):
            words = f"client {client}'s update came after the close: it is left out, and stays masked"
            self.report(Event("warning", words))
        return Arrived(closed.manifest.parents | {"close": closed.sha256}, closed=closed)

    def combine(self, theta: Artefact, arrived: Arrived) -> Average:
        """The survivors' mean, and nothing of each of them. Raises as open_sum does."""
        assert arrived.closed is not None
        found = summing.open_sum(self.party, theta, arrived.closed, self.report)
        for warning in found.warnings:
            self.report(Event("warning", warning))
        return Average(found.average, arrived.parents, unmasking=found.unmasking)
