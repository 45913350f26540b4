"""Files of rows: JSON lines, read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.data import formats
from stages.data.formats import BadRow
from stages.data.rows import Row
from stages.files import reading
from stages.runtime.errors import Damaged
from stages.runtime.texts import lines

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
        expected = 'expected {"prompt": "...", "completion": "..."}, both not empty'
        raise _bad_lines(path, found, expected + (', or {"prompt": "..."} alone' if unlabelled else ""))
    if not rows:
        raise Damaged(f"{path.name} is empty", where=path, mend='put rows {"prompt": ..., "completion": ...} in it')
    return rows, reading.sha256(content)


def parsed_lines(content: bytes, path: Path, *, unlabelled: bool, texts: bool = False) -> list[tuple[str, Row | str]]:
    """Each line of a file, and its row, or why it is none. Raises Damaged for a file that is no text."""
    found: list[tuple[str, Row | str]] = []
    for line in _lines(content, path):
        try:
            row = _row(line, unlabelled)
            if texts and row.messages:
                raise BadRow("a conversation, which each model's template would make another text")
            found.append((line, row))
        except BadRow as error:
            found.append((line, str(error)))
    return formats.of_one_form(found)


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
    shown = [f"line {number}: {other}" for number, other in others[: MOST_LISTED - 1]]
    if len(found) > MOST_LISTED:
        shown.append(f"and {len(found) - MOST_LISTED} lines more")
    message = lines([f"line {first} of {path.name}: {what}; {expected}", *shown], "\n  - ")
    mend = f"correct line {first} of {path.name}" if not others else f"correct these {len(found)} lines of {path.name}"
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
