"""What `align` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from stages.workspace.settings import ROLES

if TYPE_CHECKING:
    from stages.distillation.alignment_figures import AlignmentReport, Direction


def alignment_of(found: AlignmentReport, *folders: str) -> Group:
    """A column for each way; then which map was written, and why, and where."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("share of", no_wrap=True)
    for one in found.directions:
        table.add_column(f"{one.teacher.upper()} to {one.student.upper()}", justify="right", no_wrap=True)
    columns = [_column(found, one) for one in found.directions]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    lines = [
        f"map of the {one.teacher.upper()} to the {one.student.upper()}: {one.method}, since {one.because}"
        for one in found.directions
    ]
    return Group(_tokens(found), table, *lines, *folders)


def alignments_of(pairs: Mapping[int, AlignmentReport], folders: Sequence[str]) -> Group:
    """Of each client and the server, the same below its title; then what was told."""
    parts: list[Group | str] = []
    for client, found in sorted(pairs.items()):
        parts += [f"client {client} (SLM) and the server (LLM)", alignment_of(found)]
    return Group(*parts, *folders)


def _tokens(found: AlignmentReport) -> str:
    both = [(role, found.vocabularies[role]) for role in ROLES]
    return "; ".join(f"{role.upper()} {one.tokens:,} tokens, {one.rows:,} token ids" for role, one in both)


def _column(found: AlignmentReport, one: Direction) -> dict[str, str]:
    from stages.distillation.alignment import METHODS  # with NumPy, which other commands do without

    teacher, student = (found.vocabularies[role].tokens for role in (one.teacher, one.student))
    cells = {
        "teacher's tokens that the student has (exact)": _share(one.exact, teacher),
        "  or has a near one for (min-edit)": _share(one.near, teacher),
        "student's tokens that it can begin (leading)": _share(one.led, student),
    }
    if (measured := one.measured) is not None:
        cells["student's answer positions with equal byte ends"] = _share(measured.matched, measured.positions)
        for method in METHODS:
            name = f"  there, its next token is reached: {method}"
            cells[name] = _share(measured.agreeing[method], measured.matched)
        cells[f"  reached, of all in {measured.rows:,} rows"] = _percent(one.usable or 0.0)
    return cells


def _share(part: int, whole: int) -> str:
    return _percent(part / whole if whole else 0.0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
