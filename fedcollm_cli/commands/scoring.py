"""evaluate: its options; and what it does with --rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcollm_cli import completing
from fedcollm_cli.session import (
    CsvOption,
    LatexOption,
    LimitOption,
    MarkdownOption,
    OverwriteOption,
    Session,
    TasksOption,
    asking,
    form_of,
    in_workspace,
)
from fedcollm_cli.views import progress
from fedcollm_cli.views.rows import row_scores
from stages.artefacts.subjects import Subject
from stages.runtime.errors import UsageProblem
from stages.workspace.attacks import Attack
from stages.workspace.commands import Command


@in_workspace("quiet", "device", "dtype", "processes")
def evaluate(
    *,
    round: Annotated[
        int | None,
        typer.Option("--round", min=1, autocompletion=completing.rounds, help="The round t; with --zero-shot, none."),
    ] = None,
    model: Annotated[
        Literal["slm", "llm", "aggregate"],
        typer.Option("--model", help="Of the server's models: slm or llm after co-distill, or the aggregate before."),
    ] = "slm",
    client: Annotated[
        int | None,
        typer.Option("--client", min=1, autocompletion=completing.clients, help="Instead: this client's own SLM."),
    ] = None,
    zero_shot: Annotated[bool, typer.Option("--zero-shot", help="The base alone, without an adapter.")] = False,
    attack: Annotated[
        float | None,
        typer.Option("--attack", help="Measure robust_acc, too, with this radius of an attack. 0: not even as agreed."),
    ] = None,
    attack_steps: Annotated[
        int | None, typer.Option("--attack-steps", min=1, help="With --attack: steps of gradient ascent. Default: 5.")
    ] = None,
    markdown: MarkdownOption = False,
    latex: LatexOption = False,
    csv: CsvOption = False,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="Instead: loss and exact match on this file.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="With --rows: let the model write, too; Rouge-L and match of its text.")
    ] = False,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Score a model by lm-eval, or on rows of your own.

    On the tasks of [evaluation], asked as it says. Reads private/server/round-t/slm, llm or aggregate, or
    exchange/round-t/client-k. Writes results/round-t/*.json, or results/zero-shot/*.json. First it checks that the
    adapter is in the model and changes its logits. With --attack, robust_acc is the share of multiple-choice questions
    that are right whatever gradient ascent does to their prompts' embeddings, within a radius. Other scores stay the
    same.

    With --tasks it asks other tasks than [evaluation] names, of lm-eval or of tasks/, and writes
    results/own-tasks/TASKS/round-t/*.json. compare --tasks compares methods by them, and report shows them.

    With --rows it reads a file of rows instead, and needs no task. It tells the mean loss per answer token in nats, its
    perplexity, and the share of rows whose answer is the likeliest at each token. Writes
    results/own-rows/round-t/*.json, and report shows them. Both are kept apart: status, run and a plain compare do not
    read them.

    Example: fedcollm evaluate --round 1 --model llm
    """
    from stages.evaluate import evaluate as stage

    form = form_of(opened, markdown=markdown, latex=latex, csv=csv)
    own = client is not None and opened.workspace.of_client(client).own_model
    if zero_shot == (round is not None) or (zero_shot and ((client and not own) or model == "aggregate")):
        example = Command("evaluate", round=1, model="slm")
        mend = f"{example}; for a base alone, --zero-shot with --model slm or llm, or a client with a model of its own"
        raise UsageProblem("evaluate needs either --round or --zero-shot", mend=mend)
    if rows is not None or generate:
        if attack is not None or attack_steps is not None:
            raise UsageProblem("--attack is of questions, not of --rows", mend="leave one of them out")
        if tasks or limit:
            raise UsageProblem("--tasks and --limit are of questions, not of --rows", mend="leave one of them out")
        _evaluate_rows(opened, rows, model=model, round=round, client=client, generate=generate, overwrite=overwrite)
        return
    workspace = asking(opened.workspace, tasks, limit)
    result = stage(
        workspace,
        model=model,
        round=round,
        client=client,
        attack=_attack(radius=attack, steps=attack_steps),
        overwrite=overwrite,
        processes=opened.processes,
        report=opened.console.report,
    )
    path = workspace.shown(workspace.result(round, result["subject"]))
    opened.console.result({"path": path, **result}, progress.scores([result]).written(form))


def _attack(*, radius: float | None, steps: int | None) -> Attack | None:
    if radius is None:
        if steps is not None:
            raise UsageProblem("--attack-steps is for --attack", mend=Command("evaluate", round=1, attack="0.1"))
        return None
    if radius == 0 and steps is None:
        return Attack()
    if not 0 < radius <= 1:
        message = f"--attack {radius:g}: it is a share of the length of each token's embedding, above 0 and up to 1"
        raise UsageProblem(message, mend=Command("evaluate", round=1, attack="0.1"))
    return Attack(radius=radius) if steps is None else Attack(radius=radius, steps=steps)


def _evaluate_rows(
    opened: Session,
    rows: Path | None,
    *,
    model: Subject,
    round: int | None,
    client: int | None,
    generate: bool,
    overwrite: bool,
) -> None:
    """Score a model on rows of one's own, and print what was found. Raises UsageProblem where there are none."""
    from stages.evaluate_rows import evaluate_rows as stage

    if rows is None:
        raise UsageProblem("--generate is for --rows", mend=Command("evaluate", round=1, rows=..., generate=True))
    found = stage(
        opened.workspace,
        rows,
        model=model,
        round=round,
        client=client,
        generate=generate,
        overwrite=overwrite,
        processes=opened.processes,
        report=opened.console.report,
    )
    opened.console.result(found, row_scores(found))
