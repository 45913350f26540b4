"""The one writer of tables: for a terminal, as Markdown, as LaTeX, and as CSV with one row a figure."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from stages.runtime import texts

Form = Literal["markdown", "latex", "csv"]
"""How a table is printed, other than for a terminal."""

NUMBER = r"[+-]?\d+(?:\.\d+)?"
FIGURE = re.compile(rf"({NUMBER})(?: ± ({NUMBER}))?(?: \[({NUMBER}), ({NUMBER})\])?(\*?)")
"""A cell that is a number, with its deviation, its interval and its star."""
OF_LATEX = {
    **{one: f"\\{one}" for one in "%_&$#{}"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "|": r"\textbar{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", '"': r"\textquotedbl{}", "±": r"$\pm$"},
}
"""What LaTeX would obey, or would not print, and what prints it."""
DATA = re.compile(r"\bD(?:\\textasciicircum\{\}(a)|\\_(p))\b")
"""The papers' D^a and D_p in the names of methods, as OF_LATEX leaves them."""


@dataclass(frozen=True)
class Sheet:
    """A table in words.

    named: so many columns first hold names; left: so many first are drawn to the left.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    named: int = 1
    left: int = 1

    def drawn(self) -> Group:
        """For a terminal."""
        table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for number, name in enumerate(self.columns):
            is_left = number < self.left
            table.add_column(name, justify="left" if is_left else "right", no_wrap=is_left)
        for row in self.rows:
            table.add_row(*row)
        return Group(*([self.title] if self.title else []), table)

    def markdown(self) -> str:
        """For a README or a paper's draft."""
        lines = [
            [texts.in_markdown(name) for name in self.columns],
            ["---", *("---:" for _ in self.columns[1:])],
            *([*map(texts.in_markdown, row[: self.named]), *row[self.named :]] for row in self.rows),
        ]
        title = [f"**{self.title}**", ""] if self.title else []
        return texts.lines([*title, *("| " + " | ".join(line) + " |" for line in lines)])

    def latex(self) -> str:
        """A floating table with the rules of booktabs."""
        kinds = "".join("l" if number < self.left else "r" for number in range(len(self.columns)))
        return texts.lines(
            [
                r"\begin{table}",
                r"  \centering",
                *([rf"  \caption{{{in_latex(self.title)}}}"] if self.title else []),
                rf"  \begin{{tabular}}{{{kinds}}}",
                r"    \toprule",
                f"    {_row(self.columns)}",
                r"    \midrule",
                *(f"    {_row(row)}" for row in self.rows),
                r"    \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
            ]
        )


@dataclass(frozen=True)
class Tables:
    """What a command found: as tables with notes below them, and as figures, each with what it is the figure of."""

    sheets: Sequence[Sheet]
    notes: Sequence[str]
    columns: Sequence[str]
    figures: Sequence[Sequence[object]]

    def drawn(self) -> Group:
        """For a terminal."""
        return Group(*(sheet.drawn() for sheet in self.sheets), *self.notes)

    def written(self, form: Form | None) -> Group | str:
        """In the form that was asked for; None: for a terminal."""
        return FORMS[form](self)

    def markdown(self) -> str:
        """To be pasted."""
        return texts.lines([*(sheet.markdown() for sheet in self.sheets), *self.notes], "\n\n")

    def latex(self) -> str:
        """To be pasted into a paper; the notes are comments."""
        notes = texts.lines(f"% {texts.in_line(note)}" for note in self.notes)
        return texts.lines([r"% needs \usepackage{booktabs}", *(sheet.latex() for sheet in self.sheets), notes], "\n\n")

    def csv(self) -> str:
        """A line for each figure."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for row in (self.columns, *self.figures):
            writer.writerow(map(texts.in_cell, row))
        return texts.lines(out.getvalue().rstrip("\n").split("\n"))


FORMS: dict[Form | None, Callable[[Tables], Group | str]] = {
    None: Tables.drawn,
    "markdown": Tables.markdown,
    "latex": Tables.latex,
    "csv": Tables.csv,
}


def in_latex(text: str) -> str:
    """A text as LaTeX prints it, on one line."""
    line = "".join(OF_LATEX.get(one, one) for one in texts.in_line(text))
    return DATA.sub(lambda found: "$D^a$" if found[1] else "$D_p$", line)


def _row(cells: Sequence[str]) -> str:
    r"""One row. After \\, a bracket or a star would be an argument of it."""
    found = [_cell(cell) for cell in cells]
    return ("{}" if found[0][:1] in ("[", "*") else "") + " & ".join(found) + r" \\"


def _cell(text: str) -> str:
    if text == "-":
        return "--"
    found = FIGURE.fullmatch(text)
    if not found:
        return in_latex(text)
    mean, deviation, low, high, star = found.groups()
    shown = mean + (rf" \pm {deviation}" if deviation else "") + (rf"\ [{low}, {high}]" if low else "")
    return f"${shown}{'^{*}' if star else ''}$"
