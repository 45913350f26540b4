"""To whom a party sends what it has made: told where the others are on other machines."""

from __future__ import annotations

from pathlib import Path

from stages.runtime.events import Event, Report
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


def tell(workspace: Workspace, made: Path, pack: Command, report: Report, *, client: int | None) -> None:
    """Say to whom it goes, and which command packs it.

    client: who sends it, to the server; None where it is the server, which sends to the clients. Nothing is said where
    the rows of all whom it is for are here: they are parties of this machine.
    """
    places = [workspace.client_data(k) for k in workspace.clients] if client is None else [workspace.auxiliary_data]
    if workspace.is_simulation or all(place.exists() for place in places):
        return
    to = "the clients" if client is None else "the server"
    report(Event("note", f"{workspace.shown(made)} goes to {to}: carry exchange/ there, or `{pack}`"))
