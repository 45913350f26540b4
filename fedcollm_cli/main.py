"""fedcollm: every step of FedCoLLM's Algorithm 1 as a command over a workspace folder.

Nothing heavy is imported here: a command imports its stage when it is called.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
    scoring,
    sharing,
    shearing,
    starting,
)
from fedcollm_cli.console import tell_failure
from stages.runtime.errors import UsageProblem

UsageError: Any = typer.BadParameter.__base__
"""What typer raises for words that are no command; it has click's, or one of its own."""


class Program(TyperGroup):
    """The commands. Words that are none end as typer has it, and with --json among them also as JSON."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note whether JSON is asked for."""
        ctx.meta[JSON] = JSON in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Call the command that the words name."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            if ctx.meta[JSON]:
                told = error.ctx or ctx
                tell_failure(
                    UsageProblem.exit_code,
                    error.format_message(),
                    mend=f"{told.command_path} {told.help_option_names[0]}",
                )
            raise


JSON = "--json"

app = typer.Typer(
    name="fedcollm",
    cls=Program,
    context_settings={"help_option_names": ["--help", "-h"]},
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
    *(knowledge.share_knowledge, knowledge.client_distill, scoring.evaluate),
    *(federation.run, federation.next, federation.status, queueing.slurm),
    *(carrying.pack, carrying.unpack, sharing.push, sharing.pull, sharing.watch),
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
    version: Annotated[bool, typer.Option("--version", "-v", help="Print the version and exit.")] = False,
) -> None:
    """Hold the options of fedcollm itself."""
    if version:
        typer.echo(f"fedcollm {__version__}")
        raise typer.Exit
    del context
