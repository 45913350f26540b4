"""reveal, a client's second step of a round in secure mode: what unmasks the sum, and never one client's update.

Reads exchange/round-t/{broadcast,close}. Writes exchange/round-t/reveal-k, sealed to the server.
"""

from __future__ import annotations

from stages.artefacts.manifest import Manifest
from stages.artefacts.receiving import received
from stages.parties.names import client as party_of
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace, require


def reveal(workspace: Workspace, *, client: int, round: int, report: Report = ignore) -> Manifest:
    """Reveal once, for the one list of survivors that the server has closed the round with. Returns the manifest.

    The same command again sends the same bytes again. Raises as uploads.reveal does.
    """
    workspace.check_round(round)
    workspace.check_client(client)
    report(Event("stage", f"reveal, round {round}, client {client}"))
    if not workspace.agreement.aggregation.is_secure:
        mend = 'leave it out; aggregation.mode = "secure" is where clients reveal'
        raise UsageProblem(
            "there is nothing to reveal: updates are sent readable", where=workspace.root / AGREEMENT, mend=mend
        )
    from stages.parties import roster
    from stages.secagg import revealing

    source = workspace.broadcast(round)
    require(source, f"the broadcast of round {round} is not there", "carry exchange/ here from the server")
    theta = received(source, workspace, reader=party_of(client), stage="broadcast", round=round)
    manifest = revealing.reveal(workspace, theta, client, report)
    code = roster.spoken(manifest.parents["close"], 32)
    report(Event("note", f"revealed, for good; the code of the close, the same at all clients: {code}"))
    return manifest
