"""What the parties here enrolled with: that fedcollm.toml and tasks/ are still those."""

from __future__ import annotations

from stages.files import reading
from stages.parties.party import Onlooker, Party, all_of
from stages.parties.roster_files import Federation, parsed
from stages.runtime.errors import Problem, Refused
from stages.workspace import task_files
from stages.workspace.paths import Workspace

MOST_NAMED = 8
"""How many files are named before the rest is counted."""


def check_agreement(workspace: Workspace, party: str | None = None) -> None:
    """Raise Refused if a party, by default any with keys here, has pinned a roster of another agreement."""
    for one in [Party(workspace, party)] if party else all_of(workspace):
        if one.pinned is not None:
            _ = one.members  # which raises


def check_tasks(workspace: Workspace, federation: Federation | None = None, *, may_be_absent: bool = True) -> None:
    """Raise Refused if tasks/ is not what the parties enrolled with, where a roster says what that is.

    federation: by default the one that a party here has pinned, else the one in the exchange. may_be_absent: for who
    uses no task; a party without tasks/ would otherwise take lm-eval's own in their place.
    """
    federation = federation or _trusted(workspace)
    if federation is None or federation.tasks_sha256 is None:
        return
    reading.check_plain(workspace.tasks)
    if may_be_absent and not task_files.own_files(workspace.tasks):
        return
    found = task_files.own_digest(workspace.tasks)
    if found != federation.tasks_sha256:
        message = f"tasks/ is not what the parties enrolled with: sha256 {found[:16]}..., enrolled"
        message = f"{message} {federation.tasks_sha256[:16]}..."
        mend = "copy tasks/ from the server, or undo the edit; or agree anew: `keys --renew`, `enroll --renew`, `join`"
        agreement = workspace.agreement
        if spare := task_files.spare_files(workspace.tasks, [*agreement.evaluation.tasks, *agreement.data.tasks]):
            more = f" and {len(spare) - MOST_NAMED} more" if len(spare) > MOST_NAMED else ""
            message += f"; tasks/ also holds {', '.join(spare[:MOST_NAMED])}{more}"
            mend = f"remove what the server did not send, or {mend}"
        raise Refused(message, where=workspace.tasks, mend=mend)


def _trusted(workspace: Workspace) -> Federation | None:
    for party in all_of(workspace):
        try:
            if party.pinned is not None:
                return parsed(Federation, party.pinned, workspace.federation)
        except (Problem, OSError, ValueError, RecursionError):  # whoever acts as this party says why
            continue
    found = Onlooker(workspace).members
    return found.federation if found else None
