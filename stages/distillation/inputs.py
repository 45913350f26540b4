"""What a co-distillation starts from: the aggregate, the LLM's adapter of the round before, and the auxiliary rows."""

from __future__ import annotations

from dataclasses import dataclass

from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.data.spacing import warn_of_spacing
from stages.parties.party import Party
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report
from stages.workspace.commands import Command
from stages.workspace.names import THETA_FILES
from stages.workspace.paths import Workspace, require
from stages.workspace.settings import Role

OTHER: dict[Role, Role] = {"slm": "llm", "llm": "slm"}


@dataclass(frozen=True)
class Inputs:
    """What one run of the stage starts from. omega is None in round 1: the LLM's adapter is made fresh."""

    theta: Artefact
    omega: Artefact | None
    rows: list[Row]
    data_sha256: str

    @property
    def begun_with(self) -> dict[str, str]:
        """The digests of the data and of what training begins with."""
        return {"data": self.data_sha256, **self.parents}

    @property
    def parents(self) -> dict[str, str]:
        """The sha256 of each manifest that it starts from, by name."""
        return {"aggregate": self.theta.sha256} | self.parents_of("llm")

    def parents_of(self, role: Role) -> dict[str, str]:
        """The adapter that this model starts from."""
        if role == "slm":
            return {"aggregate": self.theta.sha256}
        return {"llm": self.omega.sha256} if self.omega else {}


def read_inputs(server: Party, round: int, report: Report) -> Inputs:
    """All of it: rows, theta and omega."""
    rows, data_sha256 = read_auxiliary(server.workspace, report)
    return Inputs(theta_of(server, round), omega_of(server, round), rows, data_sha256)


def read_auxiliary(workspace: Workspace, report: Report) -> tuple[list[Row], str]:
    """The auxiliary rows and their digest."""
    data = workspace.auxiliary_data
    require(data, "the server has no auxiliary data", f"put JSONL rows there, or make them with `{Command('prepare')}`")
    rows, data_sha256 = read_rows(data, unlabelled=True)
    warn_of_spacing(rows, report)
    _tell_of_unlabelled(workspace, rows, report)
    return rows, data_sha256


def theta_of(server: Party, round: int) -> Artefact:
    """What the SLM starts from."""
    source = server.workspace.aggregate(round)
    missing = f"the aggregate of round {round} is not there", Command("aggregate", round=round)
    return received(source, by=server, stage="aggregate", round=round, missing=missing, only=THETA_FILES)


def omega_of(server: Party, round: int) -> Artefact | None:
    """What the LLM starts from; None in round 1."""
    if round == 1:
        return None
    earlier = server.workspace.llm(round - 1)
    missing = f"the LLM's adapter of round {round - 1} is not there", Command("co-distill", round=round - 1)
    return received(earlier, by=server, stage="co-distill", round=round - 1, missing=missing)


def _tell_of_unlabelled(workspace: Workspace, rows: list[Row], report: Report) -> None:
    """Tell how many rows only distillation learns from. Raises UsageProblem if that leaves a model without a loss."""
    unlabelled = sum(row.completion is None for row in rows)
    settings = workspace.agreement.distillation
    if unlabelled and settings.select == "min-ce":
        words = f"{unlabelled} of {len(rows)} auxiliary rows are unlabelled and teach nothing"
        report(Event("warning", f"{words}: by distillation.select, a model teaches rows whose answer it knows better"))
    elif unlabelled:
        report(Event("note", f"{unlabelled} of {len(rows)} auxiliary rows are unlabelled: distillation alone"))
    if unlabelled == len(rows) and settings.select == "min-ce":
        message = "nothing would teach: no auxiliary row has a completion, and distillation.select goes by completions"
        mend = 'add rows with a completion to it, or agree on distillation.select = "all"'
        raise UsageProblem(message, where=workspace.auxiliary_data, mend=mend)
    for role, weight in (("slm", settings.lambda_slm), ("llm", settings.lambda_llm)):
        if unlabelled == len(rows) and weight == 0:
            message = f"nothing would teach the {role.upper()}: no auxiliary row has a completion, lambda_{role} is 0"
            mend = f"add rows with a completion to it, or agree on distillation.lambda_{role} = 1.0"
            raise UsageProblem(message, where=workspace.auxiliary_data, mend=mend)
