"""Spaces between a prompt and its answer: none, or more than one, is what a model has hardly ever read."""

from __future__ import annotations

from collections.abc import Sequence

from stages.data.rows import TEXT, Row
from stages.runtime.events import Event, Report


def warn_of_spacing(rows: Sequence[Row], report: Report) -> None:
    """Tell how many answers stand right against their prompt, or two spaces from it: nothing else shows that."""
    labelled = [(row.prompt, row.completion) for row in rows if row.completion is not None and row.form == TEXT]
    if unspaced := sum(is_unspaced(prompt, completion) for prompt, completion in labelled):
        report(Event("warning", f"{unspaced} of {len(labelled)} completions begin without a space after their prompt"))
    doubled = sum(is_doubly_spaced(prompt, completion) for prompt, completion in labelled)
    if doubled:
        report(Event("warning", f"{doubled} of {len(labelled)} completions have two spaces or more before them"))


def is_unspaced(prompt: str, completion: str) -> bool:
    """Whether an answer stands right against its prompt."""
    return not (prompt[-1].isspace() or completion[0].isspace())


def is_doubly_spaced(prompt: str, completion: str) -> bool:
    """Whether more than one space parts an answer from its prompt: models have hardly ever read that.

    Spaces that begin a line, all in the prompt or all in the answer, are none of these: they indent it, as in code.
    """
    before, after = prompt.rstrip(" "), completion.lstrip(" ")
    if not before or (before[-1].isspace() and (before == prompt or after == completion)):
        return False
    return len(prompt) - len(before) + len(completion) - len(after) > 1
