"""A4: what is told of an adapter's numbers where the round was given up."""

from __future__ import annotations

from pathlib import Path

from stages.aggregate import aggregate
from stages.audit.audit import audit
from stages.broadcast import broadcast
from stages.workspace.paths import Workspace


def test_an_aggregate_that_kept_the_first_broadcast_is_rightly_without_a_b(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    aggregate(workspace, round=1, keep_old=True)
    assert not [one for one in audit([workspace_folder]) if "every B is zero" in one.found]
    manifest = workspace.aggregate(1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kept_old": 1.0', '"kept_old": 0.0'))
    assert [one for one in audit([workspace_folder]) if one.level == "WARN" and "every B is zero" in one.found]
