"""plan, of a federation whose models learn on public rows: each model by itself, never two in one memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stages.data.examples import Extent
from stages.planning.averages import aggregate
from stages.planning.estimates import (
    CHECKPOINTS,
    Here,
    StagePlan,
    asked_stage,
    batches_of,
    beside_a_capture,
    client_train,
    evaluate,
    longest,
    trained_stage,
)
from stages.planning.knowledge_cost import InPublic, Told
from stages.planning.rows_ahead import RowsAhead
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.planning.missing import Missing


@dataclass(frozen=True, eq=False)
class Side:
    """One model, who tunes it, what is known of it here, and its tokenizer, if that is here too."""

    role: Role
    clients: tuple[int, ...]
    here: Here
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def whose(self) -> str:
        """As the table of stages shows it."""
        if self.role == "llm":
            return "server"
        every = len(self.clients) == len(self.here.workspace.clients)
        names = "each client" if every else f"client {', '.join(map(str, self.clients))}"
        return names if len(self.clients) < 4 or every else f"{len(self.clients)} clients"


def sides_of(workspace: Workspace, device: torch.device, length: int | None) -> list[Side]:
    """Every model of the federation: clients' by those who share one, then the LLM."""
    shared: dict[int | None, list[int]] = {}
    for client in workspace.clients:
        shared.setdefault(workspace.of_client(client).own_model, []).append(client)
    found = [_side(workspace.of_client(clients[0]), "slm", clients, device, length) for clients in shared.values()]
    return [*found, _side(workspace, "llm", [], device, length)]


def _side(workspace: Workspace, role: Role, clients: Sequence[int], device: torch.device, length: int | None) -> Side:
    from stages.bases import base_files, base_folders
    from stages.models import devices, shapes
    from stages.models.base_loading import load_tokenizer
    from stages.runtime.errors import NotReady

    kept_in = devices.precision(workspace, role, device)[1]
    try:
        shape = {role: shapes.of_workspace(workspace, role, kept_in)}
    except NotReady:  # it is among the missing
        shape = {}
    folder = base_folders.configuration(workspace, role)
    tokenizer = load_tokenizer(folder, f"the {role.upper()}") if folder and base_files.tokenizer_files(folder) else None
    return Side(role, tuple(clients), Here(workspace, device, shape, length), tokenizer)


def stages_of(sides: Sequence[Side], ahead: RowsAhead) -> list[StagePlan]:
    """What each side does in a round, in the order of the steps."""
    workspace = sides[0].here.workspace
    federation = workspace.agreement.federation
    private, public = {side: _private(side, ahead) for side in sides}, {side: _public(side, ahead) for side in sides}
    slms, llm = [side for side in sides if side.role == "slm"], sides[-1]
    found = [_of(side, client_train(side.here, private[side])) for side in slms]
    if federation.clients_tell:
        found += [_of(side, share_knowledge(side.here, "slm", public[side])) for side in slms]
        found.append(_of(llm, alone_in_public("co-distill", llm.here, "llm", public[llm], learns=True)))
    if federation.server_tells:
        told = share_knowledge(llm.here, "llm", public[llm])
        found.append(_of(llm, replace(told, name=f"{told.name} llm")))
    learns = federation.server_tells
    found += [
        _of(side, alone_in_public("client-distill", side.here, "slm", public[side], learns=learns)) for side in slms
    ]
    if workspace.agreement.averages:
        found.append(aggregate(slms[0].here))
    rows = {side: private[side] or public[side] for side in sides}
    asked = {side: ahead.questions(side.tokenizer) for side in sides}
    return [*found, *(_of(side, evaluate(side.here, side.role, rows[side], asked[side])) for side in sides)]


def share_knowledge(here: Here, role: Role, rows: Extent | None) -> StagePlan:
    """What asking a model what it knows of the public rows will take; steps are passes over as many rows at once."""
    budget = here.workspace.agreement.distillation
    sized = batches_of("share-knowledge", "server", here, budget, rows)
    batch = here.workspace.machine.rows_at_once(budget)
    steps = (math.ceil(rows.fewest / batch), math.ceil(rows.most / batch)) if rows else None
    return replace(asked_stage(sized.name, here, role, sized), steps=steps)


