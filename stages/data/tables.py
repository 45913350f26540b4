"""Rows in tables: CSV and Parquet, each row a mapping of its columns; of the bytes alone, and nothing is guessed.

In CSV every cell is text: a number or a word such as NA stays what it is, and an empty cell is none. A column messages
holds JSON. Parquet says itself what its columns hold. The one is read by Python's csv, the other by pyarrow, which
`datasets` reads it by; so no copy of anybody's rows is left in a cache.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.data.formats import KEYS, BadRow
from stages.runtime.errors import Damaged

LARGEST_CELL = 1 << 30
"""Characters; Python's own bound is 2^17, which a conversation may exceed."""

Values = list[Mapping[str, Any] | BadRow]
"""Each row of a table, from its first below the heads, or why it is none."""


def values_of(content: bytes, path: Path) -> Values:
    """The rows of a table of this name's kind. Raises Damaged for a file that is none."""
    found, columns = READERS[path.suffix](content, path)
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice or not set(columns) & {"prompt", "messages", "instruction"}:
        what = f"has the column {twice[0][:80]!r} twice" if twice else f"has no column of rows: {_few(columns)}"
        mend = "columns are prompt and completion; or instruction, input and output; or messages"
        if path.suffix == ".csv" and not twice:
            mend = f"the first line names the columns, with commas between them; {mend}"
        raise Damaged(f"{path.name} {what}", where=path, mend=mend)
    return found


def _csv(content: bytes, path: Path) -> tuple[Values, list[str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        mend = 'save it as UTF-8; in a spreadsheet as "CSV UTF-8"'
        raise Damaged(f"{path.name} is not UTF-8: {error}", where=path, mend=mend) from error
    csv.field_size_limit(LARGEST_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: Values = []
    try:
        columns = next(lines, [])
        for cells in lines:
            found.append(_of_cells(cells, columns))
    except csv.Error as error:
        message = f"{path.name} is no CSV from line {lines.line_num} on: {error}"
        raise Damaged(
            message, where=f"{path}:{lines.line_num}", mend="quote texts, and write a quote in them twice"
        ) from error
    return found, columns


def _of_cells(cells: list[str], columns: list[str]) -> Mapping[str, Any] | BadRow:
    if not cells:
        return BadRow("an empty line")
    if len(cells) != len(columns):
        return BadRow(f"{len(cells)} cells, under {len(columns)} columns")
    value: dict[str, Any] = {column: cell for column, cell in zip(columns, cells, strict=True) if cell}
    if "messages" in value:
        try:
            value["messages"] = json.loads(value["messages"])
        except (ValueError, RecursionError) as error:
            return BadRow(f"messages is not JSON ({error})")
    return value


def _parquet(content: bytes, path: Path) -> tuple[Values, list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
        columns = [name for name in table.schema_arrow.names if name in KEYS]
        found: Values = list(table.read(columns=columns).to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        message = f"{path.name} is no Parquet that can be read: {str(error).splitlines()[0]}"
        raise Damaged(message, where=path, mend="write it anew") from error
    return found, [*columns, *(name for name in table.schema_arrow.names if name not in columns)]


def _few(names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "it is empty"


READERS: dict[str, Callable[[bytes, Path], tuple[Values, list[str]]]] = {".csv": _csv, ".parquet": _parquet}
