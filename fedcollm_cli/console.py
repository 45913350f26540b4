"""What people see: progress and talk on stderr, results on stdout, plain or as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from stages.runtime.errors import INTERRUPTED_EXIT_CODE, Problem
from stages.runtime.events import SECONDS_LEFT, Event
from stages.runtime.texts import Lines, printable, shown

WIDEST = 100_000
"""Columns that hold any table."""
PLAIN_INTERVAL_S = 10.0
"""How often a long stage says how far it is where there is no terminal to draw on."""


class _Harmless(RichConsole):
    """Prints no character that a terminal obeys, no markup and no line that was not made here, whatever a text holds.

    Its own colours and cursor stay.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every string that is printed, or stands in a table, comes by here."""
        return super().render_str(shown(text), **settings | {"markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class Console:
    """Draws events: a live view on a terminal, plain lines elsewhere, nothing when quiet. Use as a context."""

    def __init__(self, *, quiet: bool, as_json: bool, is_muted: bool = False) -> None:
        # Libraries are silenced by taking stderr away. What cannot be written is shown escaped, as by Python's own.
        copy = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        self._err = _Harmless(file=copy, soft_wrap=True)
        self._quiet = quiet
        self.as_json = as_json
        self._is_muted = is_muted  # of several processes of one command, all but the first
        self.tells_failures = not is_muted
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._result: tuple[Any, str | Table | Group] | None = None
        self._round = self._stage = ""
        self._first: tuple[int, float] | None = None  # the stage's first step that was told, and when
        self._started = self._said = 0.0

    def __enter__(self) -> Console:
        if self._err.is_terminal and not (self._quiet or self._is_muted):
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, TextColumn("{task.fields[losses]}"), console=self._err, transient=True)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end_stage()
        if self._progress:
            self._progress.stop()
        if self._result:
            self._write(*self._result)

    def report(self, event: Event) -> None:
        """Show one event; this is the callable that stages are given."""
        if self._is_muted:
            return
        if self._quiet:
            if event.kind == "warning":
                self._err.print(f"warning: {event.text}")
            return
        match event.kind:
            case "round":
                self._end_stage()
                self._round = event.text
                left = event.values.get(SECONDS_LEFT)
                self._err.print(event.text + (f", about {duration(left)} left" if left else ""), style="bold")
            case "stage":
                self._end_stage()
                self._begin_stage(event.text)
            case "step":
                self._step(event)
            case "note":
                self._err.print(f"  {event.text}")
            case "warning":
                self._err.print(f"warning: {event.text}", style="yellow")

    def _begin_stage(self, text: str) -> None:
        self._stage, self._first = text, None
        self._started = self._said = time.monotonic()
        if self._progress:
            self._task = self._progress.add_task(shown(text), total=None, losses="")

    def _end_stage(self) -> None:
        if not self._stage:
            return
        if self._progress and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        seconds = time.monotonic() - self._started
        self._err.print(f"  {self._stage}  {seconds:.1f} s")
        self._stage = ""

    def _step(self, event: Event) -> None:
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=event.step, total=event.total, losses=_losses(event.values))
            return
        left = self._left(event)
        if time.monotonic() - self._said > PLAIN_INTERVAL_S:
            self._said = time.monotonic()
            parts = [self._stage, f"{event.step}/{event.total}", _losses(event.values), left]
            self._err.print("  " + "  ".join(part for part in parts if part))

    def _left(self, event: Event) -> str:
        """How long the rest of the stage takes at the pace since its first step that was told; "" at that one."""
        if self._first is None:
            self._first = event.step, time.monotonic()
        first, since = self._first
        if not first < event.step < event.total:
            return ""
        pace = (time.monotonic() - since) / (event.step - first)
        return f"about {duration(pace * (event.total - event.step))} left"

    def result(self, value: Any, text: str | Table | Group) -> None:
        """The outcome, for stdout when the command has ended: value as JSON if that was asked for, else text."""
        if not self._is_muted:
            self._end_stage()
            self._result = value, text

    def _write(self, value: Any, text: str | Table | Group) -> None:
        if self.as_json:
            _print_json(value)
        elif not isinstance(text, str):
            _print_whole(text)
        else:
            sys.stdout.write(shown(text) + "\n")

    def error(self, problem: Problem) -> None:
        """What happened, where, and how to mend it."""
        self._tell_failure(problem.exit_code, problem.message, where=problem.where, mend=problem.mend)
        if not self.tells_failures:
            return
        if self._progress:
            self._progress.stop()
        self._err.print(Lines(f"error: {shown(problem.message)}"), style="red")
        if problem.where:
            self._err.print(f"  in    {problem.where}")
        if problem.mend:
            self._err.print(f"  mend  {problem.mend}")
        if problem.edited and problem.edited not in problem.message:
            self._err.print(f"  edit  fedcollm.toml was edited since something was published here: {problem.edited}")

    def interrupted(self, text: str) -> None:
        """The end of a command that was stopped."""
        self._tell_failure(INTERRUPTED_EXIT_CODE, text)
        self.say(text)

    def _tell_failure(self, code: int, message: str, *, where: object = None, mend: str | None = None) -> None:
        """As JSON, if that was asked for and there is no result to tell: stdout holds one value."""
        if self.as_json and not self._is_muted and self._result is None:
            tell_failure(code, message, where=where, mend=mend)

    def say(self, text: str) -> None:
        """A sentence on stderr, whatever quiet says."""
        if self._progress:
            self._progress.stop()
        self._err.print(text)


def _print_whole(drawn: Table | Group) -> None:
    """Tables and texts on stdout. No word of a table is cut: where it is too wide, its lines are.

    Where stdout is no terminal, and COLUMNS does not ask for a width, nothing is broken into lines either.
    """
    console = _Harmless()
    is_free = not (console.is_terminal or os.environ.get("COLUMNS"))
    for part in _parts(drawn):
        if isinstance(part, Table):
            wide = console.options.update(width=WIDEST)
            for column in part.columns:
                cells = [Measurement.get(console, wide, cell).minimum for cell in (column.header, *column.cells)]
                column.min_width = max(cells)
            needed = Measurement.get(console, wide, part)
            wider = _Harmless(width=max(console.width, needed.minimum, needed.maximum if is_free else 0))
            wider.print(part, crop=False)
        else:
            console.print(part, soft_wrap=is_free)


def _parts(drawn: RenderableType) -> Iterator[RenderableType]:
    if isinstance(drawn, Group):
        for part in drawn.renderables:
            yield from _parts(part)
    else:
        yield drawn


def tell_failure(code: int, message: str, *, where: object = None, mend: str | None = None) -> None:
    """Why there is no result, as JSON on stdout in its place. code: the command's exit code."""
    given = {"message": message, "where": where and str(where), "mend": mend}
    _print_json({"error": {"code": code} | {key: value for key, value in given.items() if value}})


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(_printable(value), indent=2, sort_keys=True) + "\n")


def duration(seconds: float) -> str:
    """A time in the unit that it is planned in."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _printable(value: Any) -> Any:
    """A value for JSON, without what is not printable in any text of it."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {_printable(key): _printable(inner) for key, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _losses(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
