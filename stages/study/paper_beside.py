"""Which of a paper's figures stand beside which table of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.bases import base_names
from stages.paper import reported
from stages.parties import names
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.paper.reported import Accuracies, Setting
    from stages.study.table_rows import Row, Table


@dataclass(frozen=True)
class Paper:
    """What a paper reports in one of its settings: percent, by table, row and task.

    other_models: the base models in whose place there are others here. source: title, arXiv number, and so on.
    """

    setting: str
    other_models: list[str]
    source: dict[str, str]
    tables: dict[Table, dict[Row, dict[str, float]]]


def beside(
    workspace: Workspace, setting: Setting, rows: Mapping[Table, list[Row]], tasks: list[str], report: Report
) -> tuple[Paper, list[str]]:
    """What the paper reports for these tables and tasks; and which of its models stands beside which client's, if any.

    Raises UsageProblem if it has none of the tasks.
    """
    paper = reported.accuracies(setting)
    shared = [task for task in tasks if task in paper.tasks]
    if not shared:
        message = f"the paper has no task of this workspace: {', '.join(tasks)}"
        raise UsageProblem(message, mend=f"the paper's are: {', '.join(paper.tasks)}")
    own = [table for table in rows if table.startswith("client-")]
    theirs, others, sentences = _of_clients(workspace, paper, own) if own else _of_all(workspace, paper)
    if (name := base_names.name_of(workspace, "llm")) != paper.llm:
        others.append(f"{paper.llm}, not of {name}")
    if others:
        report(Event("warning", f"the paper's figures of {setting} are of other models: {'; '.join(others)}"))
    tables = {
        table: {
            row: {task: found for task in shared if (found := reported.accuracy(setting, model, row, task)) is not None}
            for row in rows[table]
        }
        for table, model in (theirs | {"llm": "llm"}).items()
    }
    return Paper(setting, others, paper.source, {table: tables[table] for table in rows if table in tables}), sentences


def _of_all(workspace: Workspace, paper: Accuracies) -> tuple[dict[Table, str], list[str], list[str]]:
    """The paper's mean of clients beside ours; or, where its clients have unlike models, the one that all have here."""
    ours = base_names.name_of(workspace, "slm")
    others = [] if ours in paper.slms else [f"{' and '.join(paper.slms)}, not of {ours}"]
    return {"clients": "slm" if "slm" in paper.accuracy else ours}, others, []


def _of_clients(
    workspace: Workspace, paper: Accuracies, tables: list[Table]
) -> tuple[dict[Table, str], list[str], list[str]]:
    """By the names of models; the rest, of a paper with a model for each client, in the order of both.

    A mean over clients of one model stands only beside a client of that model.
    """
    ours = {table: base_names.name_of(workspace.of_client(names.number_of(table)), "slm") for table in tables}
    by_name = {table: name for table, name in ours.items() if name in paper.slms}
    rest = [name for name in paper.slms if name not in by_name.values()] if len(paper.slms) > 1 else []
    by_order = dict(zip((table for table in tables if table not in by_name), rest, strict=False))
    found = {"by name": by_name, "in the order of both": by_order}
    sentences = [
        f"the paper's {name} stands beside {names.said(table)}'s {ours[table]}, {how}"
        for how, pairs in found.items()
        for table, name in pairs.items()
    ]
    alone = [names.said(table) for table in tables if table not in by_name and table not in by_order]
    if alone:
        sentences.append(f"no figure of the paper stands beside {', '.join(alone)}")
    others = [f"{name}, not of {names.said(table)}'s {ours[table]}" for table, name in by_order.items()]
    theirs = by_name | by_order
    return {table: name if name in paper.accuracy else "slm" for table, name in theirs.items()}, others, sentences
