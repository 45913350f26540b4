"""The commands for parties that mail their files: pack and unpack."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from stages.runtime import texts
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command

ReplaceOption = Annotated[bool, typer.Option("--overwrite", help="Replace another file that is there.")]


@in_workspace("quiet")
def pack(
    *,
    round: Annotated[int | None, typer.Option("--round", min=1, help="What is sent in this round.")] = None,
    client: Annotated[int | None, typer.Option("--client", min=1, help="By this client.")] = None,
    server: Annotated[bool, typer.Option("--server", help="By the server.")] = False,
    to: Annotated[int | None, typer.Option("--to", min=1, help="Without what the server sends to others.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Instead: the client's public keys.")] = False,
    roster: Annotated[bool, typer.Option("--roster", help="Instead: the roster and all public keys.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="The file to write. Default: a name in here.")] = None,
    opened: Session,
    overwrite: ReplaceOption = False,
) -> None:
    """Make one file of what a party sends.

    To mail or to carry. Reads exchange/round-t/client-k and reveal-k; with --server, broadcast and close; with --keys,
    exchange/keys/client-k.json; with --roster, exchange/federation.json and all of exchange/keys. Checks it as unpack
    does. Writes a ZIP without compression, such as NAME-round-0005-client-2.fedcollm, in the current folder; the same
    files give the same bytes. Never packs a secret key.

    Example: fedcollm pack --client 2 --round 5
    """
    from stages.exchange.pack import pack as stage

    if round is not None and server == (client is not None):
        mend = f"{Command('pack', client=2, round=5)}, or {Command('pack', server=True, round=5)}"
        raise UsageProblem("pack needs a sender: either --client or --server", mend=mend)
    packed = stage(
        opened.workspace,
        folder=Path.cwd(),
        round=round,
        client=client,
        to=to,
        keys=keys,
        roster=roster,
        output=output and output.absolute(),
        overwrite=overwrite,
        report=opened.console.report,
    )
    opened.console.result(packed.as_json(), str(packed.path))


@in_workspace("quiet")
def unpack(
    *,
    file: Annotated[Path, typer.Argument(help="The bundle.")],
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Put what another party packed into its place.

    Reads one bundle. Writes the folders and files of exchange/ that it holds, each whole, and nothing unless all of it
    is sound and of this federation, agreement and round. What is there already with the same bytes is left alone; other
    bytes are refused.

    Example: fedcollm unpack tiny-round-0005-client-2.fedcollm
    """
    from stages.exchange.unpack import unpack as stage

    found = stage(opened.workspace, file.absolute(), overwrite=overwrite, report=opened.console.report)
    opened.console.result(asdict(found), texts.lines([*found.unpacked, *found.already]))
