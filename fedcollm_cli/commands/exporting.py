"""The command that hands a model on: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcollm_cli import completing
from fedcollm_cli.session import OverwriteOption, RoundOption, Session, in_workspace


@in_workspace("quiet", "device")
def export(
    *,
    round: RoundOption,
    model: Annotated[
        Literal["slm", "llm", "aggregate"],
        typer.Option("--model", help="Of the server's models: slm or llm after co-distill, or the aggregate before."),
    ] = "slm",
    client: Annotated[
        int | None,
        typer.Option("--client", min=1, autocompletion=completing.clients, help="Instead: this client's own SLM."),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Whole weights and tokenizer, instead of an adapter.")
    ] = False,
    to: Annotated[Path | None, typer.Option("--to", help="The folder to write. Default: in exports/.")] = None,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a model as others load it, with a model card.

    A folder for PEFT, or merged weights for transformers. Reads private/server/round-t/slm, llm or aggregate, or
    exchange/round-t/client-k (with FedMKT private/client-k/round-t/slm, or exchange/round-t/adapter-client-k where that
    is averaged), and the base. For the card, it reads results/ and private/split.json. Writes exports/MODEL-round-t.
    First it loads the export again, and publishes it only if its logits are those of base and adapter.

    Example: fedcollm export --round 5 --model llm --merged
    """
    from stages.export.export import export as stage

    made = stage(
        opened.workspace,
        model=model,
        round=round,
        client=client,
        merged=merged,
        folder=to and to.absolute(),
        overwrite=overwrite,
        report=opened.console.report,
    )
    folder = to or opened.workspace.export(round, made["subject"], merged=merged)
    opened.console.result({"path": opened.workspace.shown(folder), **made}, opened.workspace.shown(folder))
