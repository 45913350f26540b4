"""Receiving an artefact: its place, its signature and its sizes before its bulk."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from stages.artefacts.lineage import check_belongs, check_signed
from stages.artefacts.manifest import Stage
from stages.artefacts.reading import Artefact, read_artefact
from stages.artefacts.sizes import check_sizes
from stages.files import reading
from stages.parties.party import Reader
from stages.runtime.errors import Refused
from stages.workspace.names import (
    MANIFEST,
)
from stages.workspace.paths import require


def received(
    folder: Path,
    *,
    by: Reader,
    stage: Stage,
    round: int,
    client: int | None = None,
    missing: tuple[str, object] | None = None,
    only: Iterable[str] | None = None,
    limit_bytes: int = reading.LARGEST_ADAPTER_BYTES,
) -> Artefact:
    """A folder as read_artefact has it, of which nothing but the manifest is read unless check_belongs lets it pass.

    by: who is about to use it. missing: the message and the mend of the NotReady where there is no such folder.
    """
    if missing:
        require(folder, *missing)
    belongs = functools.partial(check_belongs, by=by, stage=stage, round=round, client=client)
    return read_artefact(folder, only=only, limit_bytes=limit_bytes, before=belongs)


def read_sound(folder: Path, *, by: Reader, only: Iterable[str] | None = None) -> Artefact:
    """A folder of the reader's own federation, whatever it is and where: its signature and its sizes come first.

    Raises Refused for one of another roster.
    """

    def check(found: Artefact) -> None:
        members, maker = by.members, found.manifest.client
        workspace = by.workspace if maker is None else by.workspace.of_client(maker)
        if members and found.manifest.federation_sha256 != members.sha256:
            message = f"{workspace.shown(folder)} is of another roster than this federation's"
            raise Refused(message, where=found.path / MANIFEST, mend="make it again with --overwrite")
        if members:
            check_signed(found, members, found.manifest.party)
        check_sizes(found, workspace)

    return read_artefact(folder, only=only, before=check)
