"""The first lines of the report: what was measured, and of which models."""

from __future__ import annotations

from collections.abc import Iterable

from stages.bases.base_names import name_of
from stages.runtime.texts import in_line
from stages.workspace.paths import Workspace


def measured(workspace: Workspace) -> str:
    """Methods, clients, rounds and seeds in a sentence; and the models in another."""
    from stages.paper.reported import LABELS
    from stages.study.results import begun

    federation = workspace.agreement.federation
    seeds, methods = begun(workspace)
    others = [LABELS[method] for method in methods if method != federation.method]
    beside = f", beside {listed(others)}" if others else ""
    return (
        f"{LABELS[federation.method]}{beside}: {_count(federation.clients, 'client')}, "
        f"{_count(federation.rounds, 'round')}, seed{'s' if len(seeds) > 1 else ''} {listed(map(str, seeds))}. "
        f"{_models(workspace)}."
    )


def _models(workspace: Workspace) -> str:
    from stages.report.page import without_folders

    own: dict[str, list[str]] = {}
    for k in workspace.clients:
        if (seen := workspace.of_client(k)).own_model:
            own.setdefault(name_of(seen, "slm"), []).append(str(k))
    said = [f"LLM: {name_of(workspace, 'llm')}"]
    if len(own) < len(workspace.clients):
        said.append(f"SLM: {name_of(workspace, 'slm')}")
    said += [f"client{'s' if len(ks) > 1 else ''} {listed(ks)}: {name}" for name, ks in own.items()]
    return in_line(without_folders("; ".join(said)))


def listed(names: Iterable[str]) -> str:
    """One, two and three."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
