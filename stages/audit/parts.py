"""Which matrices of an adapter a folder is to hold: both, but of what clients send where they train A or B alone."""

from __future__ import annotations

from collections.abc import Collection

from stages.artefacts.adapter_files import A, B
from stages.audit.folders import Folder
from stages.workspace.averaging import Factors


def is_kept(folder: Folder) -> bool:
    """Whether it is a client's adapter that stays with the client, who sends something made of it."""
    manifest, workspace, agreement = folder.manifest, folder.scope.workspace, folder.scope.agreement
    if manifest is None or manifest.client is None or workspace is None or agreement is None:
        return False
    return workspace.sends_of_theirs and folder.path == workspace.client_adapter(manifest.round, manifest.client)


def factors_of(folder: Folder, names: Collection[str]) -> Factors:
    """By the agreement; outside of every workspace, by the names of the tensors that are there."""
    manifest, agreement = folder.manifest, folder.scope.agreement
    if manifest is None or manifest.stage != "client-train" or is_kept(folder):
        return "AB"
    if agreement is not None:
        return agreement.sent_in(manifest.round)
    has_a, has_b = (any(name.endswith(end) for name in names) for end in (A, B))
    return "AB" if has_a == has_b else "A" if has_a else "B"
