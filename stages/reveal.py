"""reveal, a client's second step of a round where updates are hidden: what shows their sum, and never one of them.

Reads exchange/round-t/{broadcast,close}. Writes exchange/round-t/reveal-k: in secure mode by each client, sealed to the
server; in encrypted mode by the one that has the key, readable.
"""

from __future__ import annotations

from stages.artefacts.manifest import Manifest
from stages.artefacts.receiving import received
from stages.parties.party import Party
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace import addressees
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace


def reveal(workspace: Workspace, *, client: int, round: int, report: Report = ignore) -> Manifest:
    """Reveal once, for the one list of clients that the server has closed the round with. Returns the manifest.

    The same command again sends the same bytes again. Raises as secagg.revealing and encryption.opening do.
    """
    workspace.check_round(round)
    workspace.check_client(client)
    report(Event("stage", f"reveal, round {round}, client {client}"))
    if not workspace.agreement.aggregation.is_hidden:
        mend = 'leave it out; aggregation.mode = "secure" and "encrypted" are where clients reveal'
        raise UsageProblem(
            "there is nothing to reveal: updates are sent readable", where=workspace.root / AGREEMENT, mend=mend
        )
    from stages.encryption import opening
    from stages.parties import roster
    from stages.secagg import revealing

    source = workspace.broadcast(round)
    missing = f"the broadcast of round {round} is not there", "carry exchange/ here from the server"
    party = Party.client(workspace, client)
    theta = received(source, by=party, stage="broadcast", round=round, missing=missing)
    is_secure = workspace.agreement.aggregation.is_secure
    manifest = (revealing.reveal if is_secure else opening.reveal)(party, theta, report)
    code = roster.spoken(manifest.parents["close"], 32)
    same = ", the same at all clients" if is_secure else ""
    report(Event("note", f"revealed, for good; the code of the close{same}: {code}"))
    pack = Command("pack", client=client, round=round)
    addressees.tell(workspace, workspace.reveal(round, client), pack, report, client=client)
    return manifest
