"""What can be wrong, or odd, in a file of rows: each check tells the lines, none the text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from stages.data.examples import Example, encode_row
from stages.data.rows import TEXT, Row
from stages.data.spacing import is_doubly_spaced, is_unspaced
from stages.runtime.errors import Problem
from stages.workspace.rows_layout import TABLES

if TYPE_CHECKING:
    from stages.models.tuned import Outline
    from stages.workspace.settings import Role

Level = Literal["FAIL", "WARN"]

MOST_ANSWERS, LONGEST_ANSWER = 12, 24
"""Answers are listed where a file has no more different ones, none of more letters."""
COLUMN = re.compile(r": line 1 column \d+ \(char \d+\)")
"""Where in its line what is no JSON stops being so: lines that are wrong in the same way are told together."""
MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""


@dataclass(frozen=True)
class Remark:
    """What is wrong (FAIL: training refuses the file) or odd (WARN), and on which lines, counted from 1."""

    level: Level
    found: str
    lines: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows: half of them have at most `half`, 95 in 100 at most `most`, and of answers; and how many fit."""

    half: float
    most: int
    longest: int
    limit: int
    half_answer: float
    longest_answer: int


@dataclass(frozen=True)
class Source:
    """A file of rows, and what they are for.

    client: whose model reads them; None: the server's. roles: which of its models. texts: whether there may be no
    conversations. unlabelled: whether there may be rows without a completion; is_left_out: these are passed over;
    is_enough: a file of them alone is trained on.
    """

    path: Path
    client: int | None
    max_length: int
    roles: tuple[Role, ...] = ("slm",)
    unlabelled: bool = False
    texts: bool = False
    is_left_out: bool = False
    is_enough: bool = True


@dataclass(frozen=True)
class Opened:
    """A file as it was read: its bytes, and each line with its row, or why it is none."""

    source: Source
    content: bytes
    lines: list[tuple[str, Row | str]]

    @property
    def is_table(self) -> bool:
        """Whether its rows are no lines of their own."""
        return self.source.path.suffix in TABLES

    @property
    def rows(self) -> dict[int, Row]:
        """By line, counted from 1, those that can be read."""
        return {number: row for number, (_, row) in enumerate(self.lines, 1) if isinstance(row, Row)}


def of_lines(opened: Opened) -> Iterator[Remark]:
    """Lines that are no rows, by what is wrong with them; how lines end, and what stands before the first."""
    reasons = defaultdict[str, list[int]](list)
    for number, (_, row) in enumerate(opened.lines, 1):
        if isinstance(row, str):
            reasons[COLUMN.sub("", row)].append(number)
    for reason, lines in reasons.items():
        yield Remark("FAIL", reason, lines)
    if not opened.lines:
        yield Remark("FAIL", "the file is empty")
    if opened.content.startswith(MARK) and not opened.is_table:
        yield Remark("WARN", "a byte order mark before the first line")
    ends = [number for number, (line, _) in enumerate(opened.lines, 1) if line.endswith("\r")]
    if ends and len(ends) < len(opened.lines):
        yield Remark("WARN", "mixed line ends: of Windows (CR LF) here, of Unix elsewhere", ends)


def repeated(rows: dict[int, Row]) -> list[int]:
    """Lines whose row stands before them already."""
    seen, found = set[tuple[str, str | None]](), list[int]()
    for number, row in rows.items():
        if (row.prompt, row.completion) in seen:
            found.append(number)
        seen.add((row.prompt, row.completion))
    return found


def of_repeats(opened: Opened) -> Iterator[Remark]:
    """Rows that occur twice, and prompts that have two answers."""
    rows = opened.rows
    if lines := repeated(rows):
        yield Remark("WARN", "the same row as on an earlier line", lines)
    answers, asked = defaultdict[str, set[str]](set), defaultdict[str, list[int]](list)
    for number, row in rows.items():
        if row.completion is not None:
            answers[row.prompt].add(row.completion)
            asked[row.prompt].append(number)
    twice = sorted(number for prompt, known in answers.items() if len(known) > 1 for number in asked[prompt])
    if twice:
        yield Remark("WARN", "one prompt with different completions", twice)


