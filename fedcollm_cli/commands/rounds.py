"""The commands of Algorithm 1: a round's steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcollm_cli.session import (
    ClientOption,
    OverwriteOption,
    RoundOption,
    Session,
    in_workspace,
)
from stages.artefacts.manifest import Manifest


@in_workspace("quiet", "device")
def broadcast(
    *,
    round: RoundOption,
    without: Annotated[
        list[int] | None,
        typer.Option("--without", metavar="<int>", help="Secure mode: open the round without this client; repeatable."),
    ] = None,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Server: publish a round's adapter to all clients.

    Round 1 makes a fresh adapter from the federation's seed. Round t reads private/server/round-(t-1)/slm, or aggregate
    where nothing is distilled after that, and publishes it byte for byte. Writes exchange/round-t/broadcast. With keys,
    this opens the round. --overwrite opens it again: what clients sent before no longer counts.

    Example: fedcollm broadcast --round 1
    """
    from stages.broadcast import broadcast as stage

    manifest = stage(opened.workspace, round=round, without=without, overwrite=overwrite, report=opened.console.report)
    published(opened, opened.workspace.broadcast(round), manifest)


@in_workspace("quiet", "device", "dtype", "processes")
def client_train(
    *,
    client: ClientOption,
    round: RoundOption,
    opened: Session,
    overwrite: OverwriteOption = False,
    reset_privacy: Annotated[
        bool,
        typer.Option("--i-understand-reset", help="Forget what was spent of the privacy budget and count from zero."),
    ] = False,
) -> None:
    """Client: tune a round's adapter on private data.

    Local training of Eq. 3. Reads exchange/round-t/broadcast and private/client-k/train.jsonl, .csv or .parquet. Writes
    exchange/round-t/client-k, the only folder that goes to the server. If it was stopped, the same command goes on from
    its last checkpoint. With FedMKT (Eq. 4) a client goes on with its own adapter, or with aggregation.average from the
    broadcast. What it trains stays in private/client-k/round-t/trained.

    With epsilon or noise_multiplier under [privacy], training is differentially private for each row. Before training,
    what it spends is written to private/client-k/privacy-ledger.jsonl. If it would exceed the budget, it ends with exit
    code 6. --overwrite spends again.

    Example: fedcollm client-train --client 2 --round 1
    """
    from stages.client_train import client_train as stage

    manifest = stage(
        opened.workspace,
        client=client,
        round=round,
        overwrite=overwrite,
        reset_privacy=reset_privacy,
        processes=opened.processes,
        report=opened.console.report,
    )
    here = opened.workspace
    keeps = here.agreement.federation.learns_in_public
    published(opened, here.client_trained(round, client) if keeps else here.client_update(round, client), manifest)


