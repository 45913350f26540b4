"""What every command shares: its options, and a session that turns what goes wrong into messages and exit codes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from fedcollm_cli import completing
from fedcollm_cli.console import Console
from fedcollm_cli.torchrun import Launch, is_first, launched
from fedcollm_cli.views.sheets import Form
from stages.files.faults import naming_storage_faults
from stages.runtime import imports
from stages.runtime.errors import INTERRUPTED_EXIT_CODE, Problem, UsageProblem
from stages.runtime.processes import ALONE, Processes
from stages.runtime.quiet import libraries as silent_libraries
from stages.workspace import edits
from stages.workspace.names import AGREEMENT, EVALUATION
from stages.workspace.paths import Flags, Workspace

WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace", "-w", help="The workspace folder. Default: this folder, or the nearest above that is one."
    ),
]
RoundOption = Annotated[
    int, typer.Option("--round", min=1, autocompletion=completing.rounds, help="The round t, counted from 1.")
]
ClientOption = Annotated[
    int, typer.Option("--client", min=1, autocompletion=completing.clients, help="The client k, counted from 1.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a result that was made from other inputs.")]
EachRoundOption = Annotated[
    bool, typer.Option("--each-round/--last-round", help="Evaluate after every round, or after the last alone.")
]
ClientScoresOption = Annotated[
    bool,
    typer.Option(
        "--client-scores/--no-client-scores",
        help="Evaluate clients' own SLMs too, at the end; always if none are averaged.",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option("--tasks", help="Instead of the settings' tasks: these, with commas between them; kept apart."),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="With --tasks: only so many first questions of each.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="The tables as Markdown on stdout.")]
LatexOption = Annotated[
    bool, typer.Option("--latex", help="The tables as LaTeX on stdout; they need the package booktabs.")
]
CsvOption = Annotated[bool, typer.Option("--csv", help="The figures as CSV on stdout, one a row.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr; warnings and errors only.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps. Default: as machine.toml says.")
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Precision of the computation. Default: as the settings say."),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes", min=1, help="How many processes torchrun starts; any other number is refused."),
]

SHARED = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, annotation, default in (
        ("workspace", WorkspaceOption, None),
        ("as_json", JsonOption, False),
        ("quiet", QuietOption, False),
        ("device", DeviceOption, None),
        ("dtype", DtypeOption, None),
        ("processes", ProcessesOption, None),
    )
}
"""The options that a session is opened with, as `session` takes them."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
HEEDED_WITHIN_S = 5
"""Seconds from a signal to the end of a command, cleaning up included, before it is interrupted once more."""


@dataclass(frozen=True)
class Session:
    """One command's workspace and console, and the processes that torchrun started for it.

    folder: the workspace as --workspace named it, if it did.
    """

    workspace: Workspace
    folder: Path | None
    console: Console
    processes: Processes


def form_of(opened: Session, *, markdown: bool, latex: bool, csv: bool) -> Form | None:
    """How the tables are to be printed; None: as JSON, or for a terminal. Raises UsageProblem for two forms."""
    asked: dict[Form, bool] = {"markdown": markdown, "latex": latex, "csv": csv}
    forms = [name for name, is_asked in asked.items() if is_asked]
    given = [*(["json"] if opened.console.as_json else []), *forms]
    if len(given) > 1:
        raise UsageProblem(f"--{given[0]} and --{given[1]} exclude each other", mend="give one of them")
    return forms[0] if forms else None


def asking(workspace: Workspace, tasks: str | None, limit: int | None) -> Workspace:
    """The workspace in which --tasks are scored, with --limit. Raises UsageProblem for a limit alone, or no task."""
    if tasks is None:
        if limit is not None:
            mend = f"give --tasks too; of the settings' tasks it is evaluation.limit, in {AGREEMENT} or {EVALUATION}"
            raise UsageProblem("--limit is for --tasks", mend=mend)
        return workspace
    names = [name.strip() for name in tasks.split(",")]
    if not all(names) or len(set(names)) < len(names):
        mend = "name each task once, with commas between them: --tasks arc_challenge,boolq"
        raise UsageProblem(f"--tasks {tasks!r} is not a list of tasks", mend=mend)
    from stages.data.tasks import check_known

    check_known(workspace, names)
    return workspace.asking(names, limit)


