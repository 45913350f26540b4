"""A parcel: one folder, or the keys, of those that travel in a bundle."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.artefacts.reading import inbox, read_manifest
from stages.runtime.errors import Damaged, NotReady
from stages.workspace.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    MASKED_UPDATE,
    SEALED_INBOX,
    SEALED_REVEAL,
    SEALED_SHARES,
    SIGNATURE,
    signature_beside,
)
from stages.workspace.paths import Workspace

Kind = Literal["broadcast", "close", "client", "reveal", "keys", "federation"]
ADAPTER = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
CONTENTS = {"broadcast": ADAPTER, "client": ADAPTER | {MASKED_UPDATE, SEALED_SHARES}, "reveal": {SEALED_REVEAL}}
"""What can be in a folder; in a close, the inboxes of those who take part."""
STAGES = {"broadcast": "broadcast", "client": "client-train", "close": "close", "reveal": "reveal"}


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
                return workspace.client_update(self.round, self.client)
            case "reveal":
                return workspace.reveal(self.round, self.client)
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

    def public_files(self, workspace: Workspace) -> list[str]:
        """The two files of what is no folder: the signature first, since what it signs counts from its arrival on."""
        path = workspace.public_keys(self.client) if self.kind == "keys" else workspace.federation
        return [signature_beside(path).name, path.name]

    def takes(self, file: str, workspace: Workspace) -> bool:
        """Whether a file of this name can be in it."""
        if not self.is_folder:
            return file in self.public_files(workspace)
        known = {MANIFEST, SIGNATURE} | CONTENTS.get(self.kind, set())
        return file in known or (self.kind == "close" and is_sealed(file))


def is_sealed(file: str) -> bool:
    """Whether a file of this name in a close is sealed to one client."""
    return re.fullmatch(SEALED_INBOX, file) is not None


def is_for(client: int, close: Path) -> bool:
    """Whether a close, by its manifest, has a file for this client. One without a manifest is for others to judge."""
    try:
        return inbox(client) in read_manifest(close)[0].files
    except (Damaged, NotReady):
        return True