@in_workspace("quiet", "device", "dtype")
def aggregate(
    *,
    round: RoundOption,
    gate: Annotated[
        float | None, typer.Option("--gate", help="Keep the old adapter if the held-out loss rises by more than this.")
    ] = None,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="Give up the round: go on with its broadcast's adapter.")
    ] = False,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Server: average the clients' adapters.

    Reads exchange/round-t/broadcast and every exchange/round-t/client-k that has arrived. If these are fewer than
    min_clients, it ends with exit code 3. Writes private/server/round-t/aggregate. The manifest has the cross term of
    each layer, which comes from averaging A and B separately. With aggregation.combine = "product" the products BA are
    averaged instead, and cut back to the agreed rank; the manifest has each layer's remainder. With "residual" what A
    and B lose is kept: residual.safetensors, beneath the adapter, in the aggregate and in the next broadcast. With
    "freeze-a" or "alternate" clients send B or A alone, and nothing is lost. With another aggregation.rule than mean,
    it says what the rule did to which client.

    With aggregation.server the round goes on with a step of that optimiser instead, from the broadcast towards the
    average. What it remembers of earlier rounds is in the aggregate of the round before.

    FedMKT takes this step where aggregation.average is true, with every exchange/round-t/adapter-client-k. An adapter
    must have learned from the knowledge that the server told in this round. By weighting samples, a client's own
    examples count, not the public rows, which are the same for all.

    With --gate, or aggregation.gate, the SLM's loss on private/server/held-out.jsonl is measured. If it rises by more
    than this, in nats per answer token, the broadcast's adapter is written instead, and the round goes on. Without a
    gate no model is loaded.

    In secure and encrypted mode the first call closes the round, in exchange/round-t/close, and ends with exit code 3.
    After enough clients have revealed, or the one with the key, the second call has the sum. If this is impossible,
    --keep-old gives the round up.

    Example: fedcollm aggregate --round 1 --gate 0.1
    """
    from stages.aggregate import aggregate as stage

    manifest = stage(
        opened.workspace,
        round=round,
        gate=gate,
        keep_old=keep_old,
        overwrite=overwrite,
        report=opened.console.report,
    )
    published(opened, opened.workspace.aggregate(round), manifest)


@in_workspace("quiet")
def reveal(
    *,
    client: ClientOption,
    round: RoundOption,
    opened: Session,
) -> None:
    """Client: help to unmask a round's sum, or open it.

    Secure and encrypted mode only. Reads exchange/round-t/broadcast and exchange/round-t/close, which names the clients
    whose updates are summed. Writes exchange/round-t/reveal-k: in secure mode each client its shares, encrypted for the
    server; in encrypted mode the client with the key the mean. In a round, a client reveals for one list of clients and
    never for another. The same command again sends the same bytes again.

    Example: fedcollm reveal --client 2 --round 1
    """
    from stages.reveal import reveal as stage

    manifest = stage(opened.workspace, client=client, round=round, report=opened.console.report)
    published(opened, opened.workspace.reveal(round, client), manifest)


@in_workspace("quiet", "device", "dtype", "processes")
def co_distill(
    *,
    round: RoundOption,
    phase: Annotated[
        Literal["capture", "train"] | None,
        typer.Option("--phase", help="One of two phases, each with one model in memory. Default: both models at once."),
    ] = None,
    model: Annotated[
        Literal["slm", "llm"] | None,
        typer.Option("--model", help="In two phases: which model; train takes both in turn without it."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="capture: how many tokens of each position are kept. Default: 64."),
    ] = None,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Server: let LLM and SLM teach each other.

    Mutual distillation on the auxiliary data, Eq. 4 to 6. Reads private/server/round-t/aggregate,
    private/server/round-(t-1)/llm and private/server/auxiliary.jsonl. Writes private/server/round-t/slm and llm,
    and the losses of every step in private/server/round-t/co-distill.jsonl.

    If both models do not fit on one device, do it in two phases. `--phase capture --model llm` and `--model slm` write
    each model's probabilities on the auxiliary data to private/server/round-t/captured-llm and captured-slm. Then
    `--phase train` trains each model against the other's capture, the LLM first. Only one model is in memory at a time.
    The teacher does not change during the round. The LLM can be captured as soon as the round before is done, while
    clients train.

    With FedMKT the LLM learns alone: of each row of private/server/auxiliary.jsonl, from whichever client knows its
    answer best, and only if that client knows it better. Reads exchange/round-t/client-k of each client that has told.

    Example: fedcollm co-distill --round 1 --phase capture --model llm
    """
    from stages.co_distill import co_distill as stage

    manifest = stage(
        opened.workspace,
        round=round,
        phase=phase,
        model=model,
        top_k=top_k,
        overwrite=overwrite,
        processes=opened.processes,
        report=opened.console.report,
    )
    here = opened.workspace
    made = {"slm": here.slm(round), "llm": here.llm(round)}[manifest.role]
    published(opened, here.captured(round, manifest.role) if phase == "capture" else made, manifest)


def published(opened: Session, folder: Path, manifest: Manifest) -> None:
    """The result of a stage that makes an adapter: its folder, or its manifest as JSON."""
    shown = opened.workspace.shown(folder)
    opened.console.result({"path": shown, **manifest.model_dump()}, shown)
