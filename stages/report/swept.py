"""The sweeps of a workspace, as a table of the report: what each combination of settings scored at the end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stages.report.findings import SUBJECTS, scored_by_method
from stages.report.own_rows import Table
from stages.runtime.errors import Problem
from stages.study.results import Study
from stages.workspace import changing, edits, listing
from stages.workspace.paths import Workspace

MODELS = {"llm": "the LLM", "slm": "the server's SLM", "clients": "clients' own SLMs", "aggregate": "the average"}
SEED = "federation.seed"


def tables(workspace: Workspace, metric: str) -> list[Table]:
    """One table, or none where nothing was swept. A combination without sound scores has none."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for point in listing.swept(workspace):
        try:
            own = Workspace(point, workspace.flags)
            found_here = edits.differences(workspace.agreement_of_all, own.agreement_of_all)
            changed = {key: value for key, _, value in found_here}
            seed = changed.pop(SEED, workspace.agreement.federation.seed)
            said = ", ".join(f"{key} = {changing.in_words(value)}" for key, value in changed.items())
            found.setdefault(said or "as agreed", {})[seed] = _scores(own, metric)
        except Problem:  # fedcollm sweep --collect says what is wrong with it
            continue
    models = [model for model in MODELS if any(model in one for seeds in found.values() for one in seeds.values())]
    rows = [
        [said, ", ".join(map(str, sorted(seeds))), *(_mean(seeds, model) for model in models)]
        for said, seeds in sorted(found.items())
    ]
    columns = ["Settings", "Seeds", *(f"{MODELS[model]}, %" for model in models)]
    return [Table(f"Sweeps: {metric} after the last round", columns, rows)] if models else []


def _scores(point: Workspace, metric: str) -> dict[str, float]:
    """The accuracy of each model in [0, 1], over all questions."""
    federation = point.agreement.federation
    study = Study(point, {federation.seed: {federation.method: point}})
    found = {
        model: scored_by_method(study, federation.method, federation.rounds, of[federation.method], metric)
        for model, of in SUBJECTS.items()
        if federation.method in of
    }
    return {model: float(scores.mean()) for model, scores in found.items() if scores is not None}


def _mean(seeds: Mapping[int, Mapping[str, float]], model: str) -> str:
    values = [100 * one[model] for one in seeds.values() if model in one]
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
