"""What `evaluate --attack` found, as a table of the report: accuracy with and without an attack, after each round."""

from __future__ import annotations

from stages.artefacts.records import ROBUST, Result, attack_of, is_current, read_result
from stages.report.own_rows import Table
from stages.runtime.errors import Problem
from stages.workspace import listing
from stages.workspace.paths import Workspace

COLUMNS = ["Model", "Round", "Task", "acc, %", f"{ROBUST}, %", "Attack"]


def tables(workspace: Workspace) -> list[Table]:
    """One table, or none where nothing was attacked. Results by other settings than those of now are left out."""
    rows = []
    for path in listing.results(workspace):  # in the order of rounds
        try:
            found = read_result(path)
        except Problem:  # fedcollm status --verify tells of damage
            continue
        if is_current(found, workspace):
            rows += [_cells(found, task) for task, one in found["tasks"].items() if ROBUST in one["metrics"]]
    return [Table("Under attack", COLUMNS, rows)] if rows else []


def _cells(found: Result, task: str) -> list[str]:
    metrics, round = found["tasks"][task]["metrics"], found["round"]
    shown = [f"{100 * metrics[name]:.1f}" if name in metrics else "" for name in ("acc", ROBUST)]
    return [found["subject"], "base" if round is None else str(round), task, *shown, attack_of(found)]
