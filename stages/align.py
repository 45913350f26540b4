"""align: what two tokenizers have in common, byte for byte, before any model of theirs is loaded.

Of one workspace's [slm] and [llm]: reads both tokenizers and configurations, no weights, and rows that are here: the
server's auxiliary.jsonl, or else the clients' train.jsonl. Writes private/server/alignment: both vocabularies as bytes,
a map each way, and report.json; and the log private/server/align.jsonl. FedMKT has align_party.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.files import reading
from stages.parties.party import Party
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES, Role

if TYPE_CHECKING:
    from stages.distillation.aligning import Sides
    from stages.distillation.alignment import Method
    from stages.distillation.alignment_figures import AlignmentReport, Read

MOST_ROWS = 1000
"""Rows that are measured on, the first of what is here: some thousand answer positions are enough for a share."""


def align(
    workspace: Workspace, *, method: Method | None = None, overwrite: bool = False, report: Report = ignore
) -> AlignmentReport:
    """Map the two vocabularies of a workspace on each other, both ways, measure and publish the maps.

    method: of the maps; by default the one that measures best, each way. Raises UsageProblem for a tokenizer that
    cannot be aligned.
    """
    from stages.distillation.aligning import Align

    return Align(
        party=Party.server(workspace),
        publishes=[workspace.alignment],
        log=workspace.alignment.with_name("align.jsonl"),
        sides=lambda: _own_sides(workspace, report),
        method=method,
        again_by=Command("align", method=method, overwrite=True),
        overwrite=overwrite,
        report=report,
    ).take()


def _own_sides(workspace: Workspace, report: Report) -> Sides:
    """Both vocabularies, from the tokenizers, and rows."""
    from stages.distillation.aligning import Sides
    from stages.distillation.alignment_figures import read_by
    from stages.models.loading import Models
    from stages.models.token_bytes import vocabulary_of

    report(Event("stage", "align: read the vocabularies"))
    models = Models(workspace)
    outlines = {role: models.outline(role) for role in ROLES}
    vocabularies = {
        role: vocabulary_of(one.tokenizer, one.vocabulary, f"the {role.upper()}") for role, one in outlines.items()
    }
    rows, digest = _rows_here(workspace)

    def read(role: Role) -> Sequence[Read | None]:
        if role == ROLES[0]:
            report(Event("stage", f"align: read {len(rows)} rows"))
        return read_by(vocabularies[role], outlines[role].tokenizer, rows, report)

    return Sides(vocabularies, read, rows, digest)


def _rows_here(workspace: Workspace) -> tuple[list[Row], str]:
    """The first labelled rows that are here, and the digest of the files; the server's, or else the clients'."""
    auxiliary = workspace.auxiliary_data
    paths = [auxiliary] if auxiliary.exists() else [workspace.client_data(k) for k in workspace.clients]
    found = [read_rows(path, unlabelled=path == auxiliary, texts=True) for path in paths if path.exists()]
    rows = [row for rows, _ in found for row in rows if row.completion is not None]
    return rows[:MOST_ROWS], reading.sha256("".join(digest for _, digest in found).encode())
