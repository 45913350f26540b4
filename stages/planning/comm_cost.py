"""comm-cost: the bytes that travel, and Table 3 of the paper.

Reads the manifests in exchange/ and the configuration of the SLM; writes nothing, loads no weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.bases import base_folders
from stages.bases.base_names import name_of
from stages.exchange.transfers import SERVER, client, transfers
from stages.paper import reported
from stages.planning import averages, residuals
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.shapes import Shape


@dataclass(frozen=True)
class Sent:
    """What one party sent and received in one round, in bytes; of one party over all rounds, round is None.

    Round 0 is before the first: keys and the roster. is_whole: whether all of it can be seen here, since the party or
    the server is on this machine; if not, the bytes are those of what is here.
    """

    round: int | None
    party: str
    sent_bytes: int
    received_bytes: int
    is_whole: bool


@dataclass(frozen=True)
class Full:
    """The base model and its adapter, as they would travel: parameters, and bytes one way.

    adapter_bytes: of adapter_model.safetensors; a folder's two JSON files add some thousand. updates: the same of what
    a client sends, which is the adapter or a part of it. residual: what a client receives beside the adapter with
    combine = "residual", in the last round and in all rounds on average; 0 without.
    stored_bytes: of the full model in the type of its checkpoint; None where that is not known.
    """

    model: str
    parameters: int
    adapter_parameters: int
    adapter_bytes: int
    update_parameters: int
    update_bytes: int
    residual_bytes: int
    residual_mean_bytes: int
    float32_bytes: int
    stored_dtype: str | None
    stored_bytes: int | None


@dataclass(frozen=True)
class CommCost:
    """rounds, totals: what has travelled, by party. full: None if the SLM's configuration is not here."""

    clients: int
    rounds: list[Sent]
    totals: list[Sent]
    full: Full | None


@dataclass(frozen=True)
class Table3:
    """One setting: counted from configurations, and what the paper says."""

    setting: str
    full: Full
    paper: reported.Transmitted

    @property
    def percent(self) -> float:
        """Parameters sent per client and round, one way, of those of the full model."""
        return 100 * self.full.update_parameters / self.full.parameters


def comm_cost(workspace: Workspace) -> CommCost:
    """The bytes of this workspace. Without an exchanged file yet, rounds are empty, and full says what will travel."""
    return CommCost(len(workspace.clients), *counted(workspace), full_of(workspace))


def counted(workspace: Workspace) -> tuple[list[Sent], list[Sent]]:
    """What has travelled, by round and party, and in all rounds together; both empty where nothing has."""
    found = transfers(workspace)
    parties = [SERVER, *map(client, workspace.clients)]
    sent, received = Counter[tuple[int | None, str]](), Counter[tuple[int | None, str]]()
    for one in found:
        for round in (one.round, None):  # None: all rounds together
            sent[round, one.sender] += one.size_bytes
            received[round, one.receiver] += one.size_bytes
    rounds = sorted({transfer.round for transfer in found})
    has_server = workspace.auxiliary_data.parent.exists()
    here = {client(k) for k in workspace.clients if has_server or workspace.client_data(k).exists()}
    here |= {SERVER} if has_server else set()

    def row(round: int | None, party: str) -> Sent:
        return Sent(round, party, sent[round, party], received[round, party], party in here)

    by_round = [row(round, party) for round in rounds for party in parties]
    return by_round, [row(None, party) for party in parties] if found else []


def table_3(settings: Sequence[str]) -> list[Table3]:
    """Table 3 from configurations alone, for these settings of the paper: s1, s2, s3."""
    from stages.models import shapes

    return [
        Table3(name, _full(reported.SETTINGS[name].slm, shapes.of_paper(name, "slm")), reported.transmitted(name))
        for name in settings
    ]


def full_of(workspace: Workspace) -> Full | None:
    """The SLM and its adapter; None if its configuration is not here."""
    if not (base_folders.configuration(workspace, "slm") or workspace.agreement.slm.model in reported.checkpoints()):
        return None  # found out without torch
    from stages.models import shapes

    try:
        shape = shapes.of_workspace(workspace, "slm")
    except NotReady:
        return None
    updates = averages.updates_of(workspace.agreement, shape.layout)
    return _full(name_of(workspace, "slm"), shape, updates, residuals.bytes_of(workspace.agreement, shape.layout)[:-1])


def _full(model: str, shape: Shape, updates: tuple[int, int] | None = None, beneath: Sequence[int] = (0,)) -> Full:
    """updates: as averages.updates_of has them; None: clients send the adapter. beneath: of each round's broadcast."""
    from stages.models import shapes

    adapter = shape.adapter_parameters, shapes.file_bytes(shape.layout)
    size = shapes.DTYPE_BYTES.get(shape.stored_dtype or "")
    return Full(
        model,
        shape.parameters,
        *adapter,
        *(updates or adapter),
        beneath[-1],
        sum(beneath) // len(beneath),
        shapes.FLOAT32_BYTES * shape.parameters,
        shape.stored_dtype,
        size * shape.parameters if size else None,
    )
