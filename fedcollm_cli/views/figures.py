"""What compare, sweep and evaluate found as rows of figures, one a row, each with what it is the figure of.

Accuracies, deviations and differences are shares of 1, as --json has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.artefacts.records import Result
    from stages.federation.sweep import Swept
    from stages.study.comparison import Accuracy, Comparison
    from stages.study.statistics import Difference, Estimate

Row = list[object]
OF_COMPARISON = ["table", "method", "minus", "task", "model", "seed", "questions", "metric", "figure", "value"]


def of_comparison(found: Comparison) -> tuple[list[str], list[Row]]:
    """Each score of a model and seed; then the mean, what it rests on, and the paper's; then each difference.

    model: "mean" is that of several clients' models. minus: the method that is taken from method.
    """
    rows: list[Row] = []
    for table, by_row in found.tables.items():
        for method, by_task in by_row.items():
            seeds = list(map(str, found.seeds)) if method != "zero-shot" else [""]
            paper = found.paper.tables.get(table, {}).get(method, {}) if found.paper else {}
            for task, one in by_task.items():
                place = [table, method, "", task]
                rows += [[*place, *of, one.questions, found.metric, *what] for of, what in _scores(one, seeds)]
                if task in paper:
                    value = f"{paper[task] / 100:.6f}"
                    rows.append([*place, _whose(one), "", one.questions, found.metric, "paper", value])
    for table, differences in found.differences.items():
        for method, minus in differences.items():
            for task, difference in minus.items():
                place = [table, found.compared, method, task, "", "", "", found.metric]
                rows += [[*place, *figure] for figure in _of_difference(difference)]
    return OF_COMPARISON, rows


def of_sweep(found: Swept) -> tuple[list[str], list[Row]]:
    """Of each combination of settings: each table's mean and what it rests on, and its difference from the first."""
    rows: list[Row] = []
    for one in found.rows:
        settings = [str(one.settings[key]) for key in found.axes]
        for table, score in one.scores.items():
            rows += [[*settings, table, "", found.metric, *figure] for figure in _of_estimate(score)]
        for table, difference in (one.minus_first or {}).items():
            place = [*settings, table, "the first", found.metric]
            rows += [[*place, *figure] for figure in _of_difference(difference)]
    return [*found.axes, "table", "minus", "metric", "figure", "value"], rows


def of_scores(results: Sequence[Result]) -> tuple[list[str], list[Row]]:
    """Of each model and task: each metric's mean, and its standard error."""
    rows: list[Row] = [
        [result["subject"], "" if result["round"] is None else result["round"], task, scored["questions"], *figure]
        for result in results
        for task, scored in result["tasks"].items()
        for figure in _of_metrics(scored["metrics"])
    ]
    return ["model", "round", "task", "questions", "metric", "figure", "value"], rows


def _whose(found: Accuracy) -> str:
    return next(iter(found.by_subject)) if len(found.by_subject) == 1 else "mean"


def _scores(found: Accuracy, seeds: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Model and seed, what is measured, and its value."""
    models = found.by_subject | ({"mean": found.by_seed} if len(found.by_subject) > 1 else {})
    for model, by_seed in models.items():
        for seed, value in zip(seeds, by_seed, strict=True):
            yield [model, seed], ["score", f"{value:.6f}"]
    for figure in _of_estimate(found):
        yield [_whose(found), ""], figure


def _of_estimate(found: Estimate) -> list[list[str]]:
    named = {"mean": found.mean, "deviation": found.deviation, "questions_error": found.binomial}
    return _known(named)


def _of_difference(found: Difference) -> list[list[str]]:
    """half_width, where it is known, as the interval's ends; and whether it leaves out zero, 1 or 0."""
    named = {"mean": found.mean, "seeds_error": found.seeds_error, "questions_error": found.questions_error}
    if found.half_width is not None:
        named |= {"low": found.mean - found.half_width, "high": found.mean + found.half_width}
    return [*_known(named), ["is_supported", str(int(found.is_supported))]]


def _of_metrics(metrics: dict[str, float]) -> Iterator[list[str]]:
    for name, value in metrics.items():
        figure = "standard_error" if name.endswith("_stderr") else "mean"
        yield [name.removesuffix("_stderr"), figure, str(value)]


def _known(named: dict[str, float] | dict[str, float | None]) -> list[list[str]]:
    return [[name, f"{value:.6f}"] for name, value in named.items() if value is not None]
