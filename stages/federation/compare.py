"""compare: the paper's Tables 1 and 2 for this workspace: every method on the same data, with the same budgets.

Reads results/ and manifests of the workspace, its baselines/ and its seeds/; with seeds it first runs what is missing.
Writes nothing else. Names no winner that the error bars do not support.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.evaluate import evaluate
from stages.federation.run import derived, run, score_bases
from stages.federation.time_left import TimeLeft, rounds_to_make
from stages.runtime.events import Report, ignore
from stages.study import comparison
from stages.workspace.commands import Command
from stages.workspace.methods import Compared
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.paper.reported import Setting


def compare(
    workspace: Workspace,
    *,
    seeds: Sequence[int] | None = None,
    methods: Sequence[Compared] | None = None,
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
    methods: Sequence[Compared],
    each_round: bool = True,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> None:
    """Run every method from every seed, as far as that is not done; and score the bases."""
    from stages.models.loading import Models
    from stages.study import variants
    from stages.study.of_fedavg import federation_of

    for method in set(methods) - {workspace.agreement.federation.method}:
        with contextlib.suppress(variants.NotYetKnown):  # its own federation is the first to run
            variants.check_baseline(workspace, method)  # what it cannot have is refused before hours of work
    models = models or Models(workspace)
    if any(federation_of(method).distils for method in methods):
        models.check_both()
    score_bases(workspace, partial(evaluate, workspace, models=models, report=report))
    in_order = _in_order(workspace, methods)
    places = [_place(workspace, seed, method) for seed in seeds for method in in_order]
    to_make = [rounds_to_make(place, workspace, overwrite=overwrite) for place in places]
    left = TimeLeft(list(zip(in_order * len(seeds), to_make, strict=True)), report)
    for number, seed in enumerate(seeds):
        own = _of_seed(workspace, seed, seeds, overwrite=overwrite, report=report)
        for place, method in enumerate(in_order, number * len(in_order) + 1):
            left.begin(f"{place} of {len(places)}: {method}, seed {seed}")
            asked = models.of(own)
            run(own, method=method, each_round=each_round, overwrite=overwrite, models=asked, report=left.report)
            left.end()


def spread_all(
    workspace: Workspace,
    *,
    seeds: Sequence[int],
    methods: Sequence[Compared] | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> Path:
    """Write job scripts for every method from every seed, and one that submits them all. Returns that one's path."""
    from stages.federation.spread import spread
    from stages.study import table_rows, variants

    comparison.check_no_baseline(workspace)
    wanted = list(methods or table_rows.methods_of(workspace))
    for method in set(wanted) - {workspace.agreement.federation.method}:
        variants.check_baseline(workspace, method)  # refused before anything is written
    found = []
    for seed in seeds:
        own = _of_seed(workspace, seed, seeds, overwrite=overwrite, report=report)
        for method in _in_order(workspace, wanted):
            if method == own.agreement.federation.method:
                found.append(own)
                continue
            made_by = Command("run", method=method)
            baseline = variants.baseline(own, method)
            found.append(derived(own, *baseline, made_by=made_by, overwrite=overwrite, report=report))
    told_by = Command(
        "compare", seeds=",".join(map(str, seeds)), methods=",".join(methods) if methods else None, collect=True
    )
    return spread(workspace, found, study="compare", collected_by=told_by, report=report)


def _in_order(workspace: Workspace, methods: Sequence[Compared]) -> list[Compared]:
    """The workspace's own first, on whose budgets others may rest."""
    return sorted(methods, key=lambda one: one != workspace.agreement.federation.method)


def _of_seed(workspace: Workspace, seed: int, seeds: Sequence[int], *, overwrite: bool, report: Report) -> Workspace:
    """The workspace of a seed, made if need be."""
    from stages.study import variants

    if seed == workspace.agreement.federation.seed:
        return workspace
    made_by = Command("compare", seeds=",".join(map(str, seeds)))
    replica = variants.replica(workspace, seed)
    return derived(workspace, *replica, made_by=made_by, overwrite=overwrite, report=report)


def _place(workspace: Workspace, seed: int, method: Compared) -> Path:
    """Where a method from a seed has its folder, there or not."""
    federation = workspace.agreement.federation
    own = workspace if seed == federation.seed else Workspace(workspace.replica(seed))
    return own.root if method == federation.method else own.baseline(method)
