"""The commands that a study begins with: init, prepare, and the demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedcollm_cli import completing
from fedcollm_cli.commands.reporting import in_words
from fedcollm_cli.console import Console
from fedcollm_cli.session import JsonOption, OverwriteOption, QuietOption, Session, guarded, in_workspace, show_one_gpu
from fedcollm_cli.views import progress
from fedcollm_cli.views.joining import joined
from stages.parties import names
from stages.parties.names import SERVER
from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace.commands import Command

if TYPE_CHECKING:
    from stages.federation.joining import Joined


OF_A_TEMPLATE = ("template", "task", "clients", "rounds", "seed", "set_")


def init(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    *,
    agreement: Annotated[
        Path | None,
        typer.Option("--agreement", metavar="<path>", help="Make one party's folder, from this fedcollm.toml."),
    ] = None,
    invite: Annotated[
        Path | None,
        typer.Option("--invite", metavar="<path>", help="Make one party's folder, from what `pack --invite` has made."),
    ] = None,
    client: Annotated[
        int | None, typer.Option("--client", min=1, help="The client that this party is; an invitation says it.")
    ] = None,
    server: Annotated[bool, typer.Option("--server", help="This party is the server.")] = False,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="<str>", help="What the organiser reads out of the invitation.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            autocompletion=completing.templates,
            help="demo, demo-fedmkt, blank, or a paper's settings: s1, s2, s3, mkt.",
        ),
    ] = "blank",
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="An lm-eval task to train and score on; repeatable. Default: arc_easy."),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="K, the number of clients (demos have their own).")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="T, the number of rounds (demos have their own).")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="The federation's seed.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="<str>",
            autocompletion=completing.settings,
            help="KEY=VALUE of fedcollm.toml, over the template's; repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a workspace, or one party's folder.

    Writes fedcollm.toml with every key explained, machine.toml, README.md, run_rounds.sh, a Snakefile and task files.
    s1: GPT-2 with GPT-2-large. s2: OPT-1.3B with OPT-6.7B. s3: Sheared-LLaMA-1.3B with Llama-2-7B. The paper has a
    federation for each of its tasks: commonsense_qa, openbookqa, arc_challenge, arc_easy. mkt: clients with GPT-2-XL,
    OPT-1.3B, Bloom-1.1B and Sheared-LLaMA-1.3B, and Llama-2-7B, as in FedMKT's Table 2.

    With --agreement or --invite it makes the folder of one real party: the agreement byte for byte, tasks/, what
    machine.toml this party needs, a README.md with its own commands, .gitignore. It prints what was agreed, and the
    fingerprint of the invitation. Nothing in an invitation is run. The folder is made completely or not at all.

    Example: fedcollm init study --template s1 --set distillation.lambda_slm=0.5
    """
    console = Console(quiet=quiet, as_json=as_json)
    with guarded(console):
        if agreement or invite or client or server or fingerprint:
            given_too = [name for name in OF_A_TEMPLATE if _is_given(context, name)]
            made = _joined(folder, agreement, invite, client, server=server, fingerprint=fingerprint, also=given_too)
            console.result(made.as_json(), joined(made))
            return
        from stages.federation.settings_in_words import parse_settings
        from stages.workspace.init import init as stage

        given: dict[str, Any] = {"seed": seed, "clients": clients, "rounds": rounds}
        given["settings"] = parse_settings(set_ or [])
        workspace = stage(folder, template=template, tasks=task or [], **given)
        console.result({"path": str(workspace.root)}, f"{folder}")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _joined(
    folder: Path,
    agreement: Path | None,
    invite: Path | None,
    client: int | None,
    *,
    server: bool,
    fingerprint: str | None,
    also: list[str],
) -> Joined:
    """One party's folder. Raises UsageProblem unless one source is said and, of an agreement, one party."""
    from stages.federation.joining import join_by_agreement, join_by_invite

    by_agreement = Command("init", folder, agreement="fedcollm.toml", client=client or 2)
    by_invite = Command("init", folder, invite="FILE")
    if (agreement is None) == (invite is None):
        message = "a party's folder is made from one thing: --agreement or --invite"
        raise UsageProblem(message, mend=f"{by_agreement}, or {by_invite}")
    if also:
        message = f"--{also[0].rstrip('_')} is for a new agreement, and here is one"
        raise UsageProblem(message, mend=f"leave it out: {by_invite if invite else by_agreement}")
    if client is not None and server:
        raise UsageProblem("--client and --server exclude each other", mend="give the one that this party is")
    if invite is not None:
        party = SERVER if server else names.client(client) if client else None
        return join_by_invite(folder, invite, party=party, fingerprint=fingerprint)
    if fingerprint is not None:
        raise UsageProblem("--fingerprint is of an invitation", mend=f"leave it out, or {by_invite}")
    if client is None and not server:
        mend = f"{by_agreement}, or {Command('init', folder, agreement='fedcollm.toml', server=True)}"
        raise UsageProblem("which party is this? give --client or --server", mend=mend)
    assert agreement is not None
    return join_by_agreement(folder, agreement, client)