Function = Callable[..., None]


def in_workspace(*also: Literal["quiet", "device", "dtype", "processes"]) -> Callable[[Function], Function]:
    """Make a function a command that opens a workspace: --workspace, --json and these options are its too.

    The function is given the open session as `opened`. In the help --workspace stands where `opened` does among its
    parameters, and the others stand last. A command with --processes can be one of several that torchrun started.
    """
    last = ("as_json", *also)

    def made(function: Function) -> Function:
        own = inspect.signature(function, eval_str=True).parameters.values()
        first = [SHARED["workspace"] if one.name == "opened" else one for one in own]

        @functools.wraps(function)
        def command(**given: Any) -> None:
            options = {name: given.pop(name) for name in ("workspace", *last)}
            with session(**options, together="processes" in also) as opened:
                function(opened=opened, **given)

        vars(command)["__signature__"] = inspect.Signature([*first, *(SHARED[name] for name in last)])
        return command

    return made


@contextlib.contextmanager
def guarded(console: Console) -> Iterator[None]:
    """The one place that turns what went wrong into a message and an exit code."""
    _Ending.is_asked = False
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    atexit.unregister(_heed_no_more)
    atexit.register(_heed_no_more)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TOKENIZERS_PARALLELISM", "HF_UPDATE_DOWNLOAD_COUNTS"):
        os.environ.setdefault(name, "false")
    # With it, bitsandbytes would fetch programs from the hub as it is imported, and transformers as it loads a model.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    imports.spare()
    try:
        with naming_storage_faults(), console, silent_libraries():
            yield
    except Problem as problem:
        console.error(problem)
        raise typer.Exit(problem.exit_code) from None
    except KeyboardInterrupt as stop:
        _Ending.is_asked = True
        console.interrupted(str(stop) or "interrupted: nothing is half written; the same command goes on from here")
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    finally:
        signal.alarm(0)


class _Interrupted(KeyboardInterrupt):
    """Of a type of its own: CPython remembers each plain KeyboardInterrupt that has left an exec(), as libraries call.

    However well it was caught, the process then ends by SIGINT, whatever exit code it was to have.
    """


class _Ending:
    """Whether this command has been interrupted already: further signals must not break its end off."""

    is_asked = False


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Stop, and if that is not heeded, again: Python drops an exception that meets it in a callback of a library's."""
    if _Ending.is_asked and signal_number != signal.SIGALRM:
        return
    _Ending.is_asked = True
    signal.alarm(HEEDED_WITHIN_S)
    raise _Interrupted


def _heed_no_more() -> None:
    """While the interpreter ends it puts Python's handlers away, but not this: a late signal must not be the end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def session(
    workspace: Path | None,
    *,
    as_json: bool,
    quiet: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    processes: int | None = None,
    together: bool = False,
) -> Iterator[Session]:
    """An open workspace, with every failure turned into a message and an exit code.

    quiet: so is a command that lacks the option. processes: how many are expected. together: whether this command can
    be of several.
    """
    console = Console(quiet=quiet, as_json=as_json, is_muted=not is_first(os.environ))
    with guarded(console):
        flags = Flags.model_validate({"device": device, "dtype": dtype})
        found = Workspace.find(workspace or Path.cwd(), flags)
        launch = launched(os.environ, expected=processes or found.machine.processes, together=together)
        if launch.processes == 1:
            show_one_gpu(found.machine.device)
        console.tells_failures = True  # what all would say alike has been checked
        joined = join(launch, found.machine.device)
        with joined.ending_together():
            try:
                yield Session(found, workspace, console, joined)
            except Problem as problem:
                problem.edited = edits.since_last(found)
                raise


def join(launch: Launch, device: str) -> Processes:
    """The processes of this command, met."""
    if launch.processes == 1:
        return ALONE
    from stages.runtime import processes

    return processes.join(launch.rank, launch.processes, local_rank=launch.local_rank, device=device)


def show_one_gpu(device: str) -> None:
    """Let CUDA see the chosen GPU alone: Trainer would spread a model over all that it sees (DataParallel)."""
    if device in ("cpu", "mps"):
        return
    index = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = [str(index)] * (index + 1) if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = listed[index] if index < len(listed) else ""
