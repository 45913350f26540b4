"""A comparison of methods: what each scored, how they differ, and what each was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.progress.staleness import PREPARE
from stages.progress.status import status
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.study.statistics import Difference, Estimate, difference, estimate
from stages.workspace.agreement import Method
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

if TYPE_CHECKING:
    from stages.paper.reported import Setting
    from stages.study.budgets import Spent
    from stages.study.results import Row, Scores, Study, Table

ALL = "all tasks"
"""The column of all questions of all tasks together."""


@dataclass(frozen=True)
class Accuracy(Estimate):
    """An accuracy in [0, 1] of one row and task: a mean over its subjects, and each subject's own; all by seed too."""

    by_seed: list[float]
    by_subject: dict[str, list[float]]
    questions: int


@dataclass(frozen=True)
class Paper:
    """What a paper reports in one of its settings: percent, by table, row and task.

    other_models: the base models in whose place there are others here. source: title, arXiv number, and so on.
    """

    setting: str
    other_models: list[str]
    source: dict[str, str]
    tables: dict[Table, dict[Row, dict[str, float]]]


@dataclass(frozen=True)
class Comparison:
    """The methods that were run, side by side.

    absent: methods that were not. tables: by row and task. differences: of FedCoLLM from every other row, likewise.
    budgets: by party. remarks: what the scores lack, in sentences.
    """

    metric: str
    seeds: list[int]
    methods: list[Method]
    absent: list[Method]
    clients: int
    rounds: int
    paper: Paper | None
    tables: dict[Table, dict[Row, dict[str, Accuracy]]]
    differences: dict[Table, dict[Row, dict[str, Difference]]]
    budgets: dict[Method, dict[str, Spent]]
    remarks: list[str]


def check_no_baseline(workspace: Workspace) -> None:
    """Raise UsageProblem for a workspace that is one row of another's comparison."""
    if workspace.is_baseline:
        mend = Command("compare", workspace=workspace.root.parents[1])
        raise UsageProblem("this is a baseline: it is compared from where it belongs", where=workspace.root, mend=mend)


def compare(
    workspace: Workspace,
    *,
    seeds: Sequence[int] | None = None,
    methods: Sequence[Method] | None = None,
    paper: Setting | None = None,
    metric: str = "acc",
    report: Report = ignore,
) -> Comparison:
    """The tables, the differences of FedCoLLM from every other row, and the ledger of budgets.

    seeds: by default those that there are. methods: by default all of them where seeds are given, else those that there
    are. paper: a paper's setting, to stand beside. Raises BadNumbers if budgets differ, NotReady, with the
    command, for what is missing.
    """
    from stages.study import budgets, results

    check_no_baseline(workspace)
    begun_seeds, begun_methods = results.begun(workspace)
    methods = list(methods or (results.METHODS if seeds else begun_methods))
    study = results.open_study(workspace, seeds or begun_seeds, methods)
    results.check_finished(study)
    for runs in study.runs.values():
        budgets.check_equal(runs, study.run_again)
    measured = {table: _measured(study, table, metric) for table in results.ROWS}
    _check_sound(study)
    tables = {table: _estimates(scores) for table, scores in measured.items()}
    return Comparison(
        metric=metric,
        seeds=study.seeds,
        methods=study.methods,
        absent=[method for method in results.METHODS if method not in study.methods],
        clients=workspace.agreement.federation.clients,
        rounds=workspace.agreement.federation.rounds,
        paper=_paper(workspace, paper, tables, report) if paper else None,
        tables=tables,
        differences={table: _differences(scores) for table, scores in measured.items()},
        budgets=_budgets(study),
        remarks=results.remarks([study.root, *study.workspaces]),
    )


def _check_sound(study: Study) -> None:
    """Raise Refused for a federation in which an adapter was made again and what follows from it was not."""
    for workspace in study.workspaces:
        for round in status(workspace).rounds:
            for step in round.steps:
                if step.condition in ("stale", "damaged"):
                    message = f"{step.name} of round {round.number} is {step.condition}: {step.reason}"
                    where = study.root.shown(workspace.root)
                    again = study.run_again(workspace)
                    mend = study.inside(workspace, PREPARE) if step.command == PREPARE else again
                    raise Refused(message, where=where, mend=mend)


