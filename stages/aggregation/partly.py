"""Updates that are A or B alone, or few numbers, as a channel: a client keeps its adapter and sends a part of it.

Where the other matrix is the same at all clients, the mean of what they send is the mean of BA: nothing is lost.
FFA-LoRA (Sun et al., 2024, https://arxiv.org/abs/2403.12313) never trains A; RoLoRA (Chen et al., 2025,
https://arxiv.org/abs/2502.01755) trains B and A in turn. FedSA-LoRA (Guo et al., 2025,
https://arxiv.org/abs/2410.01463) trains both, and leaves B with each client.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from stages.aggregation import plain
from stages.aggregation.pruning import left_out, pruned
from stages.artefacts.adapter_files import weights_bytes
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.parts import cut, numbers_sent
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import read_sound
from stages.artefacts.sparse_files import sparse_bytes
from stages.runtime.errors import Problem
from stages.runtime.events import Event
from stages.workspace import addressees
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SPARSE_UPDATE


@dataclass(frozen=True)
class ToServer(plain.ToServer):
    """The channel as a client has it; the server's end is that of whole updates."""

    done: str = "already trained"

    def accept(self, theta: Artefact | None) -> None:
        """Where there are keys; and where few numbers are sent, look that what was left out before is sound."""
        super().accept(theta)
        agreement = self.party.workspace.agreement
        if theta and agreement.keep:
            numbers, round = numbers_sent(theta, agreement), theta.manifest.round
            left_out(self.party.workspace, round=round, client=self.party.number, numbers=numbers)

    def send(self, theta: Artefact | None, trained: Manifest, again: bool) -> Manifest:
        """Send what was trained, in the place of whatever was sent before; the same bytes are not written again."""
        assert theta, "A or B alone is trained where there is a broadcast to begin with"
        workspace, client, round = self.party.workspace, self.party.number, trained.round
        adapter = read_sound(workspace.client_adapter(round, client), by=self.party)
        sent, start = cut(theta, adapter, workspace.agreement)
        contents, count = {ADAPTER_WEIGHTS: weights_bytes(sent)}, sum(tensor.size for tensor in sent.values())
        if share := workspace.agreement.keep:
            sparse = pruned(workspace, sent, start, round=round, client=client, share=share)
            contents, count = {SPARSE_UPDATE: sparse_bytes(sparse)}, len(sparse.positions)
        contents |= {ADAPTER_CONFIG: adapter.contents[ADAPTER_CONFIG]}
        said = {each.name: getattr(adapter.manifest, each.name) for each in fields(Draft)}
        parents = {theta.path.name: theta.sha256}  # what it has of its own is nobody else's concern
        draft = replace(Draft(**said), parents=parents, parameters=count)
        target = workspace.client_update(round, client)
        if os.path.lexists(target) and not again and (found := self._sent(target)):
            beside = {"files": found.manifest.files, "parents": parents, "parameters": draft.parameters}
            if found.contents == contents and found.manifest == adapter.manifest.model_copy(update=beside):
                self.report(Event("note", "already sent"))
                return found.manifest
        manifest = publish(target, contents, draft, by=self.party)
        addressees.tell(workspace, target, Command("pack", client=client, round=round), self.report, client=client)
        return manifest

    def _sent(self, target: Path) -> Artefact | None:
        """What lies in exchange/, if it is sound; if not, it is sent again."""
        try:
            return read_sound(target, by=self.party)
        except Problem:
            return None
