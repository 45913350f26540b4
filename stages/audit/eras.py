"""A workspace that was forked has two eras: up to the fork its rounds are of the agreement of another study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stages.audit.folders import Scope, folders_in
from stages.workspace.names import round_of


def in_eras(scopes: Sequence[Scope]) -> Iterator[tuple[Scope, list[Path]]]:
    """Each scope with the adapter folders in it; of a fork first the scope as it was, with the rounds until then."""
    for scope in scopes:
        paths = folders_in(scope)
        if scope.agreement and scope.workspace and (earlier := scope.workspace.before_fork):
            fork = scope.agreement.federation.fork
            before = [path for path in paths if fork.has(_round(path))]
            yield replace(scope, workspace=earlier), before
            paths = [path for path in paths if path not in before]
        yield scope, paths


def _round(path: Path) -> int | None:
    return next((number for part in reversed(path.parts) if (number := round_of(part))), None)