def of_spacing(opened: Opened) -> Iterator[Remark]:
    """Answers that stand right against their prompt, or two spaces from it."""
    pairs = {
        number: (row.prompt, row.completion)
        for number, row in opened.rows.items()
        if row.completion is not None and row.form == TEXT
    }
    if lines := [number for number, pair in pairs.items() if is_unspaced(*pair)]:
        yield Remark("WARN", "no space between prompt and completion", lines)
    if lines := [number for number, pair in pairs.items() if is_doubly_spaced(*pair)]:
        yield Remark("WARN", "two spaces or more between prompt and completion", lines)


def of_lengths(opened: Opened, reader: Outline, *, is_skipped: bool) -> tuple[Lengths | None, list[Remark]]:
    """How long rows are, and which are too long, or have no token of a prompt. is_skipped: these are left out."""
    limit = min(opened.source.max_length, reader.context)
    examples, refused = dict[int, Example](), defaultdict[str, list[int]](list)
    for number, row in opened.rows.items():
        try:
            examples[number] = encode_row(row, reader.tokenizer)
        except Problem as problem:
            refused[problem.message].append(number)
    remarks = [Remark("FAIL", message, lines) for message, lines in refused.items()]
    if not examples:
        return None, remarks
    lengths = sorted(len(one.input_ids) for one in examples.values())
    if lines := [number for number, one in examples.items() if one.prompt_tokens < 1]:
        remarks.append(Remark("FAIL", "no token of a prompt before the completion", lines))
    if lines := [number for number, one in examples.items() if len(one.input_ids) > limit]:
        end = ", and left out in training" if is_skipped and len(lines) < len(examples) else ""
        found = f"more than {limit} tokens, {lengths[-1]} at most{end}"
        remarks.append(Remark("WARN" if end else "FAIL", found, lines))
    answers = [one.answer_tokens for one in examples.values() if one.answer_tokens] or [0]
    most = lengths[(95 * len(lengths) - 1) // 100]
    return Lengths(median(lengths), most, lengths[-1], limit, median(answers), max(answers)), remarks


def of_unlabelled(opened: Opened) -> Iterator[Remark]:
    """Rows without a completion, where these teach nothing, or where there is nothing else."""
    rows = opened.rows
    lines = [number for number, row in rows.items() if row.completion is None]
    if lines and len(lines) == len(rows) and not opened.source.is_enough:
        yield Remark("FAIL", "no row has a completion")
    elif lines and opened.source.is_left_out:
        yield Remark("WARN", "no completion, and so teaches nothing", lines)


def of_tests(opened: Opened, prompts: Collection[str]) -> Iterator[Remark]:
    """Rows whose prompt is one of the questions that are scored."""
    if lines := [number for number, row in opened.rows.items() if row.prompt in prompts]:
        yield Remark("WARN", "the prompt is also a question that is scored", lines)


def of_others(opened: Opened, other: Opened, name: str) -> Iterator[Remark]:
    """Rows that another file here has too."""
    known = {(row.prompt, row.completion) for row in other.rows.values()}
    if lines := [number for number, row in opened.rows.items() if (row.prompt, row.completion) in known]:
        yield Remark("WARN", f"rows of {name}, too", lines)


def answers_of(opened: Opened) -> dict[str, int] | None:
    """How often each answer stands there, the most frequent first; None where they are many or long.

    Many is also more than half as many as rows: such answers are texts, not labels.
    """
    answered = [row for row in opened.rows.values() if row.completion is not None and not row.messages]
    counts = Counter(str(row.completion) for row in answered)
    is_short = all(len(answer) <= LONGEST_ANSWER for answer in counts)
    most = min(MOST_ANSWERS, counts.total() // 2)
    return dict(counts.most_common()) if 0 < len(counts) <= most and is_short else None
