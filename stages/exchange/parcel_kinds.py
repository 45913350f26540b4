"""A parcel: one folder, or the keys, of those that travel in a bundle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.artefacts.manifest import Stage
from stages.artefacts.reading import inbox, read_manifest
from stages.runtime.errors import Damaged, NotReady
from stages.workspace.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CUTS,
    ENCRYPTED,
    KNOWLEDGE,
    MANIFEST,
    MASKED_UPDATE,
    OPENED,
    RESIDUAL,
    SEALED_INBOX,
    SEALED_REVEAL,
    SEALED_SHARES,
    SIGNATURE,
    SPARSE_UPDATE,
    VOCABULARY,
    signature_beside,
)
from stages.workspace.paths import Workspace

Kind = Literal[
    "broadcast",
    "close",
    "client",
    "reveal",
    "vocabulary-server",
    "vocabulary-client",
    "server",
    "adapter-client",
    "keys",
    "federation",
]
ADAPTER = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
SENT = ADAPTER | {MASKED_UPDATE, SEALED_SHARES, SPARSE_UPDATE, ENCRYPTED}
CONTENTS = {
    "broadcast": ADAPTER | {RESIDUAL},
    "client-train": SENT,
    "close": {ENCRYPTED},
    "reveal": {SEALED_REVEAL, OPENED},
}
CONTENTS |= {"align": {VOCABULARY, CUTS}, "share-knowledge": {KNOWLEDGE}, "client-distill": ADAPTER}
"""What can be in a folder that a stage makes; in a close, the inboxes of those who take part, or the encrypted sum."""
STAGES: dict[Kind, Stage] = {"broadcast": "broadcast", "client": "client-train", "close": "close", "reveal": "reveal"}
IN_PUBLIC: dict[Kind, Stage] = {"vocabulary-server": "align", "vocabulary-client": "align", "broadcast": "broadcast"}
IN_PUBLIC |= {"server": "share-knowledge", "client": "share-knowledge", "adapter-client": "client-distill"}
"""The stages that make what travels; with FedMKT, and where an LLM teaches that stays as it is. An adapter travels only
where it is averaged: elsewhere its folder has no such name."""
OF_NO_CLIENT = ("broadcast", "close", "vocabulary-server", "server", "federation")


@dataclass(frozen=True, order=True)
class Parcel:
    """A folder of a round, which travels whole; or a party's public file, with its signature beside it."""

    kind: Kind
    round: int = 0
    client: int = 0

    def folder(self, workspace: Workspace) -> Path:
        """Where its files lie."""
        match self.kind:
            case "broadcast":
                return workspace.broadcast(self.round)
            case "close":
                return workspace.close(self.round)
            case "client":
                return workspace.sent_by(self.round, self.client)
            case "adapter-client":
                return workspace.client_update(self.round, self.client)
            case "reveal":
                return workspace.reveal(self.round, self.client)
            case "vocabulary-server":
                return workspace.vocabulary(None)
            case "vocabulary-client":
                return workspace.vocabulary(self.client)
            case "server":
                return workspace.knowledge(self.round, None)
            case "keys":
                return workspace.public_keys(self.client).parent
            case "federation":
                return workspace.federation.parent

    def name(self, workspace: Workspace, file: str) -> str:
        """How one of its files is called in a bundle: from exchange/ down."""
        return (self.folder(workspace) / file).relative_to(workspace.exchange).as_posix()

    @property
    def levels(self) -> int:
        """How many of the last parts of its files' paths may be no symbolic links."""
        return 2 if self.kind == "federation" else 3

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of a round."""
        return self.kind not in ("keys", "federation")

    def stage(self, workspace: Workspace) -> Stage | None:
        """The stage that makes such a folder; None where the federation's method has none that sends it."""
        return (IN_PUBLIC if workspace.agreement.federation.server_tells else STAGES).get(self.kind)

    def public_files(self, workspace: Workspace) -> list[str]:
        """The two files of what is no folder: the signature first, since what it signs counts from its arrival on."""
        path = workspace.public_keys(self.client) if self.kind == "keys" else workspace.federation
        return [signature_beside(path).name, path.name]

    def takes(self, file: str, workspace: Workspace) -> bool:
        """Whether a file of this name can be in it."""
        if not self.is_folder:
            return file in self.public_files(workspace)
        stage = self.stage(workspace)
        if stage is None:
            return False
        known = {MANIFEST, SIGNATURE} | CONTENTS.get(stage, set())
        return file in known or (self.kind == "close" and is_sealed(file))


def is_sealed(file: str) -> bool:
    """Whether a file of this name in a close is sealed to one client."""
    return re.fullmatch(SEALED_INBOX, file) is not None


def is_for(client: int, close: Path, key_holder: int | None) -> bool:
    """Whether a close, by its manifest, has a file for this client. One without a manifest is for others to judge."""
    try:
        files = read_manifest(close)[0].files
        return client == key_holder if ENCRYPTED in files else inbox(client) in files
    except (Damaged, NotReady):
        return True
