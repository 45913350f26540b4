"""fedcollm: every step of FedCoLLM's Algorithm 1 as a command over a workspace folder.

Nothing heavy is imported here: a command imports its stage when it is called.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fedcollm_cli import __version__
from fedcollm_cli.commands import (
    aligning,
    auditing,
    carrying,
    comparing,
    enrolling,
    exporting,
    federation,
    forking,
    knowledge,
    planning,
    queueing,
    reporting,
    rounds,
    sharing,
    shearing,
    starting,
)

app = typer.Typer(
    name="fedcollm",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Co-tune a server's large language model and its clients' small ones, round by round, file by file.\n\n"
    "A round: broadcast, client-train (each client), aggregate, co-distill, evaluate. "
    "`fedcollm demo` shows it all in minutes; `fedcollm init` begins a study.\n\n"
    "With FedMKT: align once; then client-train, share-knowledge, co-distill, share-knowledge --server, "
    "client-distill.",
)

COMMANDS = (
    *(starting.init, planning.plan, planning.prefetch, shearing.shear),
    *(starting.prepare, starting.check_rows, aligning.align),
    *(enrolling.keys, enrolling.enroll, enrolling.join),
    *(rounds.broadcast, rounds.client_train, rounds.reveal, rounds.aggregate, rounds.co_distill),
    *(knowledge.share_knowledge, knowledge.client_distill, rounds.evaluate),
    *(federation.run, federation.next, federation.status, queueing.slurm),
    *(carrying.pack, carrying.unpack, sharing.push, sharing.pull),
    *(comparing.compare, comparing.sweep, forking.fork, reporting.report, planning.comm_cost, exporting.export),
    *(auditing.verify, auditing.audit, auditing.diff),
    starting.demo,
)
"""In the order of their use, as `fedcollm --help` lists them."""

for command in COMMANDS:
    app.command()(command)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Hold the options of fedcollm itself."""
    if version:
        typer.echo(f"fedcollm {__version__}")
        raise typer.Exit
    del context
