"""The command that hands a federation to a cluster's queue: slurm."""

from __future__ import annotations

from typing import Annotated

import typer

from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from stages.runtime import texts
from stages.runtime.events import Event


@in_workspace("quiet")
def slurm(
    *,
    jobs: Annotated[
        bool, typer.Option("--jobs", help="Write nothing: list the jobs that are missing, as submit.sh reads them.")
    ] = False,
    only: Annotated[
        str | None, typer.Option("--only", help="Jobs of one party: server, or such as client-2. Default: all here.")
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="How many rounds to submit; then a job submits the next.")
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", help="As sbatch takes it.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="As sbatch takes it.")] = None,
    gpus_per_task: Annotated[
        int | None, typer.Option("--gpus-per-task", min=0, help="GPUs of each process of a stage.")
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option("--cpus-per-task", min=1, help="Cores of each process of a stage.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Processes of a training stage, on one node.")
    ] = None,
    mem: Annotated[str | None, typer.Option("--mem", help="Memory of a job, such as 32G.")] = None,
    time: Annotated[str | None, typer.Option("--time", help="Time limit of a job, such as 04:00:00.")] = None,
    parallel: Annotated[int | None, typer.Option("--parallel", min=1, help="At most so many clients at once.")] = None,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Write job scripts for a Slurm cluster.

    Writes slurm/submit.sh and the scripts that it submits, and submits nothing. Each round has an array of clients and
    a job of the server; scores come last. Each job begins when the one before has succeeded. With FedMKT clients learn
    in a second array, and no client waits for another. After a stop, run
    slurm/submit.sh again: it submits only what is missing. Reads the settings, also [slurm] of machine.toml. Options
    override these.

    Near its time limit, a job stops at a checkpoint and goes back into the queue. So does a job that crashed, up to
    slurm.retries times. After a wrong setting, a damaged file, a refusal or bad numbers it does not.

    Example: fedcollm slurm --partition gpu --gpus-per-task 1 --time 04:00:00
    """
    from stages.federation.slurm import jobs as listing
    from stages.federation.slurm import slurm as stage

    report = opened.console.report
    if jobs:
        found = listing(opened.workspace, only=only, window=window)
        if found.waiting_for:
            report(Event("note", f"after these it waits for {found.waiting_for}"))
        if not found.jobs:
            report(Event("note", "nothing is left to do"))
        opened.console.result(found.as_json(), texts.lines(job.line for job in found.jobs))
        return
    asked = {
        "partition": partition,
        "account": account,
        "gpus_per_task": gpus_per_task,
        "cpus_per_task": cpus_per_task,
        "mem": mem,
        "time": time,
        "window": window,
        "parallel": parallel,
    }
    flags = {key: value for key, value in asked.items() if value is not None}
    written = stage(opened.workspace, only=only, processes=processes, flags=flags, overwrite=overwrite, report=report)
    shown = [opened.workspace.shown(path) for path in written]
    opened.console.result(shown, texts.lines(shown))
