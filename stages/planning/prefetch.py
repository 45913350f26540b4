"""prefetch: base models and the tasks' datasets into the hub's cache, on a machine that has a network.

Reads fedcollm.toml, machine.toml and tasks/. Writes the hub's and the datasets' caches; nothing into the workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from stages.bases import base_files, base_folders
from stages.bases.base_names import name_of
from stages.runtime.errors import NotReady
from stages.runtime.events import Event, Report, ignore
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


@dataclass(frozen=True)
class Fetched:
    """A model or a task's dataset that is here now, and whether it was before. where: a model's folder."""

    name: str
    was_here: bool
    where: str | None = None


def prefetch(
    workspace: Workspace,
    *,
    model: Role | None = None,
    client: int | None = None,
    tasks: bool = True,
    report: Report = ignore,
) -> list[Fetched]:
    """Fetch what is not here yet. Raises NotReady, naming the first that is not to be had.

    model: that one only; a client needs no LLM. client: only the SLM of this client; without either, all that somebody
    tunes. tasks: whether to fetch the datasets of the tasks too.
    """
    report(Event("stage", "prefetch"))
    wanted: list[Callable[[], Fetched]] = [partial(_model, *one) for one in _models(workspace, model, client)]
    if tasks:
        data, scored = workspace.agreement.data.tasks, workspace.evaluation.tasks
        wanted += [partial(_task, workspace, name) for name in dict.fromkeys([*data, *scored])]
    found = []
    for number, fetch in enumerate(wanted, 1):
        found.append(fetch())
        report(Event("step", found[-1].name, number, len(wanted)))
    return found


def _models(workspace: Workspace, model: Role | None, client: int | None) -> list[tuple[Workspace, Role]]:
    """Whose models are wanted, and which of theirs."""
    if client is not None:
        return [(workspace.of_client(workspace.check_client(client)), "slm")]
    seen = [workspace.of_client(k) for k in workspace.clients]
    own = [one for one in seen if one.own_model] if model is None else []
    roles: list[Role] = [model] if model else ["slm", "llm"] if len(own) < len(seen) else ["llm"]
    return [*((one, "slm") for one in own), *((workspace, role) for role in roles)]


def _model(workspace: Workspace, role: Role) -> Fetched:
    from stages.models.base_loading import check_unread

    settings = workspace.agreement.model_of(role)
    name, was_here = settings.model, base_folders.whole_folder(workspace, role)
    fetched = was_here or base_folders.folder(workspace, role)
    check_unread(fetched, role, settings.quantization)
    if was_here:
        return Fetched(name_of(workspace, role), True, workspace.shown(fetched))
    if not base_files.weight_files(fetched):
        fetch = base_folders.fetched_by(workspace, role)
        mend = f"put all its files there; or, for a model of the hub, `{fetch}` with a network"
        raise NotReady(f"the {role.upper()} {name} is here without its weights", where=fetched, mend=mend)
    return Fetched(name, False, workspace.shown(fetched))


def _task(workspace: Workspace, name: str) -> Fetched:
    from stages.data import tasks

    try:
        with base_folders.offline():
            tasks.load(workspace, [name])
    except NotReady:
        tasks.load(workspace, [name])
        return Fetched(name, False)
    return Fetched(name, True)
