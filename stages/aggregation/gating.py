"""The gate as it is asked for: by how much an average may raise the loss, on which rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.artefacts.average import Average
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.files import reading
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Report
from stages.workspace.averaging import BLIND
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.aggregation.gate import Verdict
    from stages.models.loading import Models


@dataclass(frozen=True)
class Gate:
    """What to ask of an average before it is taken: by how much it may raise the loss on these rows."""

    amount: float
    rows: list[Row]
    data_sha256: str

    def verdict(
        self, workspace: Workspace, theta: Artefact, average: Average, models: Models | None, report: Report
    ) -> Verdict:
        """Put an average to the gate; the SLM is loaded here."""
        from stages.aggregation.gate import gate
        from stages.models.loading import Models

        models = models or Models(workspace)
        return gate(workspace, theta, average, self.rows, amount=self.amount, models=models, report=report)


def check_same_gate(workspace: Workspace, gate: Gate, done: Manifest, log: Path, place: Path) -> None:
    """Raise Refused for an aggregate that passed another gate. log: that of the command which made it."""
    logged = reading.logged_inputs(log).get("held-out")
    changed = ["the gate"] if done.metrics.get("gate") != gate.amount else []
    changed += ["the held-out rows"] if logged not in (None, gate.data_sha256) else []
    if changed:
        message = f"{workspace.shown(place)} was made otherwise; changed since: {', '.join(changed)}"
        raise Refused(message, where=place, mend="give the command again with --overwrite to replace it")


def gate_of(workspace: Workspace, amount: float | None) -> Gate | None:
    """The gate that is asked for, if any, with its rows."""
    amount = workspace.agreement.aggregation.gate if amount is None else amount
    if amount is None:
        return None
    if not 0 <= amount < math.inf:
        raise UsageProblem(f"a gate of {amount} is no amount of loss", mend="give a number such as --gate 0.1")
    if workspace.agreement.server_has_no_b:
        raise UsageProblem(f"a gate looks at the server's SLM: {BLIND}", mend="give no --gate")
    mend = f"put JSONL rows there that nobody trains on, or set data.held_out_share and `{Command('prepare')}`"
    require(workspace.held_out_data, "the gate needs held-out rows, and there are none", mend)
    return Gate(amount, *read_rows(workspace.held_out_data))
