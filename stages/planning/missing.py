"""What a workspace names and this machine does not have: models, data, tasks' datasets, each with what mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.bases import base_files, base_folders
from stages.runtime.errors import Damaged, Problem
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES, Role


@dataclass(frozen=True)
class Missing:
    """What is not here, and the command or the act that mends it."""

    what: str
    mend: str


def missing(workspace: Workspace, *, roles: Sequence[Role] = ROLES, scores: bool = True) -> list[Missing]:
    """All of it; the hub is not asked. Data of other parties are not missing where one party's are here.

    roles: the base models that are needed here. scores: whether the tasks are.
    """
    models = [one for role in roles for view in _views(workspace, role) for one in _model(view, role)]
    return [*models, *_bitsandbytes(workspace, roles), *_data(workspace), *(_tasks(workspace) if scores else [])]


def missing_model(view: Workspace, role: Role) -> list[Missing]:
    """Of one model alone, as the party sees the workspace that has it: its files, and what holds it in few bits."""
    return [*_model(view, role), *_bitsandbytes(view, [role])]


def _views(workspace: Workspace, role: Role) -> list[Workspace]:
    """The workspace as those see it who need a model of their own here: the clients here; each, if there is none."""
    if role == "llm" or workspace.client is not None or workspace.agreement.is_of_one_slm:
        return [workspace]
    here = [k for k in workspace.clients if workspace.client_data(k).exists()]
    if not here and workspace.auxiliary_data.exists():
        return []
    views = [workspace.of_client(k) for k in here or workspace.clients]
    return list({view.own_model: view for view in views}.values())


def _model(workspace: Workspace, role: Role) -> list[Missing]:
    of_slm = f"of client {workspace.own_model}" if workspace.own_model else "of every party"
    whose = {"slm": of_slm, "llm": "of the server alone"}[role]
    if base_folders.whole_folder(workspace, role):
        return []
    what = f"the {role.upper()} {workspace.agreement.model_of(role).model}, {whose}"
    if own := base_folders.own_folder(workspace, role):
        try:
            base_files.weight_files(own)
        except Damaged as problem:
            return [Missing(f"{what}: {problem.message}", problem.mend or "")]
        setting = base_folders.setting(workspace, role)
        return [Missing(what, f"put it into {workspace.shown(own)}, or set {setting} in machine.toml")]
    return [Missing(what, str(base_folders.fetched_by(workspace, role)))]


def _bitsandbytes(workspace: Workspace, roles: Sequence[Role]) -> list[Missing]:
    wanted = [role for role in roles if workspace.agreement.model_of(role).quantization]
    if not wanted:
        return []
    from stages.models import quantization

    if quantization.is_installed():
        return []
    what = f"bitsandbytes, for {' and '.join(f'{role}.quantization' for role in wanted)}"
    return [Missing(what, quantization.INSTALL)]


def _data(workspace: Workspace) -> list[Missing]:
    parties = [workspace.auxiliary_data, *(workspace.client_data(k) for k in workspace.clients)]
    if any(path.exists() for path in parties):
        return []
    data = workspace.agreement.data
    if not (data.tasks or data.files) or not workspace.is_simulation:
        simulates = ", or set simulation = true in machine.toml where one person plays all parties"
        mend = f"put JSONL rows into {workspace.shown(parties[1])} and so on{simulates}"
        return [Missing("training data", mend)]
    absent = [name for name in data.files if not workspace.local(name).exists()]
    if absent:
        return [Missing(f"the data file {name}", f"correct data.files in {AGREEMENT}") for name in absent]
    return [Missing("training data", str(Command("prepare")))]


def _tasks(workspace: Workspace) -> list[Missing]:
    """Tasks that rows are still to be made of, and those that are scored here; a client's own machine loads none."""
    from stages.data import tasks

    federation = workspace.agreement.federation
    rows = [path for path in map(workspace.client_data, workspace.clients) if path.exists()]
    if rows and not workspace.auxiliary_data.exists() and (federation.averages or federation.server_tells):
        return []
    dealt, scored, found = workspace.agreement.data.tasks, workspace.agreement.evaluation.tasks, []
    for name in dict.fromkeys([*(dealt if not (rows and scored) else []), *scored]):
        try:
            with base_folders.offline():
                tasks.load(workspace, [name])
        except Problem as problem:
            found.append(Missing(problem.message.splitlines()[0], problem.mend or ""))
    return found
