"""The public rows of FedMKT, D_p: the same file at every party, each row with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.data.examples import Example, fitting
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.data.spacing import warn_of_spacing
from stages.models.tuned import Outline
from stages.parties.party import Party
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace, require


@dataclass(frozen=True)
class Public:
    """The rows, where they lie at this party, and the digest of their file."""

    path: Path
    rows: list[Row]
    sha256: str


def read_public(party: Party, report: Report) -> Public:
    """A party's copy of the public rows. Raises UsageProblem where none has an answer."""
    path = party.workspace.public_data(None if party.is_server else party.number)
    make = f"in a simulation, `{Command('prepare')}` puts them there"
    require(path, f"{party.name} has no public rows here", f"put the file there that all parties have; {make}")
    rows, digest = read_rows(path, unlabelled=True, texts=True)
    warn_of_spacing(rows, report)
    unlabelled = sum(row.completion is None for row in rows)
    if unlabelled == len(rows):
        mend = "put rows with a completion there: models are compared by how well they know it"
        raise UsageProblem(f"no row of {path.name} has a completion", where=path, mend=mend)
    if unlabelled:
        words = f"{unlabelled} of {len(rows)} public rows are left out: they have no completion to know"
        report(Event("warning", words))
    return Public(path, rows, digest)


def examples_of(public: Public, outline: Outline, workspace: Workspace) -> list[Example | None]:
    """Each row as a model reads it; None for one without an answer, and, if that is agreed, for one that is too long.

    Raises Damaged for one that is too long where that is not agreed.
    """
    fit = fitting(
        public.rows,
        outline.tokenizer,
        max_length=workspace.agreement.distillation.max_length,
        context=outline.context,
        too_long=workspace.agreement.data.too_long,
        path=public.path,
    )
    return [one if row.completion is not None else None for row, one in zip(public.rows, fit, strict=True)]


def tell_left_out(public: Public, used: Sequence[object], report: Report) -> dict[str, float]:
    """How many rows with an answer a party leaves out, told, and for its manifest; empty if none."""
    labelled = sum(row.completion is not None for row in public.rows)
    if left_out := labelled - len(used):
        report(Event("warning", f"{left_out} of {labelled} public rows are left out: too long, or not given back"))
        return {"rows_left_out": left_out}
    return {}