@in_workspace("quiet")
def check_rows(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="JSON lines, CSV or Parquet. Default: all rows of this workspace that are here."),
    ] = None,
    *,
    client: Annotated[
        int | None,
        typer.Option("--client", min=1, autocompletion=completing.clients, help="Only what this client trains on."),
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write NAME.mended.jsonl beside a file that can be mended.")
    ] = False,
    opened: Session,
) -> None:
    """Check rows of your own before anybody trains on them.

    Reads the rows, and writes nothing but what --fix asks for. Tells all at once, with line numbers. FAIL: lines that
    are no rows, and rows that are too long; training would refuse the file. WARN: rows that occur twice, here or in
    another file; prompts with two answers, or that are also questions of [evaluation]; rows without a completion that
    teach nothing; no space before an answer, or two; byte order marks and mixed line ends. Prints how long rows are in
    tokens, if the tokenizer is here, and the answers where there are few. It prints no other text of a row. A file that
    has its place in this workspace is checked for what is done with it there, any other as a client's. Loads no
    weights. Ends with exit code 4 if a file would be refused.

    With --fix, a copy is written: Unix's line ends, no byte order mark, no empty line, each row once, one space before
    an answer. Spaces that indent a line, and lines that are no rows, stay as they are. The file itself never
    changes. Tables are checked and not mended.

    Example: fedcollm check-rows --client 2 --fix
    """
    from fedcollm_cli.views.rows import checked_rows
    from stages.planning.check_rows import check_rows as stage

    found = stage(opened.workspace, files=files or (), client=client, fix=fix, report=opened.console.report)
    opened.console.result([one.as_json(opened.workspace) for one in found], checked_rows(opened.workspace, found))
    if any(one.is_refused for one in found):
        raise typer.Exit(Damaged.exit_code)


@in_workspace("quiet")
def prepare(
    *,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Divide a public dataset among the parties.

    For a simulation. Reads the lm-eval tasks or JSONL files that [data] names. Writes private/client-k/train.jsonl,
    private/server/auxiliary.jsonl and private/split.json; with data.held_out_share also private/server/held-out.jsonl;
    with FedMKT also private/client-k/public.jsonl, a copy of the auxiliary rows for each client. Prints rows and
    labels per party. Refuses on a machine that shows itself to be one party's, unless machine.toml says simulation.

    Example: fedcollm prepare
    """
    from stages.data.prepare import prepare as stage

    summary = stage(opened.workspace, overwrite=overwrite, report=opened.console.report)
    path = opened.workspace.shown(opened.workspace.split)
    opened.console.result({"path": path, **summary}, progress.split(summary))


def demo(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to make the demo's workspace. Default: fedcollm-demo, or fedmkt-demo.")
    ] = None,
    *,
    method: Annotated[
        Literal["fedcollm", "fedmkt"], typer.Option(help="What is shown, with its baselines.")
    ] = "fedcollm",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show a whole federation in minutes.

    Nothing is downloaded: it makes a small world of questions and two tiny base models. Then it runs every method by
    the same stages, scores the models by lm-eval, compares the methods and writes a report. Results stay in the folder;
    the next call does only what is missing. With --method fedmkt, three clients have models of three kinds, whose
    tokenizers differ, and each knows a third of the world's rules.

    Example: fedcollm demo --method fedmkt
    """
    console = Console(quiet=quiet, as_json=as_json)
    with guarded(console):
        from stages.demo.demo import demo as stage

        show_one_gpu("auto")
        place = folder or Path(f"{method}-demo")
        measured = stage(place, method=method, in_words=in_words, report=console.report)
        console.result(asdict(measured), progress.demo(measured))
