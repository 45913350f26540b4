"""The commands for parties that share a remote: push, pull and watch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from fedcollm_cli.views import plans
from stages.runtime import texts
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command

if TYPE_CHECKING:
    from stages.exchange.push_and_pull import Moved

OfClient = Annotated[int | None, typer.Option("--client", min=1, help="The client that this party is.")]
OfServer = Annotated[bool, typer.Option("--server", help="This party is the server.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Move nothing: tell what would be moved, and its size.")]
OfRound = Annotated[int | None, typer.Option("--round", min=1, help="This round alone. Default: all, and keys.")]


@in_workspace("quiet")
def push(
    *,
    client: OfClient = None,
    server: OfServer = False,
    round: OfRound = None,
    dry_run: DryRun = False,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Send what this party has made to the remote.

    The remote is exchange.remote of machine.toml. Reads what `pack` would pack, and checks it likewise. Writes it to
    the remote, each folder's files first and its manifest last. What is there already is left alone. Other bytes are
    refused. After a stop the same command goes on.

    Example: fedcollm push --client 2
    """
    from stages.exchange.push_and_pull import push as stage

    _check(client, server, "push", opened)
    asked: dict[str, Any] = {"client": client, "round": round, "overwrite": overwrite, "dry_run": dry_run}
    _print(stage(opened.workspace, **asked, report=opened.console.report), opened)


@in_workspace("quiet")
def pull(
    *,
    client: OfClient = None,
    server: OfServer = False,
    round: OfRound = None,
    dry_run: DryRun = False,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Fetch from the remote what this party needs of others.

    Reads the remote, exchange.remote of machine.toml. Checks each folder as `unpack` does, then writes it into
    exchange/, completely or not at all. What is not whole on the remote yet is named, and fetched by a later call.

    Example: fedcollm pull --client 2
    """
    from stages.exchange.push_and_pull import pull as stage

    _check(client, server, "pull", opened)
    asked: dict[str, Any] = {"client": client, "round": round, "overwrite": overwrite, "dry_run": dry_run}
    _print(stage(opened.workspace, **asked, report=opened.console.report), opened)


@in_workspace("quiet", "device", "dtype")
def watch(
    *,
    client: OfClient = None,
    server: OfServer = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, help="Seconds between two looks; more where nothing changes.")
    ] = 60.0,
    opened: Session,
) -> None:
    """Do a party's part to the end.

    For those without cron. Again and again it does what `next --sync` does: fetches from the remote, takes this party's
    next step, sends what it made. Where it has to wait it says for what, once, and looks again. Without a remote in
    machine.toml it takes steps alone. It reads and writes nothing of its own, so stop it whenever you like: the same
    command goes on. A step that fails ends it with that step's error. It ends when this party has nothing left to do.

    Example: fedcollm watch --client 2
    """
    from stages.federation.watch import watch as stage

    _check(client, server, "watch", opened)
    done = stage(opened.workspace, client=client, every_s=every, report=opened.console.report)
    lines = [str(command) for command in done]
    opened.console.result({"commands": lines}, texts.lines([*lines, "nothing is left to do"]))


def _print(found: Moved, opened: Session) -> None:
    would = f"{plans.shown(found.size_bytes)} in {len(found.moved)} would be moved" if found.dry_run else ""
    opened.console.result(asdict(found), texts.lines([*found.moved, *([would] if would else found.already)]))


def _check(client: int | None, server: bool, verb: str, opened: Session) -> None:
    if server == (client is not None):
        mend = f"{Command(verb, client=2)}, or {Command(verb, server=True)}"
        raise UsageProblem(f"{verb} needs a party: either --client or --server", mend=mend)
    if client is not None:
        opened.workspace.check_client(client)
