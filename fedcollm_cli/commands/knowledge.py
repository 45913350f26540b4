"""The commands of a round that FedMKT has beyond the others."""

from __future__ import annotations

from typing import Annotated

import typer

from fedcollm_cli import completing
from fedcollm_cli.commands.rounds import published
from fedcollm_cli.session import ClientOption, OverwriteOption, RoundOption, Session, in_workspace


@in_workspace("quiet", "device", "dtype")
def share_knowledge(
    *,
    client: Annotated[
        int | None, typer.Option("--client", min=1, autocompletion=completing.clients, help="Of this client's model.")
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="Of the server's LLM, as co-distill has left it.")] = False,
    round: RoundOption,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """FedMKT: tell what a model knows of the public rows.

    A client's reads private/client-k/round-t/trained and private/client-k/public.jsonl, and writes
    exchange/round-t/client-k, which goes to the server. The server's reads private/server/round-t/llm and
    private/server/auxiliary.jsonl, and writes exchange/round-t/server, which goes to all clients. Both need what
    `fedcollm align` has told of the party's vocabulary in round 1.

    For each public row it writes the model's loss on the answer, -log p in nats (the smaller, the better the model
    knows it). For each token of an answer it writes its probability, and the distillation.top_k likeliest tokens with
    theirs. It writes no text, no gradient and no weight. A client does this before the round's client-distill, the
    server after the round's co-distill; with method llm2slm the server alone, once, in round 1.

    Nothing is told of a row without an answer, of one that is too long under data.too_long = "skip", or of one whose
    bytes the tokenizer does not give back. `fedcollm align` has counted these rows.

    What a model says of public rows can still give away what it was trained on. Differential privacy of client-train
    covers it; nothing else does.

    Example: fedcollm share-knowledge --client 2 --round 1
    """
    from stages.share_knowledge import share_knowledge as stage

    manifest = stage(
        opened.workspace,
        client=client,
        server=server,
        round=round,
        overwrite=overwrite,
        report=opened.console.report,
    )
    published(opened, opened.workspace.knowledge(round, client), manifest)


@in_workspace("quiet", "device", "dtype", "processes")
def client_distill(
    *,
    client: ClientOption,
    round: RoundOption,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """FedMKT, client: learn on the public rows from the LLM.

    The client's model is trained on the answers of private/client-k/public.jsonl and, by distillation.select, on what
    the LLM has told of those rows that it knows better. Reads private/client-k/round-t/trained, exchange/round-t/server
    and the client's own exchange/round-t/client-k. Writes private/client-k/round-t/slm, from which the client goes on
    in the next round. It never leaves the client. If it was stopped, the same command goes on from its last checkpoint.

    Where aggregation.average is true, it writes exchange/round-t/adapter-client-k instead, which goes to the server.
    Beside what any adapter tells, its manifest says how many examples of its own the client trained on in the round.

    Example: fedcollm client-distill --client 2 --round 1
    """
    from stages.client_distill import client_distill as stage

    manifest = stage(
        opened.workspace,
        client=client,
        round=round,
        overwrite=overwrite,
        processes=opened.processes,
        report=opened.console.report,
    )
    published(opened, opened.workspace.client_adapter(round, client), manifest)
