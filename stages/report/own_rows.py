"""What `evaluate --rows` found, as a table of the report: each model on each file, after the last round scored."""

from __future__ import annotations

from dataclasses import dataclass

from stages.artefacts.row_records import RowsResult, read_rows_result
from stages.artefacts.subjects import is_of_another
from stages.files import reading
from stages.runtime.errors import Problem
from stages.workspace import listing
from stages.workspace.paths import Workspace

COLUMNS = ["Model", "Round", "Rows of", "Rows", "Loss", "Perplexity", "Exact match, %", "Text match, %", "Rouge-L, %"]


@dataclass(frozen=True)
class Table:
    """A table in words."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(workspace: Workspace) -> list[Table]:
    """One table, or none where nothing was scored so. A result of other rows or another adapter is named as that."""
    last: dict[tuple[str, str, bool], RowsResult] = {}
    for path in listing.rows_results(workspace):  # in the order of rounds
        try:
            found = read_rows_result(path)
        except Problem:  # fedcollm status --verify tells of damage
            continue
        last[found["rows"], found["subject"], found["round"] is None] = found
    if not last:
        return []
    ordered = sorted(last.items(), key=lambda item: (item[0][0], len(item[0][1]), item[0][1], not item[0][2]))
    return [Table("Rows of one's own", COLUMNS, [_cells(workspace, found) for _, found in ordered])]


def _cells(workspace: Workspace, found: RowsResult) -> list[str]:
    from stages.report.page import without_folders

    scores, round = found["scores"], found["round"]
    written = scores.get("written")
    shares = [scores["exact_match"], *([written["generated_match"], written["rouge_l"]] if written else ())]
    return [
        found["subject"],
        "base" if round is None else str(round),
        f"{without_folders(found['rows'])}{_since(workspace, found)}",
        str(scores["rows"]),
        f"{scores['loss']:.4f}",
        f"{scores['perplexity']:.4g}",
        *(f"{100 * share:.1f}" for share in shares),
        *([] if written else ["", ""]),
    ]


def _since(workspace: Workspace, found: RowsResult) -> str:
    """What has become another since it was measured, in brackets; empty if nothing has, or it is not here."""
    try:
        if reading.sha256(reading.read_own(workspace.root / found["rows"])) != found["rows_sha256"]:
            return " (edited since)"
    except (Problem, OSError):
        return ""
    is_other = is_of_another(workspace, found["round"], found["subject"], found["manifest_sha256"])
    return " (of another adapter)" if is_other else ""
