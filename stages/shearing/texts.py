"""Text as rows of equal length: to choose blocks by, to heal on, and a part kept out to measure perplexity on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data.row_files import read_rows
from stages.files import reading
from stages.models.base_loading import PROBE
from stages.runtime import quiet
from stages.runtime.errors import Damaged, UsageProblem

BETWEEN = "\n\n"
"""What stands between two paragraphs of a text, and between two rows of a data set."""

KEPT_OUT = 20
"""One in so many rows, the last ones, is kept out of healing."""

AT_ONCE = 1000
"""Paragraphs that are encoded together: what a tokenizer keeps beside each token is large."""

LEAST_ROWS = 4
"""Of fewer nothing can be learned and kept out."""


@dataclass(frozen=True)
class Text:
    """Paragraphs, and the digests of the files that they are from, in order. where: the first of these files."""

    paragraphs: list[str]
    sha256: list[str]
    where: Path


@dataclass(frozen=True)
class Rows:
    """Token ids, each row of the same length: those to train on, and the last of the text, kept out."""

    trained: list[list[int]]
    kept_out: list[list[int]]


def read_texts(paths: Sequence[Path]) -> Text:
    """Plain text in UTF-8; an empty line parts paragraphs. Raises NotReady, or Damaged for what is no such text.

    Of each file, a byte order mark at its head is left out, and lines end as on any system.
    """
    found, digests = [], []
    for path in paths:
        try:
            content = reading.read_own(path)
        except FileNotFoundError as error:
            raise reading.not_there(path) from error
        try:
            found += content.decode("utf-8-sig").replace("\r\n", "\n").split(BETWEEN)
        except UnicodeDecodeError as error:
            message = f"{path.name} is no text in UTF-8: {error.reason} at byte {error.start}"
            raise Damaged(message, where=path, mend="convert it to UTF-8, or name another file") from error
        digests.append(reading.sha256(content))
    return Text([paragraph for paragraph in found if paragraph.strip()], digests, paths[0])


def read_auxiliary(path: Path) -> Text:
    """The rows of D^a, each prompt with its completion, if it has one. Raises as read_rows does."""
    rows, sha256 = read_rows(path, unlabelled=True, texts=True)
    return Text([row.prompt + (row.completion or "") for row in rows], [sha256], path)


def as_rows(text: Text, tokenizer: Any, length: int) -> Rows:
    """A text's tokens, cut into rows of this length; each begins with what the tokenizer puts first, if anything.

    Raises UsageProblem for a text of fewer than LEAST_ROWS rows.
    """
    first = _put_first(tokenizer)
    pieces = length - len(first)
    tokens = list(itertools.chain.from_iterable(_encoded(text.paragraphs, tokenizer)))
    rows = [first + tokens[at : at + pieces] for at in range(0, len(tokens) - pieces + 1, pieces)]
    if len(rows) < LEAST_ROWS:
        message = f"the text is too short: {len(tokens)} tokens; {LEAST_ROWS} rows of {length} are needed at least"
        raise UsageProblem(message, where=text.where, mend="name more text, or give a smaller --length")
    kept_out = max(1, len(rows) // KEPT_OUT)
    return Rows(rows[:-kept_out], rows[-kept_out:])


def evenly(rows: Sequence[list[int]], most: int) -> list[list[int]]:
    """At most so many of the rows, from all over them."""
    count = min(len(rows), most)
    return [rows[number * len(rows) // count] for number in range(count)]


def _put_first(tokenizer: Any) -> list[int]:
    added, plain = tokenizer.encode(PROBE), tokenizer.encode(PROBE, add_special_tokens=False)
    return list(added[: len(added) - len(plain)])


def _encoded(paragraphs: Sequence[str], tokenizer: Any) -> Iterable[list[int]]:
    with quiet.libraries():  # which warn of paragraphs longer than the context
        for at in range(0, len(paragraphs), AT_ONCE):
            some = [one + BETWEEN for one in paragraphs[at : at + AT_ONCE]]
            yield from tokenizer(some, add_special_tokens=False)["input_ids"]
