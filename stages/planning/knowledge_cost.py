"""comm-cost with FedMKT: the bytes of vocabularies and of knowledge, against adapters, models and the paper's count.

Reads the manifests in exchange/ and the models' configurations; what is not told yet is estimated from the public rows
and the tokenizers that are here. Writes nothing, loads no weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.artefacts.reading import read_manifest
from stages.bases.base_names import name_of
from stages.data.examples import fitting
from stages.data.row_files import read_rows
from stages.distillation.knowledge import data_bytes
from stages.parties import names
from stages.planning.comm_cost import Full, Sent, counted, full_of
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace

NUMBER_BYTES = 8
"""Of one of the paper's N x S x K logits: a float32 and its token's id."""


@dataclass(frozen=True)
class Told:
    """What a party tells: once its vocabulary and cuts, in each round its knowledge, in bytes. None: not known here.

    rows, positions: of which public rows, and of how many of their positions. is_estimate: whether a part of it is yet
    to be told.
    """

    once_bytes: int | None
    round_bytes: int | None
    rows: int | None
    positions: int | None
    is_estimate: bool


@dataclass(frozen=True)
class Exchange:
    """One client and the server. paper_numbers: the N x S x K logits, each way, that the paper counts.

    sends, receives: None where the method has none. full: the client's own model; None if its configuration is not
    here.
    """

    client: int
    model: str
    sends: Told | None
    receives: Told
    paper_numbers: int | None
    full: Full | None

    @property
    def paper_bytes(self) -> int | None:
        """The same with the tokens' ids, in bytes."""
        return None if self.paper_numbers is None else NUMBER_BYTES * self.paper_numbers


@dataclass(frozen=True)
class InPublic:
    """Of a workspace whose models learn on public rows. rounds, totals: what has travelled, by party.

    exchanges: what travels in a round, by client; without one where nothing does. tells_once: the server tells what it
    knows in round 1 alone. averages: an adapter travels in each round too, from each client and to it.
    """

    method: str
    clients: int
    tells_once: bool
    averages: bool
    rounds: list[Sent]
    totals: list[Sent]
    exchanges: list[Exchange]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        each = [asdict(one) | {"paper_bytes": one.paper_bytes} for one in self.exchanges]
        return asdict(self) | {"exchanges": each}


def knowledge_cost(workspace: Workspace) -> InPublic:
    """The bytes of this workspace. Raises as the tokenizers' readers do for one that cannot be aligned."""
    federation = workspace.agreement.federation
    exchanges = []
    if federation.server_tells:
        server = _told(workspace, None)
        exchanges = [_exchange(workspace, client, server) for client in workspace.clients]
    tells_once = federation.server_tells and not federation.clients_tell
    averages, clients = workspace.agreement.averages, len(workspace.clients)
    return InPublic(federation.method, clients, tells_once, averages, *counted(workspace), exchanges)


def _exchange(workspace: Workspace, client: int, server: Told) -> Exchange:
    own, settings = workspace.of_client(client), workspace.agreement.distillation
    told = _told(workspace, client)
    if not workspace.agreement.federation.clients_tell:
        told = Told(told.once_bytes, 0, told.rows, told.positions, told.is_estimate)
    numbers = None if told.rows is None else told.rows * settings.max_length * settings.top_k
    return Exchange(client, name_of(own, "slm"), told, server, numbers, full_of(own))


def _told(workspace: Workspace, client: int | None) -> Told:
    """What a party has told, or else will tell."""
    voice = workspace.vocabulary(client)
    rounds = range(1, workspace.agreement.federation.rounds + 1)
    knowledge = [place for round in rounds if (place := workspace.knowledge(round, client)).exists()]
    if voice.exists() and (knowledge or (client is not None and not workspace.agreement.federation.clients_tell)):
        manifest, _ = read_manifest(voice)
        sizes = [_size(place) for place in knowledge]
        return Told(_size(voice), max(sizes, default=0), manifest.examples, manifest.tokens, is_estimate=False)
    return _estimated(workspace, client)


def _size(folder: Path) -> int:
    return sum(entry.size_bytes for entry in read_manifest(folder)[0].files.values())


def _estimated(workspace: Workspace, client: int | None) -> Told:
    """By the rows and the tokenizer that are here."""
    from stages.artefacts.vocabulary_files import vocabulary_bytes
    from stages.distillation.cuts import cuts_bytes, cuts_of
    from stages.models.loading import Models
    from stages.models.token_bytes import vocabulary_of

    places = [workspace.public_data(party) for party in (client, None, *workspace.clients)]
    path = next((place for place in places if place.exists()), None)
    try:
        outline = Models(workspace if client is None else workspace.of_client(client)).outline(
            "llm" if client is None else "slm"
        )
    except NotReady:
        return Told(None, None, None, None, is_estimate=True)
    vocabulary = vocabulary_of(outline.tokenizer, outline.vocabulary, names.said(names.of(client)))
    once = len(vocabulary_bytes(vocabulary))
    if path is None:
        return Told(once, None, None, None, is_estimate=True)
    rows, digest = read_rows(path, unlabelled=True, texts=True)
    settings = workspace.agreement.distillation
    limits: dict[str, Any] = {"max_length": settings.max_length, "context": outline.context, "too_long": "skip"}
    found = fitting(rows, outline.tokenizer, **limits, path=path)
    labelled = [one if row.completion is not None else None for row, one in zip(rows, found, strict=True)]
    cuts = cuts_of(rows, labelled, vocabulary, digest)
    size_bytes = data_bytes(len(rows), len(cuts.ends), settings.top_k, outline.vocabulary)
    count = int((cuts.positions > 0).sum())
    return Told(once + len(cuts_bytes(cuts)), size_bytes, count, len(cuts.ends), is_estimate=True)
