"""slurm: job scripts that run a federation on a Slurm cluster, and the list of jobs that are missing.

Reads the settings; for the list, everything that status reads. Writes slurm/*.sbatch, slurm/*.sh. Submits nothing.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from stages.bases import one_tokenizer
from stages.federation.job import Chain
from stages.federation.jobs import base_subjects, chain, server_subjects
from stages.files import writing
from stages.parties.enrolment import enrolment
from stages.parties.names import SERVER, client
from stages.parties.names import listed as named
from stages.progress.rounds import Reader
from stages.progress.staleness import PREPARE, dealt_before
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.runtime.texts import lines
from stages.workspace.commands import Command
from stages.workspace.machine import Slurm
from stages.workspace.names import MACHINE
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role, mistakes_in

BRIEF = ("broadcast", "close", "reveal", "window")
"""Scripts that train and score nothing: they ask for no GPU and for nothing of server_options or client_options.

So does "average", unless a gate has the SLM loaded.
"""


def slurm(
    workspace: Workspace,
    *,
    only: str | None = None,
    processes: int | None = None,
    flags: Mapping[str, object] | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> list[Path]:
    """Write the scripts. Returns their paths, submit.sh last.

    only: the one party whose jobs are submitted here, "server" or "client-2". processes: of a training stage; default:
    as machine.toml says. flags: keys of its [slurm] with values that win over its own. Raises Refused rather than
    replace a script that was changed.
    """
    _check_party(workspace, only)
    one_tokenizer.check(workspace)
    settings = _settings(workspace, flags or {})
    contents = _scripts(workspace, settings, only, processes or workspace.machine.processes or 1)
    for name, content in contents.items():
        path = workspace.slurm / name
        if path.exists() and path.read_text() != content and not overwrite:
            message = f"{workspace.shown(path)} is there already, and differs"
            raise Refused(message, where=path, mend="give the command again with --overwrite to replace the scripts")
    for name, content in contents.items():
        writing.write(workspace.slurm / name, content.encode(), mode=0o777 if name.endswith(".sh") else 0o666)
    for absent in _missing(workspace, _parties(workspace, only) or {SERVER}, scores=True):
        report(Event("warning", f"missing here, to be mended before slurm/submit.sh: {absent}"))
    federation = workspace.agreement.federation
    if settings.two_phases and federation.learns_in_public:
        words = f"slurm.two_phases is passed over: with method {federation.method} no job has two models in memory"
        report(Event("note", words))
    return [workspace.slurm / name for name in contents]


def jobs(workspace: Workspace, *, only: str | None = None, window: int | None = None) -> Chain:
    """What is left to submit, from what lies in the workspace now.

    Raises NotReady where compute nodes would miss a model, rows or a dataset, or nothing can be done yet.
    """
    _check_party(workspace, only)
    parties = _parties(workspace, only)
    if not parties:
        mend = f"`{Command('status')}` names what is missing; in a simulation, `{PREPARE}` makes it"
        raise NotReady(f"{only or 'every party'} has no data here", where=workspace.private, mend=mend)
    one_tokenizer.check(workspace)
    _check_enrolled(workspace, parties)
    reader = Reader(workspace, verify=False)
    if reader.edited_since_dealt:
        words = dealt_before(reader.edited_since_dealt)
        raise Refused(words, where=workspace.split, mend=f"{PREPARE}, which tells whether the rows change")
    rounds = [reader.round(number) for number in range(1, workspace.agreement.federation.rounds + 1)]
    found = chain(workspace, rounds, parties, window=window)
    if found.waiting_for and not found.jobs:
        absent = [k for k in workspace.clients if not workspace.client_data(k).exists()] if SERVER in parties else []
        rows = f"; of {named(absent)} no rows are here: whoever has none here sends from elsewhere" if absent else ""
        mend = f"`{Command('status')}` shows all of it{rows}"
        raise NotReady(f"waiting for {found.waiting_for}", where=workspace.root, mend=mend)
    scores = any(job.script == "evaluate" for job in found.jobs)
    if found.jobs and (lacking := _missing(workspace, parties, scores=scores)):
        message = lines(["missing here, and compute nodes fetch nothing:", *lacking], "\n  - ")
        raise NotReady(message, where=workspace.root, mend="mend that on this machine, then submit again")
    return found


def _check_party(workspace: Workspace, party: str | None) -> None:
    known = {SERVER, *map(client, workspace.clients)}
    if party is not None and party not in known:
        mend = f"give --only server, or --only client-1 to client-{len(workspace.clients)}"
        raise UsageProblem(f"there is no party {party!r}", where=workspace.root, mend=mend)


def _check_enrolled(workspace: Workspace, parties: set[str]) -> None:
    """Raise NotReady if a party lacks keys that it needs, or has not joined: jobs cannot compare fingerprints."""
    for party in sorted(parties):
        command, waiting_for = enrolment(workspace, party)
        if command or waiting_for:
            message = f"{party} is not enrolled"
            message += f", and waits for {waiting_for}" if waiting_for else ""
            mend = command or f"`{Command('next')}` takes a party's next step"
            raise NotReady(message, where=workspace.root, mend=mend)


def _parties(workspace: Workspace, only: str | None) -> set[str]:
    """Who is on this machine, by their data; where a server has no part, it is whoever has the clients'."""
    here = {client(k) for k in workspace.clients if workspace.client_data(k).exists()}
    federation = workspace.agreement.federation
    if workspace.auxiliary_data.exists() or (here and not (federation.averages or federation.server_tells)):
        here.add(SERVER)
    return here & {only} if only else here


