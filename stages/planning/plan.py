"""plan: what each stage will take on this machine, and what is missing here, before anything is loaded or fetched.

Reads the settings, the configurations of the base models, and the rows and tokenizer if they are here; asks no hub.
Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.bases import base_files, base_folders
from stages.bases.base_names import name_of
from stages.planning.rows_ahead import RowsAhead
from stages.runtime.errors import NotReady, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES, Role

if TYPE_CHECKING:
    from stages.models.shapes import Shape
    from stages.planning.missing import Missing
from stages.planning import residuals
from stages.planning.averages import aggregate, updates_of
from stages.planning.estimates import (
    CHECKPOINTS,
    UNKNOWN,
    Here,
    StagePlan,
    client_train,
    co_distill,
    evaluate,
    in_two_phases,
    longest,
)


@dataclass(frozen=True)
class BaseModel:
    """A base model of the agreement. came_from: where its configuration lies; stored_bytes: on disk, if known.

    modules: the layers with an adapter. held_in: how the base's weights lie in memory, such as float32 or 4bit.
    """

    role: Role
    model: str
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    stored_bytes: int | None
    came_from: str
    dtype: str
    modules: list[str]
    held_in: str


@dataclass(frozen=True)
class Plan:
    """The whole federation.

    two_phases: co-distill's, of the LLM, since the SLM takes less: capture and train.
    sent: bytes that a client, on average, and the server to all clients, sends in a round; residual: what the server
    sends them beside the adapter in the last one, where combine = "residual". Of models that learn on
    public rows: what each client tells and is told, in a round and once. disk: bytes by part, of all rounds and parties
    in one folder. is_to_be_dealt: whether the rows are those that prepare would deal.
    """

    device: str
    clients: int
    rounds: int
    models: list[BaseModel]
    stages: list[StagePlan]
    two_phases: list[StagePlan]
    sent: Mapping[str, int]
    disk: Mapping[str, int]
    missing: list[Missing]
    is_to_be_dealt: bool


def plan(workspace: Workspace, *, length: int | None = None, report: Report = ignore) -> Plan:
    """What lies ahead. length: plan for rows of so many tokens, instead of the longest row here or max_length.

    Raises UsageProblem where the settings ask for what cannot be: a device, target modules, a configuration, two models
    of different tokenizers.
    """
    from stages.models import devices, shapes
    from stages.models.loading import Models
    from stages.planning.missing import missing

    device = devices.device_of(workspace.machine)
    ahead = RowsAhead(workspace)
    if workspace.agreement.federation.learns_in_public:
        return _in_public(ahead, device, length, report)
    found: dict[Role, Shape] = {}
    for role in ROLES:
        report(Event("stage", f"the shape of the {role.upper()}"))
        kept_in = devices.precision(workspace, role, device)[1]
        try:
            found[role] = shapes.of_workspace(workspace, role, kept_in)
        except NotReady:
            continue  # it is among the missing
    if workspace.agreement.federation.distils:
        Models(workspace).check_both()
    here = Here(workspace, device, found, length)
    if length is not None and not 2 <= length <= longest(here):
        message = f"rows of {length} tokens: a row has 2 at least, and these models take {longest(here)}"
        raise UsageProblem(message, mend="give another --length, or leave it out")
    report(Event("stage", "rows and questions"))
    tokenizer = _tokenizer(workspace)
    clients = ahead.extent([workspace.client_data(k) for k in workspace.clients], tokenizer)
    auxiliary = ahead.extent([workspace.auxiliary_data], tokenizer, unlabelled=True)
    questions = ahead.questions(tokenizer)
    absent = [*missing(workspace), *_refused_rows(here, ahead, tokenizer)]
    report(Event("stage", "memory of each stage"))
    counted = [
        partial(client_train, here, clients),
        partial(aggregate, here),
        partial(co_distill, here, auxiliary),
        *(partial(evaluate, here, role, clients or auxiliary, questions) for role in ROLES),
    ]
    stages = []
    for number, count in enumerate(counted, 1):
        stages.append(count())
        report(Event("step", step=number, total=len(counted)))
    return Plan(
        str(device),
        len(workspace.clients),
        workspace.agreement.federation.rounds,
        [_base_model(here, role) for role in found],
        stages,
        in_two_phases(here, auxiliary),
        _sent(here),
        _disk(here),
        absent,
        bool(ahead.dealt),
    )


def _in_public(ahead: RowsAhead, device: Any, length: int | None, report: Report) -> Plan:
    """The same where every model trains by itself, in its own memory."""
    from stages.planning import in_public
    from stages.planning.knowledge_cost import knowledge_cost
    from stages.planning.missing import missing

    workspace = ahead.workspace
    report(Event("stage", "the shape of each model"))
    sides = in_public.sides_of(workspace, device, length)
    context = min(longest(side.here) for side in sides)
    if length is not None and not 2 <= length <= context:
        message = f"rows of {length} tokens: a row has 2 at least, and these models take {context}"
        raise UsageProblem(message, mend="give another --length, or leave it out")
    report(Event("stage", "rows and questions"))
    told = knowledge_cost(workspace)
    absent = [*missing(workspace), *in_public.refused_rows_of(sides, ahead)]
    report(Event("stage", "memory of each stage"))
    return Plan(
        str(device),
        len(workspace.clients),
        workspace.agreement.federation.rounds,
        [_base_model(side.here, side.role) for side in sides if side.here.shapes],
        in_public.stages_of(sides, ahead),
        [],
        in_public.sent_in(told),
        in_public.disk_of(sides, told),
        absent,
        bool(ahead.dealt),
    )


def _refused_rows(here: Here, ahead: RowsAhead, tokenizer: Any) -> list[Missing]:
    """The rows that training would refuse: the first of each file."""
    from stages.planning.missing import refused_rows

    workspace, agreement = here.workspace, here.workspace.agreement
    context = here.shapes["slm"].context if "slm" in here.shapes else UNKNOWN
    private = [
        one
        for k in workspace.clients
        for one in refused_rows(ahead, workspace.client_data(k), tokenizer, agreement.client_training, context)
    ]
    auxiliary = workspace.auxiliary_data
    return private + refused_rows(ahead, auxiliary, tokenizer, agreement.distillation, longest(here), unlabelled=True)


# --- rows


def _tokenizer(workspace: Workspace) -> Any:
    """The SLM's tokenizer, or None where it is not here."""
    from stages.models.base_loading import load_tokenizer

    folder = base_folders.configuration(workspace, "slm")
    return load_tokenizer(folder, "the SLM") if folder and base_files.tokenizer_files(folder) else None


