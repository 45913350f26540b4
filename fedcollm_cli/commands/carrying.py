"""The commands for parties that mail their files: pack and unpack."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedcollm_cli import completing
from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from stages.runtime import texts
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command

ReplaceOption = Annotated[bool, typer.Option("--overwrite", help="Replace another file that is there.")]


@in_workspace("quiet")
def pack(
    *,
    round: Annotated[
        int | None,
        typer.Option("--round", min=1, autocompletion=completing.rounds, help="The round whose files are packed."),
    ] = None,
    client: Annotated[
        int | None,
        typer.Option("--client", min=1, autocompletion=completing.clients, help="Pack what this client sends."),
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="Pack what the server sends.")] = False,
    to: Annotated[
        int | None,
        typer.Option(
            "--to", min=1, autocompletion=completing.clients, help="With --server: only what this client needs."
        ),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Pack the client's public keys instead.")] = False,
    roster: Annotated[bool, typer.Option("--roster", help="Pack the roster and all public keys instead.")] = False,
    invite: Annotated[
        bool, typer.Option("--invite", help="Pack what a new party needs to begin: this client, or the server.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="The file to write. Default: its usual name, in this folder.")
    ] = None,
    opened: Session,
    overwrite: ReplaceOption = False,
) -> None:
    """Make one file of what a party sends.

    For mail or a USB stick. Reads exchange/round-t/client-k and reveal-k. With --server: broadcast, close and, with
    FedMKT, server. In round 1 of FedMKT, also vocabulary-client-k, or vocabulary-server. Where FedMKT averages, also
    adapter-client-k once it is there, and of the server the broadcast before anything else. With --keys:
    exchange/keys/client-k.json. With --roster: exchange/federation.json and all of exchange/keys. Checks them as unpack
    does. Writes a ZIP without compression into the current folder, such as NAME-round-0005-client-2.fedcollm. The same
    files give the same bytes. Never packs a secret key.

    With --invite: fedcollm.toml, evaluation.toml and tasks/, who takes part, what to install and which models to fetch,
    for `init --invite` at the new party. Prints the fingerprint, to be read out by phone. Refuses task files that would
    run code.

    Example: fedcollm pack --client 2 --round 5
    """
    from stages.exchange.pack import pack as stage

    if invite:
        if round is not None or to is not None or keys or roster or server == (client is not None):
            mend = f"{Command('pack', invite=True, client=2)}, or {Command('pack', invite=True, server=True)}"
            raise UsageProblem("an invitation is for one party, and has nothing else in it", mend=mend)
        from stages.exchange.inviting import pack_invite

        made = pack_invite(
            opened.workspace,
            folder=Path.cwd(),
            client=client,
            output=output and output.absolute(),
            overwrite=overwrite,
            report=opened.console.report,
        )
        opened.console.result(made.as_json(), texts.lines([str(made.path), f"fingerprint {made.fingerprint}"]))
        return

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

    Reads one bundle. First it checks that nothing in it is damaged, and that all of it belongs to this federation and
    agreement. If not, it writes nothing. Then it writes the bundle's folders and files into exchange/, each completely.
    What is there already with the same bytes is left alone. Other bytes are refused.

    Example: fedcollm unpack tiny-round-0005-client-2.fedcollm
    """
    from stages.exchange.unpack import unpack as stage

    found = stage(opened.workspace, file.absolute(), overwrite=overwrite, report=opened.console.report)
    opened.console.result(asdict(found), texts.lines([*found.unpacked, *found.already]))
