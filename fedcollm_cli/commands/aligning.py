"""align: its options."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from fedcollm_cli.views.alignments import alignment_of


@in_workspace("quiet")
def align(
    *,
    method: Annotated[
        Literal["exact", "min-edit", "leading"] | None,
        typer.Option("--method", help="Of the maps that are written. Default: the one that measures best, each way."),
    ] = None,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Tell whether two models of different tokenizers could teach each other.

    Maps the vocabulary of the base in [llm] on that of [slm] and back, on bytes, by three methods: exact (the same
    bytes), min-edit (else the nearest token by edit distance, within half of its bytes) and leading (each token of the
    student counts towards its longest prefix that the teacher has). Measures them on rows that are here: at how many
    answer positions both models have read the same bytes, and at how many of those the teacher's next token is mapped
    to the student's. Warns where too little comes through, and refuses a tokenizer whose pieces do not make the bytes
    of a text.

    Loads no weights. Reads both tokenizers, and private/server/auxiliary.jsonl or else private/client-k/train.jsonl.
    Writes private/server/alignment: both vocabularies as bytes, a map each way, and the report.

    It changes nothing of a round: co-distill takes two models of one vocabulary today, and reads no map.

    Example: fedcollm align
    """
    from stages.align import align as stage

    found = stage(opened.workspace, method=method, overwrite=overwrite, report=opened.console.report)
    path = opened.workspace.shown(opened.workspace.alignment)
    opened.console.result({"path": path, **found.as_json()}, alignment_of(found, path))