def alone_in_public(name: str, here: Here, role: Role, rows: Extent | None, *, learns: bool) -> StagePlan:
    """What training one model alone on the public rows will take. learns: from others too, not from answers alone."""
    from stages.training.losses import DIVERGENCES
    from stages.training.objective import task_loss

    budget = here.workspace.agreement.distillation
    if budget.divergence not in DIVERGENCES:  # those across tokenizers alone keep less of the logits
        budget = budget.model_copy(update={"divergence": "forward"})
    losses = beside_a_capture(role, budget) if learns else task_loss
    return trained_stage(name, "server", here, budget, rows=rows, losses=losses, roles=(role,))


def _of(side: Side, plan: StagePlan) -> StagePlan:
    """Where it runs; of several models, the stage's name tells which."""
    number = f" {side.clients[0]}" if side.here.workspace.own_model and side.role == "slm" else ""
    return replace(plan, name=f"{plan.name}{number}", party=side.whose)


def _private(side: Side, ahead: RowsAhead) -> Extent | None:
    workspace = side.here.workspace
    return ahead.extent([workspace.client_data(k) for k in side.clients], side.tokenizer)


def _public(side: Side, ahead: RowsAhead) -> Extent | None:
    """The public rows, of whichever copy is here."""
    workspace = side.here.workspace
    places = [workspace.public_data(party) for party in (*side.clients, None, *workspace.clients)]
    here = [place for place in places if ahead.of(place, unlabelled=True)][:1]
    return ahead.extent(here, side.tokenizer, unlabelled=True)


def refused_rows_of(sides: Sequence[Side], ahead: RowsAhead) -> list[Missing]:
    """The rows that training would refuse: the first of each file, by whoever reads it."""
    from stages.planning.missing import refused_rows

    found = []
    for side in sides:
        if side.tokenizer is None:
            continue
        workspace, context = side.here.workspace, longest(side.here)
        agreement = workspace.agreement
        for place in map(workspace.client_data, side.clients):
            found += refused_rows(ahead, place, side.tokenizer, agreement.client_training, context)
        for place in map(workspace.public_data, side.clients or [None]):
            found += refused_rows(ahead, place, side.tokenizer, agreement.distillation, context, unlabelled=True)
    return found


def sent_in(found: InPublic) -> dict[str, int]:
    """The bytes that each client tells and is told in a round, and once before; those that are known.

    Where adapters are averaged, that of a client is counted in each round and both ways.
    """
    sent: dict[str, int] = {}
    for one in found.exchanges:
        adapter = one.full.adapter_bytes if found.averages and one.full else 0
        ways: dict[str, Told | None] = {"sends": one.sends, "receives": one.receives}
        for way, told in ways.items():
            for when, size_bytes in (("", told.round_bytes), (" once", told.once_bytes)) if told else ():
                if size_bytes is not None:
                    sent[f"client {one.client} {way}{when}"] = size_bytes + (0 if when else adapter)
    return sent


def disk_of(sides: Sequence[Side], found: InPublic) -> dict[str, int]:
    """exchange: what all tell. clients: two adapters of each a round. server: the LLM's. checkpoints: the largest.

    Where adapters are averaged, one of each client's two is in exchange/, with the broadcast, and the average is the
    server's.
    """
    from stages.models import shapes

    workspace = sides[0].here.workspace
    told = [one for each in found.exchanges for one in (each.sends, each.receives)]
    if any(not side.here.shapes for side in sides) or any(one is None or one.round_bytes is None for one in told):
        return {}
    federation = workspace.agreement.federation
    adapter = {side: shapes.file_bytes(side.here.shapes[side.role].layout) for side in sides}
    rounds = federation.rounds
    servers = [found.exchanges[0].receives] if found.exchanges else []
    exchanged = sum(
        (one.once_bytes or 0) + (1 if found.tells_once else rounds) * (one.round_bytes or 0)
        for one in (*(each.sends for each in found.exchanges), *servers)
        if one is not None
    )
    # Of one model then: the first side has all clients.
    averaged = rounds * adapter[sides[0]] if found.averages else 0
    trained = max(side.here.shapes[side.role].adapter_parameters for side in sides)
    remembered = max(workspace.agreement.client_training.remembered, workspace.agreement.distillation.remembered)
    return {
        "exchange": exchanged + averaged * (len(workspace.clients) + 1),
        "clients": rounds * 2 * sum(len(side.clients) * adapter[side] for side in sides)
        - averaged * len(workspace.clients),
        "server": (rounds * adapter[sides[-1]] if federation.clients_tell else 0) + averaged,
        "checkpoints": CHECKPOINTS * shapes.FLOAT32_BYTES * (1 + remembered) * trained,
    }
