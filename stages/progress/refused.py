"""Rows that training would refuse whatever model reads them: lines that are no rows, files of several forms, twice.

Read as training reads them, without a tokenizer; whether a row is too long, `plan` and `check-rows` tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stages.data.row_files import read_rows
from stages.runtime.errors import Problem
from stages.workspace.paths import Workspace

MOST_BYTES = 64 << 20
"""Of all files together that `status` reads; of more, the rest is left to the commands that train."""


def refused_rows(workspace: Workspace) -> Iterator[str]:
    """Each file of rows here that would be refused: the first thing that is wrong with it, and the mend."""
    is_public = workspace.agreement.federation.learns_in_public
    public = [workspace.auxiliary_data, *(map(workspace.public_data, workspace.clients) if is_public else ())]
    own = [*map(workspace.client_data, workspace.clients), workspace.held_out_data]
    left = MOST_BYTES
    for path in [*own, *public]:
        size = _size_bytes(path)
        if size is None or size > left:
            continue
        left -= size
        try:
            read_rows(path, unlabelled=path in public, texts=is_public and path in public)
        except Problem as problem:
            yield f"{workspace.shown(path)}: {problem.message.splitlines()[0]} ({problem.mend})"


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # it is not here; or a link to nothing, which its party's step names
        return None
