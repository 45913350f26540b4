"""The scores of a study, question by question, of each model and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stages.artefacts.records import ROBUST, Result, attack_of
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.study.results import Scores, Study, alone, result_of
from stages.study.table_rows import Row, Table, base_of, subjects
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


def scores(study: Study, table: Table, row: Row, metric: str) -> dict[str, Scores]:
    """The scores of one row of one table, by subject: "llm", or "client-1", "client-2", and so on.

    Zero-shot scores know no seed: [1, questions]. Raises NotReady, with the command that makes it, for a result that is
    not there, UsageProblem for a metric that is not a matter of right or wrong.
    """
    if row == "zero-shot":
        subject = base_of(study.root, table)
        return {subject: _scores(study, [result_of(study, study.root, None, subject)], metric)}
    runs = [of_seed[row] for of_seed in study.runs.values()]
    return {
        subject: _scores(
            study, [result_of(study, one, one.agreement.federation.rounds, subject) for one in runs], metric
        )
        for subject in subjects(table, row, runs[0])
    }


def check_scored(study: Study, rows: Mapping[Table, Sequence[Row]]) -> None:
    """Raise NotReady where several results of these tables are not there, with the one command that makes all."""
    absent = dict.fromkeys(
        path
        for table, of_table in rows.items()
        for row in rows_there(study, of_table)
        for path in _results(study, table, row)
        if not path.exists()
    )
    if len(absent) > 1:
        first = next(iter(absent))
        message = f"{len(absent)} results are not there, the first {study.root.shown(first)}"
        seeds, methods = ",".join(map(str, study.seeds)), ",".join(study.methods)
        made_by = Command("compare", seeds=seeds, methods=methods, **study.root.flags.asked)
        raise NotReady(message, where=first, mend=alone(study.root) or f"{made_by}, which runs what is missing")


def rows_there(study: Study, rows: Sequence[Row]) -> list[Row]:
    """Those of a table's rows that the study has."""
    return [row for row in rows if row == "zero-shot" or row in study.methods]


def _results(study: Study, table: Table, row: Row) -> list[Path]:
    if row == "zero-shot":
        return [study.root.result(None, base_of(study.root, table))]
    runs = [of_seed[row] for of_seed in study.runs.values()]
    asked = subjects(table, row, runs[0])
    return [one.result(one.agreement.federation.rounds, subject) for one in runs for subject in asked]


def mean_of(by_subject: Mapping[str, Scores]) -> Scores:
    """The mean over subjects, question by question: the paper's Table 2 is a mean over clients."""
    first = next(iter(by_subject.values()))
    return {task: np.mean([found[task] for found in by_subject.values()], axis=0) for task in first}


def check_tasks(scored: Sequence[Mapping[str, object]]) -> None:
    """Raise Refused unless all results, by task, are of the same tasks."""
    for by_task in scored:
        if by_task.keys() != scored[0].keys():
            odd = sorted(by_task.keys() ^ scored[0].keys())
            message = f"some results have scores of {odd[0]!r}, and some have none"
            mend = "score them all again, with evaluate --overwrite"
            raise Refused(message, where="results", mend=mend)


def _scores(study: Study, of_seeds: Sequence[Result], metric: str) -> Scores:
    check_tasks([one["tasks"] for one in of_seeds])
    if metric == ROBUST:
        _check_attacks(study, of_seeds)
    return {task: np.stack([_correct(one, task, metric) for one in of_seeds]) for task in of_seeds[0]["tasks"]}


def _check_attacks(study: Study, results: Sequence[Result]) -> None:
    for one in results:
        study.attacks.append(attack_of(one))
        check_one_attack([study.attacks[0], study.attacks[-1]], f"{ROBUST} of {one['subject']}")


def check_one_attack(attacks: Sequence[str], what: str) -> None:
    """Raise Refused unless the last of these was measured under the attack of the first. what: the last, in words."""
    if attacks and attacks[-1] != attacks[0]:
        message = f"{what} was measured under another attack than the rest: {attacks[-1] or 'none'}"
        mend = "score them all with the same --attack and --attack-steps"
        raise Refused(f"{message}, not {attacks[0] or 'none'}", where="results", mend=mend)


def remark_of(studies: Sequence[Study]) -> list[str]:
    """Under which attacks what was read of ROBUST was measured, in a sentence; none where it was not."""
    attacks = dict.fromkeys(attack for study in studies for attack in study.attacks)
    return [f"{ROBUST}: under attack, {'; '.join(attacks)}"] if attacks else []


def answers(study: Study, workspace: Workspace, round: int | None, subject: str, metric: str) -> np.ndarray | None:
    """0 or 1 for each question of all tasks, by one model of the study; None where what lies there was not scored."""
    try:
        result = result_of(study, workspace, round, subject)
    except (NotReady, Refused):
        return None
    return np.concatenate([_correct(result, task, metric) for task in result["tasks"]])


def _correct(result: Result, task: str, metric: str) -> np.ndarray:
    """0 or 1 for each question."""
    found = result["tasks"][task]["correct"]
    if metric not in found:
        known = ", ".join(found) or "none is a matter of right or wrong"
        message = f"the result of {result['subject']} does not say which questions of {task} were right by {metric}"
        raise UsageProblem(message, mend=f"--metric with one of its metrics: {known}")
    return np.frombuffer(found[metric].encode(), dtype=np.uint8) - ord("0")
