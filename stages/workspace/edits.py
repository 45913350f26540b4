"""What was edited in fedcollm.toml since something was made under it, key by key.

A manifest names the agreement by its sha256 alone. So whoever publishes something keeps a copy of the agreement's bytes
below private/, named by that digest; a copy that is not of its name, or no agreement, counts as none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stages.files import reading, writing
from stages.runtime.errors import Problem
from stages.workspace import listing
from stages.workspace.agreement import Agreement
from stages.workspace.names import AGREEMENT, EVALUATION
from stages.workspace.paths import LARGEST_TOML_BYTES, Workspace
from stages.workspace.settings import parse

MOST_NAMED = 8
"""How many keys are named before the rest is counted."""
LONGEST_VALUE = 60


def keep(workspace: Workspace) -> None:
    """Keep a copy of the agreement under which something is being published, once."""
    path = workspace.agreed(workspace.agreement_sha256)
    if not path.exists():
        writing.write(path, workspace.agreement_bytes)


def since(workspace: Workspace, sha256: str) -> str:
    """Which keys have other values than in the agreement of this digest, and how to undo that.

    Empty for the agreement that is here now, and where this machine has no copy.
    """
    return "" if sha256 == workspace.agreement_sha256 else _since(workspace, workspace.agreed(sha256), sha256)


def among(workspace: Workspace, sha256: str, is_meant: Callable[[str], bool]) -> str:
    """As since, of some keys alone. is_meant: whether a text is of such a key, which it begins with."""
    changes = _changes_since(workspace, workspace.agreed(sha256), sha256) or []
    return _first([change for change in changes if is_meant(change)])


def _since(workspace: Workspace, copy: Path, sha256: str | None = None) -> str:
    """The same for a copy, of this digest, or of one that begins as its name says."""
    changes = _changes_since(workspace, copy, sha256)
    if changes is None:
        return ""
    said = _first(changes) or "comments, spaces or order alone, whose bytes count too"
    is_of_scores = bool(changes) and all(change.startswith("evaluation.") for change in changes)
    instead = f"; what {EVALUATION} says instead need not be agreed on" if is_of_scores else ""
    return f"{said} (cp {workspace.shown(copy)} {AGREEMENT} undoes it{instead})"


def _changes_since(workspace: Workspace, copy: Path, sha256: str | None) -> list[str] | None:
    """Each key that has another value than in such a copy; None where there is none."""
    try:
        content = reading.read(copy, limit_bytes=LARGEST_TOML_BYTES)
        found = reading.sha256(content)
        if found != sha256 and (sha256 or not found.startswith(copy.stem)):
            return None
        before = parse(Agreement, content, copy)
        changes = differences(before, workspace.agreement)
        return [f"{name} was {_shown(old)}, is {_shown(new)}" for name, old, new in changes]
    except (Problem, OSError):  # no such copy; or what is there now is no agreement, and says so itself
        return None


def _first(changes: list[str]) -> str:
    more = f"; and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
    return "; ".join(changes[:MOST_NAMED]) + more


def since_last(workspace: Workspace) -> str:
    """The same since this machine last published something, unless that was under the agreement that is here now."""
    try:
        kept = {path: path.stat().st_mtime_ns for path in listing.agreements(workspace)}
        if before := workspace.before_fork:  # which was not edited: the fork has its own
            kept.pop(workspace.agreed(before.as_agreed), None)
        is_new = workspace.agreed(workspace.agreement_sha256) not in kept
        return _since(workspace, max(kept, key=kept.__getitem__)) if kept and is_new else ""
    except (Problem, OSError):  # what is said beside another fault, and must not hide it
        return ""


def differences(before: Agreement, after: Agreement) -> Iterator[tuple[str, Any, Any]]:
    """Each dotted key with another value in the second agreement, the value before, and that after; None: not set."""
    yield from _differences(before.model_dump(), after.model_dump(), "")


def _differences(before: dict[str, Any], after: dict[str, Any], place: str) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*before, *after]):  # of clients' tables each may have some that the other lacks
        old, new, name = before.get(key), after.get(key), f"{place}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name}.")
        elif old != new:
            yield name, old, new


def _shown(value: Any) -> str:
    """As TOML has it, nearly; None is a key that is not set."""
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