def _measured(study: Study, table: Table, metric: str) -> dict[Row, dict[str, Scores]]:
    """Every row of a table that the study has, by subject, with all tasks' questions together under ALL."""
    from stages.study import results, scores

    rows = [row for row in results.ROWS[table] if row == "zero-shot" or row in study.methods]
    found = {row: scores.scores(study, table, row, metric) for row in rows}
    scores.check_tasks([by_task for by_subject in found.values() for by_task in by_subject.values()])
    return {
        row: {
            subject: by_task | {ALL: np.concatenate(list(by_task.values()), axis=1)}
            for subject, by_task in by_subject.items()
        }
        for row, by_subject in found.items()
    }


def _estimates(measured: dict[Row, dict[str, Scores]]) -> dict[Row, dict[str, Accuracy]]:
    from stages.study.scores import mean_of

    return {
        row: {task: _accuracy(scores, by_subject, task) for task, scores in mean_of(by_subject).items()}
        for row, by_subject in measured.items()
    }


def _accuracy(scores: np.ndarray, by_subject: dict[str, Scores], task: str) -> Accuracy:
    """scores: the mean of the subjects, [seeds, questions]."""
    found = estimate(scores)
    return Accuracy(
        found.mean,
        found.deviation,
        found.binomial,
        by_seed=scores.mean(axis=1).tolist(),
        by_subject={subject: of_tasks[task].mean(axis=1).tolist() for subject, of_tasks in by_subject.items()},
        questions=scores.shape[1],
    )


def _differences(measured: dict[Row, dict[str, Scores]]) -> dict[Row, dict[str, Difference]]:
    from stages.study.scores import mean_of

    means = {row: mean_of(by_subject) for row, by_subject in measured.items()}
    own = means.pop("fedcollm", None)
    if own is None:
        return {}
    return {
        row: {task: difference(own[task], scores) for task, scores in by_task.items()} for row, by_task in means.items()
    }


def _budgets(study: Study) -> dict[Method, dict[str, Spent]]:
    """By method and party, as the first seed has it; every seed has been checked."""
    from stages.study.budgets import spent

    runs = study.runs[study.seeds[0]]
    return {method: spent(runs[method]) for method in study.methods}


def _paper(
    workspace: Workspace, setting: Setting, tables: dict[Table, dict[Row, dict[str, Accuracy]]], report: Report
) -> Paper:
    """What the paper reports for the tasks that are here. Raises UsageProblem if it has none of them."""
    from stages.bases import base_names
    from stages.paper import reported

    paper = reported.accuracies(setting)
    here = [task for task in tables["slm"]["zero-shot"] if task != ALL]
    tasks = [task for task in here if task in paper.tasks]
    if not tasks:
        message = f"the paper has no task of this workspace: {', '.join(here)}"
        raise UsageProblem(message, mend=f"the paper's are: {', '.join(paper.tasks)}")
    models: dict[Table, Role] = {"llm": "llm", "clients": "slm"}
    theirs: dict[Role, tuple[str, ...]] = {"slm": paper.slms, "llm": (paper.llm,)}
    ours = {role: base_names.name_of(workspace, role) for role in theirs}
    others = [f"{' and '.join(theirs[role])}, not of {ours[role]}" for role in theirs if ours[role] not in theirs[role]]
    if others:
        report(Event("warning", f"the paper's figures of {setting} are of other models: {'; '.join(others)}"))
    return Paper(
        setting=setting,
        other_models=others,
        source=paper.source,
        tables={
            table: {
                row: {
                    task: found for task in tasks if (found := reported.accuracy(setting, model, row, task)) is not None
                }
                for row in tables[table]
            }
            for table, model in models.items()
        },
    )
