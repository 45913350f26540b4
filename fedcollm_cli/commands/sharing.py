"""The commands for parties that share a remote: push and pull."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from stages.runtime import texts
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command

OfClient = Annotated[int | None, typer.Option("--client", min=1, help="The client that this party is.")]
OfServer = Annotated[bool, typer.Option("--server", help="This party is the server.")]
OfRound = Annotated[int | None, typer.Option("--round", min=1, help="This round alone. Default: all, and keys.")]


@in_workspace("quiet")
def push(
    *,
    client: OfClient = None,
    server: OfServer = False,
    round: OfRound = None,
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
    found = stage(opened.workspace, client=client, round=round, overwrite=overwrite, report=opened.console.report)
    opened.console.result(asdict(found), texts.lines([*found.moved, *found.already]))


@in_workspace("quiet")
def pull(
    *,
    client: OfClient = None,
    server: OfServer = False,
    round: OfRound = None,
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
    found = stage(opened.workspace, client=client, round=round, overwrite=overwrite, report=opened.console.report)
    opened.console.result(asdict(found), texts.lines([*found.moved, *found.already]))


def _check(client: int | None, server: bool, verb: str, opened: Session) -> None:
    if server == (client is not None):
        mend = f"{Command(verb, client=2)}, or {Command(verb, server=True)}"
        raise UsageProblem(f"{verb} needs a party: either --client or --server", mend=mend)
    if client is not None:
        opened.workspace.check_client(client)
