"""sweep: an ablation: the federation once for every combination of some settings, and one table at the end.

Writes a workspace for each combination into sweeps/, on the same models and data (dealt anew only where a setting of
the deal itself changes). What is done is passed over, so that the same command goes on after a stop.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.federation.run import derived, run
from stages.federation.settings_in_words import in_words
from stages.federation.time_left import TimeLeft, rounds_to_make
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Report, ignore
from stages.workspace import changing
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    import numpy as np

    from stages.models.loading import Models
    from stages.study.results import Study
    from stages.study.statistics import Difference, Estimate
    from stages.study.table_rows import Table
    from stages.study.variants import Changes

SEED = "federation.seed"
ATTACK = "evaluation.attack."
"""What a setting's name begins with whose points are measured under different attacks, as that asks for."""
LONGEST_NAME = 200
"""Characters of a folder's name before it is cut: file systems take 255 bytes."""
FIXED = {
    "federation.method": f"for other methods: {Command('compare')}",
    "federation.name": "leave it out: a sweep keeps the federation's name",
}


@dataclass(frozen=True)
class Row:
    """One combination of settings: each model's accuracy in [0, 1], and its difference from the first row's."""

    settings: Changes
    scores: dict[Table, Estimate]
    minus_first: dict[Table, Difference] | None  # None: this is the first

    def as_json(self) -> dict[str, Any]:
        """For JSON; of the first row, without differences."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Swept:
    """A sweep's table. axes: the settings that vary, but for the seed. remarks: what the scores lack, in sentences."""

    metric: str
    axes: list[str]
    seeds: list[int]
    rows: list[Row]
    remarks: list[str]

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"rows": [row.as_json() for row in self.rows]}


