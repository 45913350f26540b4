"""Files of rows: JSON lines, CSV or Parquet by their name's end, read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stages.data import formats
from stages.data.formats import BadRow
from stages.data.rows import Row, unit_of
from stages.data.tables import READERS, values_of
from stages.files import reading
from stages.runtime.errors import Damaged
from stages.runtime.texts import lines

OF_OTHER_FORMS = ("message", "assistant", "conversation", "instruction", "input", "output", "a row ")
"""Words of what is wrong with rows that are no prompt and completion."""

MOST_LISTED = 20
"""How many bad lines of a file one error tells."""


def read_rows(path: Path, *, unlabelled: bool = False, texts: bool = False) -> tuple[list[Row], str]:
    """The rows of a file, or of what a link leads to, and the sha256 of its bytes.

    unlabelled: whether rows without an answer may be among them. texts: whether models of different families read them,
    each by its own bytes, so that conversations, which each would render otherwise, are refused. Raises Damaged naming
    every bad line, and the mend, and NotReady for a file that is not there.
    """
    try:
        content = reading.read_own(path)
    except FileNotFoundError:
        raise reading.not_there(path) from None
    each = [row for _, row in parsed_lines(content, path, unlabelled=unlabelled, texts=texts)]
    rows = [row for row in each if isinstance(row, Row)]
    if found := {number: row for number, row in enumerate(each, 1) if not isinstance(row, Row)}:
        raise _bad_lines(path, found, _expected(next(iter(found.values())), unlabelled=unlabelled))
    if not rows:
        raise Damaged(f"{path.name} is empty", where=path, mend='put rows {"prompt": ..., "completion": ...} in it')
    return rows, reading.sha256(content)


def _expected(what: str, *, unlabelled: bool) -> str:
    """What a row should be that is none, by what is wrong with it."""
    if any(word in what for word in OF_OTHER_FORMS):
        return "docs/how-to/own-rows.md has the forms of rows"
    expected = 'expected {"prompt": "...", "completion": "..."}, both not empty'
    return expected + (', or {"prompt": "..."} alone' if unlabelled else "")


def parsed_lines(content: bytes, path: Path, *, unlabelled: bool, texts: bool = False) -> list[tuple[str, Row | str]]:
    """Each line of a file, "" in a table, and its row, or why it is none.

    Raises Damaged for a file that is no text, or no table.
    """
    found: list[tuple[str, Row | str]] = []
    each: Iterable[Any] = values_of(content, path) if path.suffix in READERS else _lines(content, path)
    for value in each:
        line = value if isinstance(value, str) else ""
        try:
            row = _row(line, unlabelled) if isinstance(value, str) else _of_table(value, unlabelled)
            if texts and row.messages:
                raise BadRow("a conversation, which each model's template would make another text")
            found.append((line, row))
        except BadRow as error:
            found.append((line, str(error)))
    return formats.of_one_form(found)


def _of_table(value: Mapping[str, Any] | BadRow, unlabelled: bool) -> Row:
    if isinstance(value, BadRow):
        raise value
    held = {key: cell for key, cell in value.items() if cell is not None}
    return formats.row_of(held, unlabelled=unlabelled)


def check_json_lines(path: Path) -> None:
    """Raise Damaged, naming every bad line, unless a file is JSON lines of objects, or empty ones, of whatever keys."""
    found: dict[int, str] = {}
    for number, line in enumerate(_lines(reading.read_own(path), path), 1):
        try:
            if line.strip():
                _parsed(line)
        except BadRow as error:
            found[number] = str(error)
    if found:
        raise _bad_lines(path, found, "expected a JSON object")


def _lines(content: bytes, path: Path) -> list[str]:
    """The text of a file as lines; a byte order mark before the first is passed over."""
    if content.startswith(b"\x1f\x8b"):
        mend = f"unpack it: gunzip -c {path.name} > rows.jsonl && mv rows.jsonl {path.name}"
        raise Damaged(f"{path.name} is compressed with gzip", where=path, mend=mend)
    try:
        # Not splitlines(): JSON text may hold U+2028, which is no end of a JSON line.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Damaged(f"{path.name} is not UTF-8: {error}", where=path, mend="save it as UTF-8") from error
    return text.removesuffix("\n").split("\n") if text else []


class _KeyTwice(BadRow):
    """An object has this key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:80]!r} appears twice")
        self.key = key


def _bad_lines(path: Path, found: dict[int, str], expected: str) -> Damaged:
    """The error about a file's bad lines: the first in full, some of the others, and how many there are."""
    (first, what), *others = found.items()
    unit = unit_of(path)
    shown = [f"{unit} {number}: {other}" for number, other in others[: MOST_LISTED - 1]]
    if len(found) > MOST_LISTED:
        shown.append(f"and {len(found) - MOST_LISTED} {unit}s more")
    message = lines([f"{unit} {first} of {path.name}: {what}; {expected}", *shown], "\n  - ")
    one = f"correct {unit} {first} of {path.name}"
    mend = f"correct these {len(found)} {unit}s of {path.name}" if others else one
    return Damaged(message, where=f"{path}:{first}", mend=mend)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _KeyTwice(twice)
    return value


def _parsed(line: str) -> dict[str, Any]:
    try:
        value: Any = json.loads(line, object_pairs_hook=_object)
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRow(f"a {type(value).__name__}")
    return value


def _row(line: str, unlabelled: bool) -> Row:
    if not line.strip():
        raise BadRow("an empty line")
    try:
        value = _parsed(line)
    except _KeyTwice as error:
        if error.key in formats.KEYS:
            raise
        raise BadRow("a key appears twice") from None  # a key that is not ours may be what nobody may read
    return formats.row_of(value, unlabelled=unlabelled)
