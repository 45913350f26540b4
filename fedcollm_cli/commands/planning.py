"""The commands that look ahead and count: plan, prefetch, comm-cost; and their results as people read them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from fedcollm_cli import completing
from fedcollm_cli.console import Console
from fedcollm_cli.session import JsonOption, Session, WorkspaceOption, guarded, in_workspace, session
from fedcollm_cli.views.knowledge_costs import told_cost_of
from fedcollm_cli.views.plans import cost_of, drawn_table_3, plan_of
from stages.runtime import texts
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command


@in_workspace("quiet", "device", "dtype")
def plan(
    *,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", min=1, help="Tokens of a row to plan for. Default: the longest row here, or max_length."
        ),
    ] = None,
    opened: Session,
) -> None:
    """Tell what each stage will take, and what is missing here.

    Prints steps, memory by part, bytes per round and disk. Then it lists what is missing on this machine, each with the
    command that gets it. Reads the settings, the base models' configurations, and rows and tokenizer if they are here.
    Loads no weights, needs no network, writes nothing.

    Example: fedcollm plan --length 128
    """
    from stages.planning.plan import plan as stage

    found = stage(opened.workspace, length=length, report=opened.console.report)
    opened.console.result(asdict(found), plan_of(found))


@in_workspace("quiet")
def prefetch(
    *,
    model: Annotated[
        Literal["slm", "llm"] | None, typer.Option("--model", help="One model only; a client needs no LLM.")
    ] = None,
    client: Annotated[
        int | None,
        typer.Option("--client", min=1, autocompletion=completing.clients, help="Only the SLM that this client tunes."),
    ] = None,
    tasks: Annotated[bool, typer.Option("--tasks/--no-tasks", help="Whether to fetch the tasks' datasets too.")] = True,
    opened: Session,
) -> None:
    """Fetch base models and the tasks' datasets.

    Needs a network. Without one, it ends with exit code 3 if anything is missing. Reads fedcollm.toml, machine.toml and
    tasks/. Writes only into the caches of the Hugging Face hub (HF_HOME).

    Example: fedcollm prefetch --model slm
    """
    from stages.planning.prefetch import prefetch as stage

    if model and client:
        mend = f"{Command('prefetch', client=client)}, or --model {model}"
        raise UsageProblem("--client and --model exclude each other", mend=mend)
    found = stage(opened.workspace, model=model, client=client, tasks=tasks, report=opened.console.report)
    lines = [f"{one.name}: {'was here already' if one.was_here else 'fetched'}" for one in found]
    opened.console.result([asdict(one) for one in found], texts.lines(lines) or "there is nothing to fetch")


def comm_cost(
    preset: Annotated[
        Literal["s1", "s2", "s3", "all"] | None,
        typer.Option("--preset", help="Table 3 of the paper for this setting, instead of this workspace."),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count what travels, against sending the full model.

    Reads the manifests in exchange/, in every mode, and the SLM's configuration. With method fedmkt or llm2slm,
    it counts vocabularies and knowledge, against each client's adapter; what is not told yet is estimated from the
    public rows. Loads no weights and writes nothing. With --preset, it needs no workspace, and computes Table 3 of the
    paper from configurations only.

    Example: fedcollm comm-cost --preset s1
    """
    if preset is None:
        with session(workspace, as_json=as_json, quiet=True) as opened:
            if opened.workspace.agreement.federation.learns_in_public:
                from stages.planning.knowledge_cost import knowledge_cost

                told = knowledge_cost(opened.workspace)
                opened.console.result(told.as_json(), told_cost_of(told))
                return
            from stages.planning.comm_cost import comm_cost as stage

            found = stage(opened.workspace)
            opened.console.result(asdict(found), cost_of(found))
        return
    console = Console(quiet=True, as_json=as_json)
    with guarded(console):
        from stages.planning.comm_cost import table_3

        if workspace is not None:
            mend = "leave --preset out for a workspace's own figures"
            raise UsageProblem("--preset counts the paper's settings, not a workspace", mend=mend)
        rows = table_3(("s1", "s2", "s3") if preset == "all" else (preset,))
        console.result([asdict(row) | {"percent": row.percent} for row in rows], drawn_table_3(rows))
