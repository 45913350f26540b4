"""All steps in one process, the next one of a party, and where a federation stands."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from fedcollm_cli import completing
from fedcollm_cli.session import ClientScoresOption, EachRoundOption, OverwriteOption, Session, in_workspace
from fedcollm_cli.views import progress
from stages.runtime import texts
from stages.runtime.errors import NOTHING_LEFT_EXIT_CODE, Damaged, UsageProblem
from stages.workspace.commands import Command
from stages.workspace.methods import Compared


@in_workspace("quiet", "device", "dtype")
def run(
    *,
    method: Annotated[
        Compared | None,
        typer.Option("--method", help="Another method than the agreement's, in baselines/METHOD."),
    ] = None,
    rounds: Annotated[
        str | None,
        typer.Option(
            "--rounds", "--round", autocompletion=completing.rounds, help="Such as 3 or 1-5: these alone. Default: all."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do nothing: print the commands that it stands for, to be pasted.")
    ] = False,
    scores: Annotated[bool, typer.Option("--scores/--no-scores", help="Whether to evaluate too.")] = True,
    each_round: EachRoundOption = True,
    client_scores: ClientScoresOption = True,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Every step of every round, in one process.

    All parties are on this machine. Base models are loaded once. Reads and writes exactly the files of the separate
    commands. What is done already is not done again, so the same command goes on after a stop. With --dry-run, it
    prints these commands, one a line, and does none of them.

    --method runs another method, with the same data and the same budgets, in a separate workspace, baselines/METHOD.
    fedavg: no training at the server. fedavg-aux: the server trains both models on the auxiliary
    data, without distillation. standalone: each client alone. centralized: the LLM on the data of all parties together.
    fedmkt: each client keeps a model of its own, and what models know of public rows travels. llm2slm: so too, but the
    LLM stays as it is. standalone-public: each client also trains on the public rows, and learns from nobody.
    fedprox, fedavgm, fedadagrad, fedadam, fedyogi: fedavg with their part, client_training.proximal = 0.01 or
    aggregation.server, and its defaults.

    Example: fedcollm run --method fedavg-aux
    """
    asked: dict[str, Any] = {"method": method, "rounds": _rounds(rounds), "overwrite": overwrite}
    asked |= {"scores": scores, "each_round": each_round, "client_scores": client_scores}
    if dry_run:
        from stages.federation.ahead import ahead

        lines = ahead(opened.workspace, folder=opened.folder, **asked)
        opened.console.result(lines, texts.lines(lines) if lines else "nothing is left to do")
        return
    from stages.federation.run import run as stage

    results = stage(
        opened.workspace,
        **asked,
        report=opened.console.report,
    )
    opened.console.result(results, progress.scores(results).drawn() if results else "done")


@in_workspace("quiet", "device", "dtype")
def next(
    *,
    client: Annotated[
        int | None,
        typer.Option("--client", min=1, autocompletion=completing.clients, help="The client whose step it is."),
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="The server's step.")] = False,
    sync: Annotated[bool, typer.Option("--sync", help="pull before, and push after.")] = False,
    opened: Session,
) -> None:
    """Do whatever is the next step of a party.

    For cron and job scripts: one call takes one step, reads and writes what that step does, and prints its command.
    If it must wait, it says for what and ends with exit code 3. If nothing is left to do, it ends with 9. If the
    agreement was edited, it ends with 5. A person must decide whether to join a roster or to replace something: it
    does neither. Without --client and --server, it takes a step of any party with data here. With --sync it fetches
    first what others have sent to the remote, and sends what this party has made.

    Example: fedcollm next --client 2
    """
    from stages.federation.next import next as stage

    if client is not None and server:
        raise UsageProblem("--client and --server are two parties", mend="give one of them")
    party = "server" if server else None if client is None else f"client-{opened.workspace.check_client(client)}"
    if sync:
        from stages.federation.watch import synced

        if party is None:
            raise UsageProblem("--sync needs a party", mend=f"{Command('next', client=2, sync=True)}, or --server")
        done = synced(opened.workspace, client=client, report=opened.console.report)
    else:
        done = stage(opened.workspace, party=party, report=opened.console.report)
    line = str(done) if done else ""
    opened.console.result({"command": line}, line or "nothing is left to do")
    if done is None:
        raise typer.Exit(NOTHING_LEFT_EXIT_CODE)


@in_workspace()
def status(
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Read and hash every byte, instead of sizes alone.")] = False,
    opened: Session,
) -> None:
    """Tell what is done and what comes next.

    Says which steps are done, missing, damaged or stale, and which command comes next. Reads the manifests of the whole
    workspace, writes nothing, loads no model. With --verify it ends with exit code 4 if any byte has changed since it
    was written, and says what it does not check.

    Example: fedcollm status
    """
    from stages.progress.status import status as stage
    from stages.progress.time_left import seconds_left

    found = stage(opened.workspace, verify=verify)
    left = seconds_left(opened.workspace, found.rounds)
    value = found.as_json(opened.folder) | {"seconds_left": left}
    opened.console.result(value, progress.status(found, opened.folder, seconds_left=left))
    if verify and found.is_damaged:
        raise typer.Exit(Damaged.exit_code)


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
