"""The commands of Algorithm 1, run, which gives them all, and status, which tells where a federation stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcollm_cli import views
from fedcollm_cli.session import (
    ClientOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    RoundOption,
    Session,
    WorkspaceOption,
    session,
)
from stages.parts.errors import UsageProblem
from stages.parts.manifest import Manifest


def broadcast(
    round: RoundOption,
    workspace: WorkspaceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = None,
) -> None:
    """Server: publish a round's adapter to all clients.

    Round 1 makes a fresh adapter from the federation's seed. Round t reads private/server/round-(t-1)/slm and
    publishes it byte for byte. Writes exchange/round-t/broadcast.

    Example: fedcollm broadcast --round 1
    """
    with session(workspace, as_json=as_json, quiet=quiet, device=device) as opened:
        from stages.broadcast import broadcast as stage

        manifest = stage(opened.workspace, round=round, overwrite=overwrite, report=opened.console.report)
        _published(opened, opened.workspace.broadcast(round), manifest)


def client_train(
    client: ClientOption,
    round: RoundOption,
    workspace: WorkspaceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Client: tune a round's adapter on private data.

    Local training of Eq. 3. Reads exchange/round-t/broadcast and private/client-k/train.jsonl. Writes
    exchange/round-t/client-k, the one folder that goes to the server. Stopped, the same command goes on from its
    last checkpoint.

    Example: fedcollm client-train --client 2 --round 1
    """
    with session(workspace, as_json=as_json, quiet=quiet, device=device, dtype=dtype) as opened:
        from stages.client_train import client_train as stage

        manifest = stage(
            opened.workspace, client=client, round=round, overwrite=overwrite, report=opened.console.report
        )
        _published(opened, opened.workspace.client_update(round, client), manifest)


def aggregate(
    round: RoundOption,
    workspace: WorkspaceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Server: average the clients' adapters.

    Reads exchange/round-t/broadcast and every exchange/round-t/client-k that has arrived; fewer than min_clients is
    exit code 3. Writes private/server/round-t/aggregate. The manifest tells, per layer, the cross term of averaging
    A and B apart.

    Example: fedcollm aggregate --round 1
    """
    with session(workspace, as_json=as_json, quiet=quiet) as opened:
        from stages.aggregate import aggregate as stage

        manifest = stage(opened.workspace, round=round, overwrite=overwrite, report=opened.console.report)
        _published(opened, opened.workspace.aggregate(round), manifest)


def co_distill(
    round: RoundOption,
    workspace: WorkspaceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Server: let LLM and SLM teach each other.

    Mutual distillation on the auxiliary data, Eq. 4 to 6. Reads private/server/round-t/aggregate,
    private/server/round-(t-1)/llm and private/server/auxiliary.jsonl. Writes private/server/round-t/slm and llm,
    and the losses of every step in private/server/round-t/co-distill.jsonl.

    Example: fedcollm co-distill --round 1
    """
    with session(workspace, as_json=as_json, quiet=quiet, device=device, dtype=dtype) as opened:
        from stages.co_distill import co_distill as stage

        manifest = stage(opened.workspace, round=round, overwrite=overwrite, report=opened.console.report)
        _published(opened, opened.workspace.slm(round), manifest)


def evaluate(
    round: Annotated[int | None, typer.Option("--round", min=1, help="The round t; with --zero-shot, none.")] = None,
    model: Annotated[
        Literal["slm", "llm", "aggregate"],
        typer.Option("--model", help="Which of the server's: slm and llm after co-distill, aggregate the SLM before."),
    ] = "slm",
    client: Annotated[int | None, typer.Option("--client", min=1, help="Instead: this client's own SLM.")] = None,
    zero_shot: Annotated[bool, typer.Option("--zero-shot", help="The base alone, without an adapter.")] = False,
    workspace: WorkspaceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Score a model by lm-eval, zero-shot.

    On the tasks of [evaluation]. Reads private/server/round-t/slm, llm or aggregate, or exchange/round-t/client-k.
    Writes results/round-t/*.json, or results/zero-shot/*.json. Proves first that the adapter is in the model and
    changes its logits.

    Example: fedcollm evaluate --round 1 --model llm
    """
    with session(workspace, as_json=as_json, quiet=quiet, device=device, dtype=dtype) as opened:
        from stages.evaluate import evaluate as stage

        if zero_shot == (round is not None) or (zero_shot and (client or model == "aggregate")):
            mend = "fedcollm evaluate --round 1 --model slm; for a base alone, --zero-shot with --model slm or llm"
            raise UsageProblem("evaluate needs either --round or --zero-shot", mend=mend)
        result = stage(
            opened.workspace, model=model, round=round, client=client, overwrite=overwrite, report=opened.console.report
        )
        path = opened.workspace.shown(opened.workspace.result(round, result["subject"]))
        opened.console.result({"path": path, **result}, views.scores([result]))


def run(
    method: Annotated[
        Literal["fedcollm", "fedavg", "fedavg-aux", "standalone", "centralized"] | None,
        typer.Option("--method", help="Another method than the agreement's, in baselines/METHOD."),
    ] = None,
    rounds: Annotated[str | None, typer.Option("--rounds", help="Such as 3 or 1-5. Default: all.")] = None,
    scores: Annotated[bool, typer.Option("--scores/--no-scores", help="Whether to evaluate too.")] = True,
    workspace: WorkspaceOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Every step of every round, in one process.

    All on this machine. Base models are loaded once. Reads and writes exactly the files of the separate commands; what
    is done is passed over, so that the same command goes on after a stop.

    With --method, the same federation by another method, on the same data with the same budgets, in baselines/METHOD, a
    workspace of its own. fedavg: no training at the server. fedavg-aux: the server trains both models on the auxiliary
    data, without distillation. standalone: each client alone. centralized: the LLM on the data of all parties together.

    Example: fedcollm run --method fedavg-aux
    """
    with session(workspace, as_json=as_json, quiet=quiet, device=device, dtype=dtype) as opened:
        from stages.run import run as stage

        results = stage(
            opened.workspace,
            method=method,
            rounds=_rounds(rounds),
            scores=scores,
            overwrite=overwrite,
            report=opened.console.report,
        )
        opened.console.result(results, views.scores(results) if results else "done")


def status(
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every byte, instead of sizes alone.")] = False,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what is done and what comes next.

    Which steps are done, missing, damaged or stale, from the files alone, and the literal next command. Reads the
    manifests of the whole workspace, writes nothing, loads no model.

    Example: fedcollm status
    """
    with session(workspace, as_json=as_json, quiet=True) as opened:
        from stages.status import status as stage

        found = stage(opened.workspace, verify=verify)
        opened.console.result(views.status_value(found, workspace), views.status(found, workspace))


def _published(opened: Session, folder: Path, manifest: Manifest) -> None:
    """The result of a stage that makes an adapter: its folder, or its manifest as JSON."""
    shown = opened.workspace.shown(folder)
    opened.console.result({"path": shown, **manifest.model_dump()}, shown)


def _rounds(text: str | None) -> range | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise UsageProblem(
            f"--rounds {text!r} is not a round or a range of rounds", mend="such as --rounds 3, or --rounds 1-5"
        )
    return range(first, last + 1)