def _missing(workspace: Workspace, parties: set[str], *, scores: bool) -> list[str]:
    """What these parties' jobs need and would not find, each with what mends it."""
    from stages.planning.missing import missing

    federation, is_server = workspace.agreement.federation, SERVER in parties
    if federation.learns_in_public or not workspace.agreement.is_of_one_slm:
        return _missing_of_each(workspace, parties, scores=scores)
    roles: list[Role] = ["slm", "llm"] if is_server and federation.distils else ["slm"]
    found = missing(workspace, roles=roles, scores=scores and is_server)
    return [lines([one.what, f"    mend  {one.mend}"]) for one in found]


def _missing_of_each(workspace: Workspace, parties: set[str], *, scores: bool) -> list[str]:
    """The same where each party has its own model and, to learn in public, the public rows."""
    from stages.planning.missing import missing, missing_model

    federation = workspace.agreement.federation
    here: list[int | None] = [k for k in workspace.clients if client(k) in parties]
    here += [None] if SERVER in parties and federation.server_tells else []
    found = missing(workspace, roles=[], scores=scores, clients=[k for k in here if k is not None])
    for number in here:
        view = workspace if number is None else workspace.of_client(number)
        found += missing_model(view, "llm" if number is None else "slm")
    if SERVER in parties and workspace.agreement.averages:  # which it scores
        found += missing_model(workspace, "slm")
    return [lines([one.what, f"    mend  {one.mend}"]) for one in dict.fromkeys(found)]


# --- scripts


def _settings(workspace: Workspace, flags: Mapping[str, object]) -> Slurm:
    try:
        return Slurm.model_validate(workspace.machine.slurm.model_dump() | dict(flags))
    except ValidationError as error:
        mistakes = mistakes_in(Slurm, error)
        mend = f"as sbatch takes them, such as --time 04:00:00 --mem 32G; [slurm] of {MACHINE} explains them"
        raise UsageProblem(lines(["what Slurm is asked for", *mistakes], "\n  - "), mend=mend) from error


def _scripts(workspace: Workspace, settings: Slurm, only: str | None, processes: int) -> dict[str, str]:
    """The text of each script that this federation needs."""
    agreement = workspace.agreement
    federation, is_hidden = agreement.federation, agreement.aggregation.is_hidden
    in_public = federation.learns_in_public
    parties = {only} if only and in_public else {SERVER, *map(client, workspace.clients)}
    arguments = (f" --only {only}" if only else "") + (f" --window {settings.window}" if settings.window else "")
    values = {
        "name": federation.name,
        "rounds": federation.rounds,
        "clients": federation.clients,
        "distils": federation.distils,
        "two_phases": settings.two_phases,
        "in_public": in_public,
        "server_tells": federation.server_tells,
        "clients_tell": federation.clients_tell,
        "quorum": agreement.aggregation.min_clients is not None and (federation.averages or federation.clients_tell),
        "bases": base_subjects(workspace, parties),
        "models": server_subjects(workspace, parties),
        "scored": [k for k in workspace.clients if client(k) in parties],
        "setup": settings.setup,
        "processes": processes,
        "retries": settings.retries,
        "window": settings.window,
        "cpus": settings.cpus_per_task,
        "limit": f"%{settings.parallel}" if settings.parallel else "",
        "arguments": arguments,
    }
    wanted = {
        "stage.sh": True,
        "rank.sh": processes > 1,
        "client.sbatch": only != SERVER,
        "close.sbatch": is_hidden and only in (None, SERVER),
        "reveal.sbatch": is_hidden and only != SERVER,
        "distill.sbatch": in_public and only != SERVER,
        "average.sbatch": in_public and only in (None, SERVER) and agreement.averages,
        "broadcast.sbatch": only in (None, SERVER) and (federation.averages or agreement.is_of_one_slm),
        "server.sbatch": only in (None, SERVER) and (federation.averages or federation.server_tells),
        "evaluate.sbatch": only in (None, SERVER) or in_public,
        "window.sbatch": settings.window is not None,
        "submit.sh": True,
    }
    brief = BRIEF if agreement.aggregation.gate is not None else (*BRIEF, "average")
    return {
        name: rendered(name, values | {"directives": _directives(settings, name.partition(".")[0], processes, brief)})
        for name, is_wanted in wanted.items()
        if is_wanted
    }


def rendered(name: str, values: Mapping[str, object]) -> str:
    """A script of the template's, filled in."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False)
    source = importlib.resources.files("workspace_template") / "slurm"
    return environment.from_string((source / name).read_text()).render(values)


def _directives(settings: Slurm, script: str, processes: int, brief: Collection[str]) -> list[str]:
    """The #SBATCH lines of one script. Of an option that is there twice, Slurm takes the last."""
    is_brief = script in brief
    gpus = 0 if is_brief else processes * (settings.gpus_per_task or 0)
    values = {
        "nodes": 1,
        "ntasks": 1 if is_brief else processes,
        "cpus-per-task": settings.cpus_per_task,
        "gres": f"gpu:{gpus}" if gpus else None,
        "mem": settings.mem,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "signal": None if is_brief else f"USR1@{settings.stop_before_s}",
    }
    lines = [f"--{name}={value}" for name, value in values.items() if value is not None] + settings.options
    if is_brief:
        return lines
    return lines + (settings.client_options if script in ("client", "distill") else settings.server_options)
