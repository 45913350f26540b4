"""compare: the paper's Tables 1 and 2 for this workspace: every method on the same data, with the same budgets.

Reads results/ and manifests of the workspace, its baselines/ and its seeds/; with seeds it first runs what is missing.
Writes nothing else. Names no winner that the error bars do not support.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from stages.evaluate import evaluate
from stages.federation.run import derived, run, score_bases
from stages.runtime.events import Event, Report, ignore
from stages.study import comparison
from stages.workspace.agreement import Method
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.paper.reported import Setting


def compare(
    workspace: Workspace,
    *,
    seeds: Sequence[int] | None = None,
    methods: Sequence[Method] | None = None,
    paper: Setting | None = None,
    metric: str = "acc",
    collect: bool = False,
    each_round: bool = True,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> comparison.Comparison:
    """Run what is missing of the seeds that are given, unless collect is set; then compare, as study's compare does.

    each_round: as run has it.
    """
    from stages.study import table_rows

    comparison.check_no_baseline(workspace)
    if seeds and not collect:
        wanted = list(methods or table_rows.methods_of(workspace))
        kept = {"each_round": each_round, "overwrite": overwrite}
        run_all(workspace, seeds=seeds, methods=wanted, **kept, models=models, report=report)
    return comparison.compare(workspace, seeds=seeds, methods=methods, paper=paper, metric=metric, report=report)


def run_all(
    workspace: Workspace,
    *,
    seeds: Sequence[int],
    methods: Sequence[Method],
    each_round: bool = True,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> None:
    """Run every method from every seed, as far as that is not done; and score the bases."""
    from stages.models.loading import Models
    from stages.study import variants

    for method in set(methods) - {workspace.agreement.federation.method}:
        variants.baseline(workspace, method)  # what this workspace cannot have is refused before hours of work
    models = models or Models(workspace)
    score_bases(workspace, partial(evaluate, workspace, models=models, report=report))
    for seed in seeds:
        own = workspace
        if seed != workspace.agreement.federation.seed:
            made_by = Command("compare", seeds=",".join(map(str, seeds)))
            replica = variants.replica(workspace, seed)
            own = derived(workspace, *replica, made_by=made_by, overwrite=overwrite, report=report)
        for method in sorted(methods, key=lambda one: one != own.agreement.federation.method):  # on whose budgets
            report(Event("round", f"{method}, seed {seed}"))
            asked = models.of(own)
            run(own, method=method, each_round=each_round, overwrite=overwrite, models=asked, report=report)
