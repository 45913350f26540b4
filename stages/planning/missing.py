"""What a workspace names and this machine does not have: models, data, tasks' datasets, each with what mends it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.bases import base_files, base_folders
from stages.data.examples import Tokenizer, encode
from stages.parties import encryption_keys, names
from stages.parties.enrolment import only_party
from stages.planning.rows_ahead import RowsAhead
from stages.runtime.errors import Damaged, Problem
from stages.workspace.budgets import Budget
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES, Role

MOST_NAMED = 8
"""Files that one line names before it counts them."""


@dataclass(frozen=True)
class Missing:
    """What is not here, and the command or the act that mends it."""

    what: str
    mend: str


def missing(
    workspace: Workspace,
    *,
    roles: Sequence[Role] | None = None,
    scores: bool = True,
    clients: Sequence[int] | None = None,
) -> list[Missing]:
    """All of it; the hub is not asked. What only other parties need is not missing where one party's data are here.

    roles: the base models that are needed here, by default those of the parties whose data are. scores: whether the
    tasks are. clients: who needs the public rows here, by default each client whose own rows are.
    """
    if roles is None:
        roles = ["slm"] if _is_of_clients_alone(workspace) else ROLES
    models = [one for role in roles for view in _views(workspace, role) for one in _model(view, role)]
    data = [*_data(workspace), *_public_rows(workspace, clients)]
    libraries = [*_bitsandbytes(workspace, roles), *_tenseal(workspace)]
    return [*models, *libraries, *data, *(_tasks(workspace) if scores else [])]


def missing_model(view: Workspace, role: Role) -> list[Missing]:
    """Of one model alone, as the party sees the workspace that has it: its files, and what holds it in few bits."""
    return [*_model(view, role), *_bitsandbytes(view, [role])]


def refused_rows(
    ahead: RowsAhead, path: Path, tokenizer: Tokenizer | None, budget: Budget, context: int, *, unlabelled: bool = False
) -> list[Missing]:
    """The first row of a file that training on it would refuse; none if the file is neither here nor to be dealt.

    tokenizer: None where it is not here, and nothing is known of lengths. context: of the model that reads the rows.
    unlabelled: whether rows without a completion may be among them.
    """
    workspace, rows = ahead.workspace, ahead.of(path, unlabelled=unlabelled)
    if problem := ahead.refused.get(path):
        first = problem.message.splitlines()[0]
        return [Missing(f"rows that can be trained on: in {workspace.shown(path)}, {first}", problem.mend or "")]
    if not rows or tokenizer is None:
        return []
    if unlabelled and workspace.agreement.needs_completions and all(row.completion is None for row in rows):
        what = f"rows that can be trained on: no row of {workspace.shown(path)} has a completion"
        return [Missing(what, "put rows with a completion there")]
    limits = {"max_length": budget.max_length, "context": context}
    try:
        encode(rows, tokenizer, **limits, too_long=workspace.agreement.data.too_long, path=path)
    except Problem as problem:
        what = f"rows that can be trained on: in {workspace.shown(path)}, {problem.message}"
        return [Missing(what, problem.mend or "")]
    return []


def _is_of_clients_alone(workspace: Workspace) -> bool:
    """Whether only clients' rows are here, or belong here, of a federation that has a server."""
    federation = workspace.agreement.federation
    has_server = federation.averages or federation.server_tells
    return has_server and bool(_clients_here(workspace)) and not workspace.auxiliary_data.exists()


def _clients_here(workspace: Workspace) -> list[int]:
    """Those whose rows are here; where there are none yet, the one that the folder was made for."""
    here = [k for k in workspace.clients if workspace.client_data(k).exists()]
    party = None if here else only_party(workspace)
    return here if party in (None, names.SERVER) else [names.number_of(party)]


def _views(workspace: Workspace, role: Role) -> list[Workspace]:
    """The workspace as those see it who need a model of their own here: the clients here; each, if there is none."""
    if role == "llm" or workspace.client is not None or workspace.agreement.is_of_one_slm:
        return [workspace]
    here = _clients_here(workspace)
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
    return [Missing(what, base_folders.fetching(workspace, role))]


def _bitsandbytes(workspace: Workspace, roles: Sequence[Role]) -> list[Missing]:
    wanted = [role for role in roles if workspace.agreement.model_of(role).quantization]
    if not wanted:
        return []
    from stages.models import quantization

    if quantization.is_installed():
        return []
    what = f"bitsandbytes, for {' and '.join(f'{role}.quantization' for role in wanted)}"
    return [Missing(what, quantization.INSTALL)]


def _tenseal(workspace: Workspace) -> list[Missing]:
    if workspace.agreement.aggregation.key_holder is None or importlib.util.find_spec("tenseal") is not None:
        return []
    return [Missing("TenSEAL, for aggregation.mode", encryption_keys.INSTALL)]


def _data(workspace: Workspace) -> list[Missing]:
    parties = [workspace.auxiliary_data, *(workspace.client_data(k) for k in workspace.clients)]
    if any(path.exists() for path in parties):
        return []
    if party := only_party(workspace):
        own = parties[0] if party == names.SERVER else workspace.client_data(names.number_of(party))
        return [Missing("training data", f"put JSONL rows into {workspace.shown(own)}")]
    data = workspace.agreement.data
    if not (data.tasks or data.files) or not workspace.is_simulation:
        simulates = ", or set simulation = true in machine.toml where one person plays all parties"
        mend = f"put JSONL rows into {workspace.shown(parties[1])} and so on{simulates}"
        return [Missing("training data", mend)]
    absent = [name for name in data.files if not workspace.local(name).exists()]
    if absent:
        return [Missing(f"the data file {name}", f"correct data.files in {AGREEMENT}") for name in absent]
    return [Missing("training data", str(Command("prepare")))]


def _public_rows(workspace: Workspace, clients: Sequence[int] | None) -> list[Missing]:
    """The public rows of these clients, or of those here; or how all have them, where nobody's data are here."""
    if not workspace.agreement.federation.learns_in_public:
        return []
    what = "the public rows, the same file at every party"
    needed = _clients_here(workspace) if clients is None else clients
    absent = [place for place in map(workspace.public_data, needed) if not place.exists()]
    if absent:
        places = ", ".join(map(workspace.shown, absent[:MOST_NAMED]))
        more = f" and so on, for {len(absent)} clients" if len(absent) > MOST_NAMED else ""
        dealt = f"; in a simulation, `{Command('prepare')}` does" if workspace.is_simulation else ""
        return [Missing(what, f"put them into {places}{more}{dealt}")]
    if needed or workspace.auxiliary_data.exists() or workspace.is_simulation:
        return []
    at_client, at_server = (workspace.shown(workspace.public_data(party)) for party in (1, None))
    return [Missing(what, f"put them into {at_client} and so on, at the server into {at_server}")]


def _tasks(workspace: Workspace) -> list[Missing]:
    """Tasks that rows are still to be made of, and those that are scored here; a client's own machine loads none."""
    from stages.data import tasks

    if _is_of_clients_alone(workspace):
        return []
    rows = _clients_here(workspace)
    dealt, scored, found = workspace.agreement.data.tasks, workspace.evaluation.tasks, []
    for name in dict.fromkeys([*(dealt if not (rows and scored) else []), *scored]):
        try:
            with base_folders.offline():
                tasks.load(workspace, [name])
        except Problem as problem:
            found.append(Missing(problem.message.splitlines()[0], problem.mend or ""))
    return found
