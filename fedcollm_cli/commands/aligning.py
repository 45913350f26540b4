"""align: its options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from fedcollm_cli import completing
from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from fedcollm_cli.views.alignments import alignment_of, alignments_of
from stages.parties import names
from stages.runtime.errors import UsageProblem


@in_workspace("quiet")
def align(
    *,
    method: Annotated[
        Literal["exact", "min-edit", "leading"] | None,
        typer.Option("--method", help="Of the maps that are written. Default: the one that measures best, each way."),
    ] = None,
    client: Annotated[
        int | None,
        typer.Option(
            "--client", min=1, autocompletion=completing.clients, help="FedMKT: of this client, with the server."
        ),
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="FedMKT: of the server, with each client.")] = False,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Tell if models of two tokenizers can teach each other.

    Maps the vocabulary of the base in [llm] on that of [slm] and back, on bytes, by three methods: exact (the same
    bytes), min-edit (else the nearest token by edit distance, within half of its bytes) and leading (each token of the
    student counts towards its longest prefix that the teacher has). Measures them on rows that are here: at how many
    answer positions both models have read the same bytes, and at how many of those the teacher's next token is mapped
    to the student's. Warns where too little comes through, and refuses a tokenizer whose pieces do not make the bytes
    of a text.

    Loads no weights. Reads both tokenizers, and private/server/auxiliary.jsonl or else private/client-k/train.jsonl.
    Writes private/server/alignment: both vocabularies as bytes, a map each way, and the report.

    With FedMKT each party gives it once, before round 1. It reads its own tokenizer and its public rows, and writes
    exchange/round-0001/vocabulary-client-k (-server): its vocabulary as bytes, and where it cuts each row. This is all
    that others need of its tokenizer, and travels once. As soon as the other's is there, the maps and the report are
    written to private/client-k/alignment, at the server to private/server/alignment-client-k. Without --client or
    --server it does so for every party whose public rows are here.

    Example: fedcollm align --client 2
    """
    from stages.align import align as stage

    if opened.workspace.agreement.federation.server_tells or client is not None or server:
        _align_parties(opened, method, [client] if client is not None else [None] if server else None, overwrite)
        return
    found = stage(opened.workspace, method=method, overwrite=overwrite, report=opened.console.report)
    path = opened.workspace.shown(opened.workspace.alignment)
    opened.console.result({"path": path, **found.as_json()}, alignment_of(found, path))


def _align_parties(opened: Session, method: str | None, who: list[int | None] | None, overwrite: bool) -> None:
    """FedMKT: one party, or all that are here, each aligned with whoever has told its vocabulary too."""
    from stages.align_party import align_party

    workspace = opened.workspace
    if method:
        mend = "agree on distillation.alignment: both ends of a pair have to take the same"
        raise UsageProblem("--method is for the two models of one workspace", mend=mend)
    here = [k for k in (None, *workspace.clients) if workspace.public_data(k).exists()]
    told: dict[str, dict[int, Any]] = {}
    for party in who or [*here, *here[:1]]:  # the first once more: now it has met all others
        again = overwrite and names.of(party) not in told
        told[names.of(party)] = align_party(workspace, client=party, overwrite=again, report=opened.console.report)
    pairs = {client: report for found in told.values() for client, report in found.items()}
    folders = [workspace.shown(workspace.vocabulary(party)) for party in who or here]
    values = [{"client": client, **report.as_json()} for client, report in sorted(pairs.items())]
    opened.console.result({"paths": folders, "pairs": values}, alignments_of(pairs, folders))