def sweep(
    workspace: Workspace,
    *,
    grid: Mapping[str, Sequence[Any]],
    metric: str = "acc",
    collect: bool = False,
    each_round: bool = True,
    client_scores: bool = True,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> Swept:
    """Run every combination and compare their scores after the last round, each with the first.

    grid: values by dotted key of fedcollm.toml. A grid over federation.seed gives means and error bars, not rows.
    collect: run nothing, and raise NotReady for what is not there. each_round, client_scores: as run has them;
    the table has no row of models that are left out.
    Raises UsageProblem, before anything is run, for a combination that is no valid agreement, or whose models have two
    tokenizers.
    """
    from stages.study.results import remarks
    from stages.study.scores import remark_of

    points = _checked(workspace, grid)
    if collect:
        workspaces = [_opened(workspace, grid, settings) for settings in points]
    else:
        workspaces = _made(workspace, grid, points, overwrite, report)
        one = partial(run, each_round=each_round, client_scores=client_scores, overwrite=overwrite)
        _run(workspace, workspaces, one, overwrite=overwrite, models=models, report=report)
    studies = _studies(workspace, grid, points, workspaces)
    return Swept(
        metric=metric,
        axes=[key for key in grid if key != SEED],
        seeds=studies[0][1].seeds,
        rows=_rows(studies, metric, client_scores=client_scores),
        remarks=[*remark_of([study for _, study in studies]), *remarks([workspace, *workspaces])],
    )


def spread_out(
    workspace: Workspace, *, grid: Mapping[str, Sequence[Any]], overwrite: bool = False, report: Report = ignore
) -> Path:
    """Write job scripts for every combination, and one that submits them all. Returns that one's path.

    Raises as sweep does.
    """
    from stages.federation.spread import spread

    points = _made(workspace, grid, _checked(workspace, grid), overwrite, report)
    told_by = _command(grid).also(collect=True)
    return spread(workspace, points, study="sweep", collected_by=told_by, report=report)


def _checked(workspace: Workspace, grid: Mapping[str, Sequence[Any]]) -> list[Changes]:
    """The combinations, each a valid agreement."""
    from stages.study import variants

    points = _points(workspace, grid)
    dealt = [key for key in grid if key.startswith("data.") and key != "data.too_long"]
    if dealt and not workspace.split.exists():
        mend = f"{Command('prepare')}, if [data] says from what; rows that the parties brought are not dealt"
        raise UsageProblem(f"{dealt[0]} changes nothing here: prepare has not dealt the rows", mend=mend)
    for settings in points:
        try:
            variants.check(workspace, settings)
        except UsageProblem as problem:  # the file itself may be in order
            changed = ", ".join(f"{key} = {changing.in_words(value)}" for key, value in settings.items())
            problem.where = f"{workspace.root / AGREEMENT}, changed by {changed}"
            raise
    return points


def _command(grid: Mapping[str, Sequence[Any]]) -> Command:
    return Command("sweep", set=tuple(in_words(key, values) for key, values in grid.items()))


def _opened(workspace: Workspace, grid: Mapping[str, Sequence[Any]], settings: Changes) -> Workspace:
    """The workspace of a combination, which has to be there."""
    from stages.study import variants

    place = workspace.sweep_point(point_name(settings))
    return variants.open_variant(workspace, place, settings, made_by=_command(grid))


def _made(
    workspace: Workspace, grid: Mapping[str, Sequence[Any]], points: Sequence[Changes], overwrite: bool, report: Report
) -> list[Workspace]:
    """A workspace for each combination, made if it is not there, with its rows."""
    places = [workspace.sweep_point(point_name(settings)) for settings in points]
    return [
        derived(workspace, place, settings, made_by=_command(grid), overwrite=overwrite, report=report)
        for place, settings in zip(places, points, strict=True)
    ]


def _run(
    workspace: Workspace,
    points: Sequence[Workspace],
    one: Callable[..., object],
    *,
    overwrite: bool,
    models: Models | None,
    report: Report,
) -> None:
    """Every step of every combination that is not done. one: run, with what holds for all."""
    from stages.models.loading import Models

    models = models or Models(workspace)
    for point in points:
        if point.agreement.federation.distils:
            models.of(point).check_both()
    left = TimeLeft([("", rounds_to_make(point.root, point, overwrite=overwrite)) for point in points], report)
    for number, point in enumerate(points, 1):
        left.begin(f"{number} of {len(points)}: {point.root.name}")
        one(point, models=models.of(point), report=left.report)
        left.end()


def _points(workspace: Workspace, grid: Mapping[str, Sequence[Any]]) -> list[Changes]:
    for key, values in grid.items():
        if "." not in key and key in type(workspace.agreement).model_fields:
            message = f"{key} is a table, and a sweep varies settings"
            raise UsageProblem(message, mend=f"name the settings in it that vary, as in --set {key}.KEY=VALUE,VALUE")
        if key in FIXED:
            raise UsageProblem(f"{key} is not for a sweep", mend=FIXED[key])
        if key.startswith("evaluation.") or (key == "data.tasks" and not workspace.evaluation.tasks):
            message = f"{key} decides the questions, and scores on different ones cannot be compared"
            raise UsageProblem(message, mend=f"leave {key} out; other questions need a workspace of their own")
        if key == "federation.clients" and not workspace.agreement.is_of_one_slm:
            mend = f"leave {key} out; a study with other clients needs a workspace of its own"
            raise UsageProblem(f"{key} decides whose models there are, and each is compared with itself", mend=mend)
        if not values:
            raise UsageProblem(f"no value for {key}", mend=f"such as --set {key}=1,2")
    if not grid:
        raise UsageProblem("nothing to vary", mend="such as --set distillation.lambda_slm=0,0.5,1")
    points: list[Changes] = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = Counter(map(point_name, points))
    if twice := [name for name, count in names.items() if count > 1]:
        mend = "sweep over one of them at a time, or leave out what is said twice"
        raise UsageProblem(f"two combinations would have the same folder: sweeps/{twice[0]}", mend=mend)
    return points


def point_name(settings: Changes) -> str:
    """A folder's name that says what is set: lambda_slm=0.5,order=alternating. Tables are named where they must be."""
    words = []
    for key, value in settings.items():
        last = key.rpartition(".")[2]
        is_unique = sum(other.rpartition(".")[2] == last for other in settings) == 1
        text = re.sub(r"[^A-Za-z0-9._+-]+", "-", changing.in_words(value)).strip("-")
        words.append(f"{last if is_unique else key}={text}")
    name = ",".join(words)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{sha256(name.encode()).hexdigest()[:8]}"


def _studies(
    workspace: Workspace, grid: Mapping[str, Sequence[Any]], points: list[Changes], workspaces: list[Workspace]
) -> list[tuple[Changes, Study]]:
    """One for each combination of what is not the seed. Raises Refused for one of other rows than lie there."""
    from stages.study.results import Derived, Study, check_rows

    found: dict[str, tuple[Changes, Study]] = {}
    for settings, place in zip(points, workspaces, strict=True):
        federation = place.agreement.federation
        shown = {key: value for key, value in settings.items() if key != SEED}
        _, study = found.setdefault(point_name(shown), (shown, Study(workspace, {})))
        study.runs[federation.seed] = {federation.method: place}
        study.derived.append(Derived(workspace, place.root, settings, _command(grid)))
    for _, study in found.values():
        check_rows(study)
    return list(found.values())


def _rows(studies: list[tuple[Changes, Study]], metric: str, *, client_scores: bool) -> list[Row]:
    from stages.study.scores import check_one_attack
    from stages.study.statistics import difference, estimate

    each = [_scores(study, metric, client_scores=client_scores) for _, study in studies]
    for settings, study in studies:
        if not any(key.startswith(ATTACK) for key in settings):
            check_one_attack([*studies[0][1].attacks[:1], *study.attacks[:1]], f"{metric} of {settings}")
    scored = [{table: own[table] for table in own if all(table in other for other in each)} for own in each]
    first = scored[0]
    return [
        Row(
            settings,
            {table: estimate(scores) for table, scores in own.items()},
            None if own is first else {table: difference(scores, first[table]) for table, scores in own.items()},
        )
        for (settings, _), own in zip(studies, scored, strict=True)
    ]


def _scores(study: Study, metric: str, *, client_scores: bool) -> dict[Table, np.ndarray]:
    """Of each of the federation's models, over all questions of all tasks: [seeds, questions]."""
    import numpy as np

    from stages.study import scores, table_rows

    method = study.methods[0]
    point = study.runs[study.seeds[0]][method]
    tables = [table for table, rows in table_rows.rows_of(point).items() if method in rows]
    if point.agreement.averages and not client_scores:
        tables.remove("clients")
    means = {table: scores.mean_of(scores.scores(study, table, method, metric)) for table in tables}
    return {table: np.concatenate(list(by_task.values()), axis=1) for table, by_task in means.items()}
