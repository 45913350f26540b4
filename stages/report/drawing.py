"""A figure of the report: which rows it shows, and how they become a chart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stages.paper.reported import LABELS
from stages.report.charts import PLAIN, STYLES, Chart, Row, Spec
from stages.runtime.errors import Problem
from stages.runtime.texts import in_line
from stages.workspace.methods import OF_FEDAVG
from stages.workspace.paths import Workspace

DRAWN = (
    *("fedcollm", "fedavg", "fedavg-aux", "standalone", "centralized", "fedmkt", "standalone-public", "llm2slm"),
    *OF_FEDAVG,
)
STYLE_OF = dict(zip((LABELS[row] for row in (*DRAWN, "zero-shot")), (*STYLES, PLAIN), strict=True))
MOST_PARTED = 10
MOST_DRAWN = {"round": 20, "party": 60}
"""A grid with more columns or lines shows some of them, evenly chosen."""


@dataclass(frozen=True)
class Figure:
    """One chart to be: its rows are looked for, and then it is drawn, or it is said why there is nothing to draw."""

    section: str
    name: str
    title: str
    rows: Callable[[Workspace], list[Row]]
    spec: Callable[[list[Row]], Spec]
    caption: Callable[[list[Row]], str]
    nothing: str


@dataclass(frozen=True)
class Absent:
    """A chart that is left out, and why."""

    name: str
    title: str
    reason: str


def draw(figure: Figure, workspace: Workspace) -> Chart | Absent:
    """The chart, or why it is left out: nothing is there, or what is there is damaged."""
    try:
        rows = figure.rows(workspace)
    except Problem as problem:
        return Absent(figure.name, figure.title, in_sentences(problem))
    if not rows:
        return Absent(figure.name, figure.title, figure.nothing)
    rows = [{key: in_line(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]
    return Chart(figure.name, figure.title, figure.caption(rows), rows, figure.spec(rows))


def in_sentences(problem: Problem) -> str:
    """What is wrong and what mends it, to stand where a chart or a table would."""
    mend = f" To mend it: {problem.mend}." if problem.mend else ""
    first, _, rest = problem.message.partition(" ")
    return f"{first.capitalize() if first.isalpha() else first} {rest}.{mend}"  # a path is not a word
