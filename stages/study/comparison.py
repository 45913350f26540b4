"""A comparison of methods: what each scored, how they differ, and what each was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.artefacts.reading import Manifests
from stages.progress.staleness import PREPARE
from stages.progress.status import status
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Report, ignore
from stages.study.statistics import Difference, Estimate, difference, estimate
from stages.workspace.commands import Command
from stages.workspace.methods import OF_FEDAVG, Compared
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.paper.reported import Setting
    from stages.study.budgets import Spent
    from stages.study.paper_beside import Paper
    from stages.study.results import Scores, Study
    from stages.study.table_rows import Row, Table

ALL = "all tasks"
"""The column of all questions of all tasks together."""


@dataclass(frozen=True)
class Accuracy(Estimate):
    """An accuracy in [0, 1] of one row and task: a mean over its subjects, and each subject's own; all by seed too."""

    by_seed: list[float]
    by_subject: dict[str, list[float]]
    questions: int


@dataclass(frozen=True)
class Comparison:
    """The methods that were run, side by side.

    absent: methods that were not. tables: by row and task. differences: of FedCoLLM, or FedMKT, from every other row,
    likewise; where clients have models of their own, also of their mean. budgets: by party. remarks: what the scores
    lack, and what the paper's figures stand beside, in sentences.
    """

    metric: str
    seeds: list[int]
    methods: list[Compared]
    absent: list[Compared]
    clients: int
    rounds: int
    paper: Paper | None
    tables: dict[Table, dict[Row, dict[str, Accuracy]]]
    differences: dict[Table, dict[Row, dict[str, Difference]]]
    budgets: dict[Compared, dict[str, Spent]]
    remarks: list[str]

    @property
    def compared(self) -> Compared:
        """The method whose differences from the others these are. With FedMKT no server has an SLM."""
        return "fedcollm" if "slm" in self.tables else "fedmkt"


def check_no_baseline(workspace: Workspace) -> None:
    """Raise UsageProblem for a workspace that is one row of another's comparison."""
    if workspace.is_baseline:
        mend = Command("compare", workspace=workspace.root.parents[1])
        raise UsageProblem("this is a baseline: it is compared from where it belongs", where=workspace.root, mend=mend)


def compare(
    workspace: Workspace,
    *,
    seeds: Sequence[int] | None = None,
    methods: Sequence[Compared] | None = None,
    paper: Setting | None = None,
    metric: str = "acc",
    report: Report = ignore,
    manifests: Manifests | None = None,
) -> Comparison:
    """The tables, the differences of FedCoLLM (FedMKT) from every other row, and the ledger of budgets.

    seeds: by default those that there are. methods: by default methods_of where seeds are given, else those that there
    are. paper: a paper's setting, to stand beside. manifests: those that this command has read. Raises BadNumbers if
    budgets differ, NotReady, with the command, for what is missing.
    """
    from stages.study import budgets, paper_beside, results, table_rows
    from stages.study.scores import check_scored, remark_of

    check_no_baseline(workspace)
    manifests = manifests or Manifests()
    begun_seeds, begun_methods = results.begun(workspace)
    usual = table_rows.methods_of(workspace)
    methods = list(methods or (usual if seeds else begun_methods))
    study = results.open_study(workspace, seeds or begun_seeds, methods)
    results.check_finished(study)
    for runs in study.runs.values():
        budgets.check_equal(runs, study.run_again, manifests)
    rows_of = table_rows.rows_of(workspace)
    check_scored(study, rows_of)
    measured = {table: _measured(study, rows, table, metric) for table, rows in rows_of.items()}
    _check_sound(study, manifests)
    tables = {table: _estimates(scores) for table, scores in measured.items()}
    beside, sentences = None, list[str]()
    if paper:
        tasks = [task for task in tables["llm"]["zero-shot"] if task != ALL]
        rows = {table: list(found) for table, found in tables.items()}
        beside, sentences = paper_beside.beside(workspace, paper, rows, tasks, report)
    return Comparison(
        metric=metric,
        seeds=study.seeds,
        methods=study.methods,
        absent=[method for method in usual if method not in study.methods],
        clients=workspace.agreement.federation.clients,
        rounds=workspace.agreement.federation.rounds,
        paper=beside,
        tables=tables,
        differences={
            table: _differences(scores, table_rows.own_method(workspace))
            for table, scores in _with_mean(measured).items()
        },
        budgets=_budgets(study, manifests),
        remarks=[
            *remark_of([study]),
            *results.remarks([study.root, *study.workspaces]),
            *_of_clients(workspace),
            *_on_the_table(study),
            *sentences,
        ],
    )


