"""Rows as tokens: a prompt's are read, an answer's are trained and scored.

A row is tokenised exactly as lm-eval tokenises a context and its continuation, so that what is trained is what is
scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from stages.data import conversations
from stages.data.rows import Row, unit_of
from stages.runtime.errors import Damaged, Problem
from stages.runtime.events import Event, Report

NO_LABEL = -100
"""Stands for the target where there is none: torch's own sign for "no cross-entropy here"."""


@dataclass(frozen=True)
class Example:
    """A row as token ids; the first prompt_tokens of them are not trained on: all of them, if it is unlabelled.

    gaps: where the tokens lie, from and up to, that stand between answers, and are not trained on either.
    """

    input_ids: list[int]
    prompt_tokens: int
    gaps: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)

    @property
    def turns(self) -> list[tuple[int, int]]:
        """Where each answer lies, from and up to; one, as a rule, and none where it is unlabelled."""
        ends = [self.prompt_tokens, *(place for gap in self.gaps for place in gap), len(self.input_ids)]
        return [(first, end) for first, end in zip(ends[::2], ends[1::2], strict=True) if first < end]

    @property
    def answer_tokens(self) -> int:
        """How many tokens carry cross-entropy."""
        return len(self.input_ids) - self.prompt_tokens - sum(end - first for first, end in self.gaps)

    @property
    def distilled_positions(self) -> int:
        """At how many positions models can teach each other: one for each answer token, or the end of the prompt."""
        return max(self.answer_tokens, 1)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    bos_token: str | None
    eos_token: str | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself or without."""


def encode(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    context: int,
    too_long: Literal["refuse", "skip"],
    path: Path,
) -> list[Example]:
    """Every row as tokens, at most max_length and at most the model's context of them.

    Rows that do not fit are refused by line (raises Damaged) or skipped; nothing is ever cut.
    """
    limits = {"max_length": max_length, "context": context}
    return [one for one in fitting(rows, tokenizer, **limits, too_long=too_long, path=path) if one is not None]


def fitting(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    context: int,
    too_long: Literal["refuse", "skip"],
    path: Path,
) -> list[Example | None]:
    """As encode, with None in the place of a row that is skipped."""
    limit = min(max_length, context)
    examples: list[Example | None] = []
    for number, row in enumerate(rows, 1):
        row_of_file = f"{unit_of(path)} {number} of {path.name}"
        try:
            example = encode_row(row, tokenizer)
        except Problem as problem:
            message = f"{row_of_file}: {problem.message}"
            raise type(problem)(message, where=f"{path}:{number}", mend=problem.mend) from problem
        if example.prompt_tokens < 1:
            message = (
                f"{unit_of(path)} {number} of {path.name} is too short: there is no token of a prompt before its answer"
            )
            raise Damaged(message, where=f"{path}:{number}", mend="give the row a longer prompt")
        fits = len(example.input_ids) <= limit
        examples.append(example if fits else None)
        if not fits and too_long == "refuse":
            bound = f"max_length is {max_length}, the model's context {context}"
            message = f"{row_of_file} has {len(example.input_ids)} tokens; {bound}"
            raised = "" if limit == context else "raise max_length, "
            mend = f'shorten the row, {raised}or agree on data.too_long = "skip"'
            raise Damaged(message, where=f"{path}:{number}", mend=mend)
    if not any(examples):
        raise Damaged(f"no row of {path.name} fits in {limit} tokens", where=path, mend="raise max_length")
    return examples


def tell_left_out(
    rows: Sequence[Row], examples: Sequence[Example], path: Path, report: Report, name: str = "rows_left_out"
) -> dict[str, float]:
    """How many rows were too long and skipped, told, and under this name for log and manifest; empty if none was."""
    left_out = len(rows) - len(examples)
    if not left_out:
        return {}
    report(Event("warning", f"{left_out} of {len(rows)} rows of {path.name} are too long and left out"))
    return {name: left_out}


def encode_row(row: Row, tokenizer: Tokenizer) -> Example:
    """One row as tokens: whitespace at the end of the prompt belongs to the completion, as in lm-eval.

    Raises as turns_of does for a conversation.
    """
    if row.messages:
        whole, answers = conversations.turns_of(row, tokenizer)
        if not answers:
            return Example(whole, len(whole))
        ends = [end for _, end in answers[:-1]]
        gaps = tuple(zip(ends, [first for first, _ in answers[1:]], strict=True))
        return Example(whole, answers[0][0], gaps=gaps)
    # Nor does a prompt that spells the first special token out, as chat templates do, get it twice.
    first = tokenizer.bos_token or tokenizer.eos_token  # as in lm-eval
    is_spelled_out = bool(first) and row.prompt.startswith(str(first))
    context = tokenizer.encode(row.prompt.rstrip(), add_special_tokens=not is_spelled_out)
    if row.completion is None:
        return Example(context, len(context))
    whole = tokenizer.encode(row.prompt + row.completion, add_special_tokens=not is_spelled_out)
    # A tokenizer may merge across the border; the answer then starts where the prompt's own tokens end.
    return Example(whole, min(len(context), len(whole) - 1))


@dataclass(frozen=True)
class Extent:
    """How many rows parties have, the fewest and the most, and the longest row and answer in tokens, if known."""

    fewest: int
    most: int
    longest: int | None = None
    longest_answer: int | None = None


def extent_of(found: Sequence[Sequence[Row]], tokenizer: Tokenizer | None) -> Extent | None:
    """The extent of these parties' rows; None if there is no party."""
    if not found:
        return None
    fewest, most = min(map(len, found)), max(map(len, found))
    if tokenizer is None:
        return Extent(fewest, most)
    examples = [example for rows in found for row in rows if (example := _readable(row, tokenizer))]
    if not examples:
        return Extent(fewest, most)
    longest = max(len(example.input_ids) for example in examples)
    return Extent(fewest, most, longest, max(example.distilled_positions for example in examples))


def _readable(row: Row, tokenizer: Tokenizer) -> Example | None:
    """A row as tokens; None for a conversation that cannot be made tokens of, which training refuses."""
    try:
        return encode_row(row, tokenizer)
    except Problem:
        return None
