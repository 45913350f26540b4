"""What `check-rows` and `evaluate --rows` print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from stages.audit.checks import number_of
from stages.data.rows import unit_of
from stages.runtime import texts

if TYPE_CHECKING:
    from stages.artefacts.row_records import RowsResult
    from stages.planning.check_rows import Checked
    from stages.planning.row_checks import Remark
    from stages.workspace.paths import Workspace

MOST_LINES = 12
"""Of a file that one remark names; --json has them all."""


def checked_rows(workspace: Workspace, found: Sequence[Checked]) -> str:
    """A part for each file: how many rows, how long, which answers, and what is wrong or odd, with its lines."""
    parts = [line for one in found for line in _file(workspace, one)]
    refused = sum(one.is_refused for one in found)
    odd = sum(not one.is_refused and bool(one.remarks) for one in found)
    said = [f"{refused} would be refused" if refused else "none would be refused"]
    said += [f"{odd} with remarks"] if odd else []
    return texts.lines([*parts, f"files: {len(found)}; {', '.join(said)}"])


def _file(workspace: Workspace, one: Checked) -> list[str]:
    lines = [f"{workspace.shown(one.path)}: {number_of(one.rows, 'row')}"]
    if size := one.lengths:
        rows = f"half have {size.half:g} or fewer, 95 % {size.most} or fewer, the longest {size.longest}"
        answers = f"completions {size.half_answer:g}, the longest {size.longest_answer}"
        lines.append(f"  tokens: {rows}, of {size.limit} that fit; {answers}")
    if one.answers:
        lines.append("  completions: " + ", ".join(f"{texts.in_code(name)} {n}" for name, n in one.answers.items()))
    lines += [f"  {remark.level} {remark.found}{_lines(remark, unit_of(one.path))}" for remark in one.remarks]
    if one.mended:
        names = " ".join(shlex.quote(workspace.shown(path)) for path in (one.mended, one.path))
        lines.append(f"  mended: {', '.join(one.mends)}; look at it, then: mv {names}")
    return lines


def _lines(remark: Remark, unit: str) -> str:
    if not remark.lines:
        return ""
    listed = ", ".join(map(str, remark.lines[:MOST_LINES]))
    more = len(remark.lines) - MOST_LINES
    return f": {unit}{'' if len(remark.lines) == 1 else 's'} {listed}" + (f" and {more} more" if more > 0 else "")


def row_scores(result: RowsResult) -> Table:
    """How well a model knows the answers of a file of rows."""
    scores, round = result["scores"], result["round"]
    cells = {
        "model": result["subject"],
        "round": "base" if round is None else str(round),
        "loss": f"{scores['loss']:.4f}",
        "perplexity": f"{scores['perplexity']:.4g}",
        "exact match": f"{scores['exact_match']:.4f}",
    }
    if written := scores.get("written"):
        cells |= {"text match": f"{written['generated_match']:.4f}", "Rouge-L": f"{written['rouge_l']:.4f}"}
    size = f"{number_of(scores['rows'], 'row')}, {number_of(scores['tokens'], 'answer token')}"
    size += f"; {scores['rows_left_out']} more are too long and left out" if "rows_left_out" in scores else ""
    table = Table(title=result["rows"], caption=size)
    for name in cells:
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_row(*cells.values())
    return table