# --- what travels, what stays


def _base_model(here: Here, role: Role) -> BaseModel:
    from stages.models import adapters, devices, shapes

    shape = here.shapes[role]
    compute, kept = (str(one).removeprefix("torch.") for one in devices.precision(here.workspace, role, here.device))
    stored = shapes.DTYPE_BYTES.get(shape.stored_dtype or "")
    return BaseModel(
        role,
        name_of(here.workspace, role),
        shape.parameters,
        shape.adapter_parameters,
        shapes.file_bytes(shape.layout),
        stored * shape.parameters if stored else None,
        shape.came_from,
        compute,
        adapters.modules(shape.model),
        shape.quantization or kept,
    )


def _sent(here: Here) -> dict[str, int]:
    from stages.models import shapes

    if "slm" not in here.shapes:
        return {}
    layout = here.shapes["slm"].layout
    agreement = here.workspace.agreement
    _, update_bytes = updates_of(agreement, layout)
    clients, last = len(here.workspace.clients), residuals.bytes_of(agreement, layout)[-2]
    sums = update_bytes if agreement.aggregation.key_holder else 0  # to the one client that opens them
    to_all = {"client": update_bytes, "server": clients * shapes.file_bytes(layout) + sums}
    return to_all | ({"residual": clients * last} if last else {})


def _disk(here: Here) -> dict[str, int]:
    """exchange: a broadcast and K updates a round; their sum too, where that travels. checkpoints: of co-distill."""
    from stages.models import shapes

    if len(here.shapes) < len(ROLES):
        return {}
    slm, llm = (shapes.file_bytes(here.shapes[role].layout) for role in ROLES)
    _, update = updates_of(here.workspace.agreement, here.shapes["slm"].layout)
    federation, adds = here.workspace.agreement.federation, here.workspace.agreement.aggregation.key_holder is not None
    trained = sum(shape.adapter_parameters for shape in here.shapes.values())
    beneath = residuals.bytes_of(here.workspace.agreement, here.shapes["slm"].layout)
    remembered = max(
        here.workspace.agreement.client_training.remembered, here.workspace.agreement.distillation.remembered
    )
    return {
        "exchange": federation.rounds * (slm + (federation.clients + adds) * update) + sum(beneath[:-1]),
        "server": federation.rounds * (2 * slm + llm) + 2 * sum(beneath[1:]),
        "checkpoints": CHECKPOINTS * shapes.FLOAT32_BYTES * (1 + remembered) * trained,
    }
