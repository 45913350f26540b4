"""Text that came from a file, made safe where people read it: on a terminal, a page, a chart, a card or a sheet.

Names, values and messages may be another party's. No character of them that a terminal obeys, and no line end, gets
through: what cannot be printed is shown escaped. Only lines that were put together here are more than one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

MARKUP = re.compile(r"[\\`*\[\]<>|&~$#!]|(?<!\w)_|_(?!\w)")
"""What Markdown obeys in the middle of a line; an underscore between letters is one."""
FORMULA = re.compile(r"\s*[=+@\uff0b\uff1d\uff20\uff0d-]")
FIGURE = re.compile(r"[+-]?([0-9.]+(e[+-]?[0-9]+)?)?")
"""A number, or a sign alone, which is what it seems."""


class Lines(str):
    """A text of several lines, each of which was made one. Composed into another text, it is a plain one again."""

    __slots__ = ()


def printable(text: str) -> str:
    """Without what a terminal obeys, and without halves of characters; lines stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def in_line(text: str) -> str:
    """On one line: a line end is shown escaped, as Python would."""
    return printable(text).replace("\n", "\\n")


def shown(text: str) -> str:
    """As it may be printed: on one line, unless it was put together from lines here."""
    return printable(text) if isinstance(text, Lines) else in_line(text)


def lines(texts: Iterable[str], between: str = "\n") -> Lines:
    """Several texts, each on its own line, or, of Lines, on its own lines."""
    return Lines(between.join(map(shown, texts)))


def in_cell(value: Any) -> Any:
    """A value of a CSV file. A text on one line, and none that a spreadsheet would compute as a formula."""
    if not isinstance(value, str):
        return value
    text = in_line(value)
    return f"'{text}" if FORMULA.match(text) and not FIGURE.fullmatch(text) else text


def in_code(text: str) -> str:
    """As a string of Python, JSON or YAML, in double quotes."""
    return json.dumps(in_line(text), ensure_ascii=False)


def in_markdown(text: str) -> str:
    """In a line of Markdown, or a cell of its tables, as the text that it is."""
    return MARKUP.sub(lambda found: f"\\{found[0]}", in_line(text))
