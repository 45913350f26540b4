"""The commands that set federations side by side: compare and sweep."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, get_args

import typer

from fedcollm_cli import completing
from fedcollm_cli.session import (
    ClientScoresOption,
    CsvOption,
    EachRoundOption,
    LatexOption,
    LimitOption,
    MarkdownOption,
    Session,
    TasksOption,
    asking,
    form_of,
    in_workspace,
)
from fedcollm_cli.views import tables
from stages.paper.reported import Setting
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command
from stages.workspace.methods import Compared


@in_workspace("quiet", "device", "dtype")
def compare(
    *,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Such as 1,2,3: run what is missing of these. Default: what is there.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Such as fedprox,fedcollm. Default: the paper's with --seeds, else those there.",
        ),
    ] = None,
    paper: Annotated[
        Setting | None,
        typer.Option("--paper", help="Print the paper's figures beside: FedCoLLM's s1 to s3; mkt-... are FedMKT's."),
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="acc, acc_norm or robust_acc.")] = "acc",
    tasks: TasksOption = None,
    limit: LimitOption = None,
    collect: Annotated[bool, typer.Option("--collect", help="With --seeds: run nothing, read what is there.")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="With --seeds: run nothing here, write job scripts and slurm/compare.sh.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --seeds: run everything again, as the settings are now.")
    ] = False,
    markdown: MarkdownOption = False,
    latex: LatexOption = False,
    csv: CsvOption = False,
    each_round: EachRoundOption = True,
    opened: Session,
) -> None:
    """Compare all methods, as the paper's Tables 1 and 2 do.

    All methods must have the same data and the same budgets: first it checks their steps, examples and tokens. Reads
    results/ here, in baselines/ and in seeds/. With --seeds, it runs what is missing. Prints means, deviations over
    seeds, and paired differences with 95 % intervals. It names a winner only if the interval supports it. fedavg-aux
    trains on the auxiliary data without distillation. So FedCoLLM minus fedavg-aux is the effect of distillation.
    With FedMKT that is FedMKT minus standalone-public. Where clients have models of their own, each has rows of its
    own, and methods that average are left out.

    With --tasks, by other tasks than [evaluation] names: it reads results/own-tasks/. With --seeds, too, it scores what
    is missing, of the last round alone, and trains nothing that is there.

    With --slurm, each method and seed gets job scripts in its own folder, as `fedcollm slurm` writes them. Then
    slurm/compare.sh submits all of them, a chain of jobs for each, and --collect prints the tables when they are done.

    Example: fedcollm compare --seeds 1,2,3
    """
    from stages.federation.compare import compare as stage
    from stages.federation.compare import spread_all

    form = form_of(opened, markdown=markdown, latex=latex, csv=csv)
    if overwrite and (collect or seeds is None):
        mend = Command("compare", seeds="1,2,3", overwrite=True)
        raise UsageProblem("--overwrite is for what --seeds runs", mend=mend)
    if slurm:
        wanted = _seeds(seeds)
        if wanted is None or collect:
            raise UsageProblem("--slurm is for what --seeds runs", mend=Command("compare", seeds="1,2,3", slurm=True))
        if tasks:
            raise UsageProblem("--tasks is for what runs here", mend="leave it out: jobs score the settings' tasks")
        _check_scored_by_jobs(each_round)
        script = spread_all(
            opened.workspace,
            seeds=wanted,
            methods=_methods(methods),
            overwrite=overwrite,
            report=opened.console.report,
        )
        opened.console.result([opened.workspace.shown(script)], opened.workspace.shown(script))
        return
    found = stage(
        asking(opened.workspace, tasks, limit),
        seeds=_seeds(seeds),
        methods=_methods(methods),
        paper=paper,
        metric=metric,
        collect=collect,
        each_round=each_round and not tasks,
        overwrite=overwrite,
        report=opened.console.report,
    )
    opened.console.result(asdict(found), tables.comparison(found).written(form))


@in_workspace("quiet", "device", "dtype")
def sweep(
    *,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="<str>",
            autocompletion=completing.settings,
            help="KEY=VALUE,VALUE of fedcollm.toml, off takes a key out; once for each setting to vary.",
        ),
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="acc, acc_norm or robust_acc.")] = "acc",
    markdown: MarkdownOption = False,
    latex: LatexOption = False,
    csv: CsvOption = False,
    collect: Annotated[bool, typer.Option("--collect", help="Run nothing, read what is there.")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Run nothing here: write job scripts, and slurm/sweep.sh that submits them.")
    ] = False,
    each_round: EachRoundOption = True,
    client_scores: ClientScoresOption = True,
    opened: Session,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run everything again, as the settings are now.")
    ] = False,
) -> None:
    """Run an ablation: every combination of some settings.

    Reads this workspace's models, tasks and data. Writes a workspace for each combination into sweeps/. Prints their
    scores, and each difference from the first. With several values of federation.seed, it prints means over seeds and
    95 % intervals. What is done already is not done again.

    With --slurm, each combination gets job scripts in its own folder, as `fedcollm slurm` writes them. Then
    slurm/sweep.sh submits all of them, a chain of jobs for each, and --collect prints the table when they are done.

    Example: fedcollm sweep --set distillation.lambda_slm=0,0.5,1 --set federation.seed=1,2,3
    """
    from stages.federation.settings_in_words import parse_setting
    from stages.federation.sweep import spread_out
    from stages.federation.sweep import sweep as stage

    form = form_of(opened, markdown=markdown, latex=latex, csv=csv)
    settings = [parse_setting(text) for text in set_ or []]
    grid = dict(settings)
    if len(grid) < len(settings):
        raise UsageProblem("--set names a key twice", mend="give all its values at once: --set KEY=VALUE,VALUE")
    report = opened.console.report
    if collect and (overwrite or slurm):
        raise UsageProblem("--collect runs nothing", mend="give it without --overwrite and --slurm")
    if slurm:
        _check_scored_by_jobs(each_round, client_scores)
        script = opened.workspace.shown(spread_out(opened.workspace, grid=grid, overwrite=overwrite, report=report))
        opened.console.result([script], script)
        return
    found = stage(
        opened.workspace,
        grid=grid,
        metric=metric,
        collect=collect,
        each_round=each_round,
        client_scores=client_scores,
        overwrite=overwrite,
        report=report,
    )
    opened.console.result(found.as_json(), tables.swept(found).written(form))


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageProblem(f"--seeds {text!r} is not a list of seeds", mend="such as --seeds 1,2,3")
    return sorted({int(seed) for seed in text.split(",")})


def _methods(text: str | None) -> list[Compared] | None:
    if text is None:
        return None
    known: tuple[Compared, ...] = get_args(Compared)
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise UsageProblem(f"there is no method {unknown[0]!r}", mend=f"there are: {', '.join(known)}")
    return [method for method in known if method in text.split(",")]


def _check_scored_by_jobs(each_round: bool, client_scores: bool = True) -> None:
    if not each_round:
        raise UsageProblem("--last-round is for what runs here", mend="leave it out: jobs evaluate after every round")
    if not client_scores:
        mend = "leave it out with --slurm: jobs evaluate clients too; --collect takes it"
        raise UsageProblem("--no-client-scores is for what runs here", mend=mend)