def _check_sound(study: Study, manifests: Manifests) -> None:
    """Raise Refused for a federation in which an adapter was made again and what follows from it was not."""
    for workspace in study.workspaces:
        for round in status(workspace, manifests=manifests).rounds:
            for step in round.steps:
                if step.condition in ("stale", "damaged"):
                    message = f"{step.name} of round {round.number} is {step.condition}: {step.reason}"
                    where = study.root.shown(workspace.root)
                    again = study.run_again(workspace)
                    mend = study.inside(workspace, PREPARE) if step.command == PREPARE else again
                    raise Refused(message, where=where, mend=mend)


def _of_clients(workspace: Workspace) -> list[str]:
    """Whose models these are, where clients have their own, or that they are averaged, and what is left out."""
    from stages.bases.base_names import name_of
    from stages.paper.reported import LABELS
    from stages.study.table_rows import left_out

    lines = []
    if not workspace.agreement.is_of_one_slm:
        models = [f"client {k}: {name_of(workspace.of_client(k), 'slm')}" for k in workspace.clients]
        lines.append(f"the clients' models: {', '.join(models)}")
    if workspace.agreement.aggregation.average:
        lines.append(f"{LABELS['fedmkt']} averages the clients' adapters after each round: aggregation.average")
    if (server := workspace.agreement.aggregation.server) != "none":
        lines.append(f"in every method that averages, the server takes steps of {server}: aggregation.server")
    for why, methods in left_out(workspace).items():
        lines.append(f"left out: {', '.join(LABELS[method] for method in methods)}, since {why}")
    return lines


def _on_the_table(study: Study) -> list[str]:
    """Whether the tasks are others than the settings name, and which rows are FedAvg with a part of another system."""
    from stages.paper.reported import LABELS

    lines = ["of tasks that a command named, not of those that the settings name"] if study.root.flags.tasks else []
    if named := [LABELS[method] for method in study.methods if method in OF_FEDAVG]:
        lines.append(f"{', '.join(named)}: FedAvg with that part by its defaults, tuned to no task")
    return lines


def _with_mean(measured: dict[Table, dict[Row, dict[str, Scores]]]) -> dict[Table, dict[Row, dict[str, Scores]]]:
    """The tables, and, of clients with one each, the mean over them: of differences that says something."""
    own = {table: rows for table, rows in measured.items() if table.startswith("client-")}
    if not own:
        return measured
    common = [row for row in next(iter(own.values())) if all(row in rows for rows in own.values())]
    together = {row: {table: scores for table, rows in own.items() for scores in rows[row].values()} for row in common}
    return measured | {"clients": together}


def _measured(study: Study, rows: Sequence[Row], table: Table, metric: str) -> dict[Row, dict[str, Scores]]:
    """Every row of a table that the study has, by subject, with all tasks' questions together under ALL."""
    from stages.study import scores

    found = {row: scores.scores(study, table, row, metric) for row in scores.rows_there(study, rows)}
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


def _differences(measured: dict[Row, dict[str, Scores]], compared: Row) -> dict[Row, dict[str, Difference]]:
    from stages.study.scores import mean_of

    means = {row: mean_of(by_subject) for row, by_subject in measured.items()}
    own = means.pop(compared, None)
    if own is None:
        return {}
    return {
        row: {task: difference(own[task], scores) for task, scores in by_task.items()} for row, by_task in means.items()
    }


def _budgets(study: Study, manifests: Manifests) -> dict[Compared, dict[str, Spent]]:
    """By method and party, as the first seed has it; every seed has been checked."""
    from stages.study.budgets import spent

    runs = study.runs[study.seeds[0]]
    return {method: spent(runs[method], manifests=manifests) for method in study.methods}
