"""What `evaluate --tasks` found, as a table of the report: each model on each task, after the last round scored."""

from __future__ import annotations

from stages.artefacts.records import Result, TaskScores, own_evaluation, read_result
from stages.artefacts.subjects import is_of_another
from stages.report.own_rows import Table
from stages.runtime.errors import Problem
from stages.workspace import listing
from stages.workspace.paths import Workspace

COLUMNS = ["Model", "Round", "Task", "Questions", "Scores, %"]


def tables(workspace: Workspace) -> list[Table]:
    """One table, or none where nothing was scored so. What is of another adapter or of other questions says so."""
    last: dict[tuple[str, str, bool], tuple[Result, str]] = {}
    for path in listing.task_results(workspace):  # in the order of rounds
        try:
            found = read_result(path)
        except Problem:  # fedcollm status --verify tells of damage
            continue
        last[path.parts[-3], found["subject"], found["round"] is None] = found, _since(workspace, found)
    ordered = sorted(last.items(), key=lambda item: (item[0][0], len(item[0][1]), item[0][1], not item[0][2]))
    rows = [_cells(found, task, since) for _, (found, since) in ordered for task in found["tasks"]]
    return [Table("Tasks beside those of the settings", COLUMNS, rows)] if rows else []


def _cells(found: Result, task: str, since: str) -> list[str]:
    scores = found["tasks"][task]
    asked, in_all = scores["questions"], scores.get("questions_in_all", scores["questions"])
    return [
        found["subject"],
        "base" if found["round"] is None else str(found["round"]),
        f"{task}{since}",
        str(asked) if asked == in_all else f"the first {asked} of {in_all}",
        _metrics(scores),
    ]


def _metrics(scores: TaskScores) -> str:
    found = scores["metrics"]
    shown = (
        f"{name} {100 * value:.1f}" + (f" ± {100 * error:.1f}" if (error := found.get(f"{name}_stderr")) else "")
        for name, value in found.items()
        if not name.endswith("_stderr")
    )
    return ", ".join(shown)


def _since(workspace: Workspace, found: Result) -> str:
    """What has become another since it was measured, in brackets; empty if nothing has, or it is not here."""
    settings = found.get("evaluation") or workspace.agreement.evaluation.model_dump()
    asked = workspace.asking(settings["tasks"], settings["limit"])
    try:
        if not workspace.has_tasks(found["tasks_sha256"], asked.scored_tasks):
            return " (of other questions)"
        if found["agreement_sha256"] != workspace.agreed_in(found["round"]) or (
            found.get("evaluation") != own_evaluation(asked)
        ):
            return " (by other settings)"
    except (Problem, OSError):
        return ""
    is_other = is_of_another(workspace, found["round"], found["subject"], found["manifest_sha256"])
    return " (of another adapter)" if is_other else ""
