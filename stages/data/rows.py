"""What a row is: a prompt and what is learned to follow it, as text or as the turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from stages.runtime.errors import UsageProblem
from stages.workspace.rows_layout import TABLES

TEXT, MESSAGES, TURNS, INSTRUCTION = (
    '{"prompt": "...", "completion": "..."}',
    '{"messages": [...]}',
    '{"prompt": [...], "completion": [...]}',
    '{"instruction": "...", "input": "...", "output": "..."}',
)
"""The forms of rows, as they are told."""

ASSISTANT = "assistant"


class Message(NamedTuple):
    """One turn of a conversation. role: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One training example. label and source (a task's name) are known only where `prepare` made it.

    completion: None for an unlabelled row. messages: of a conversation all turns, which a model's chat template makes
    tokens of; the assistant's from trained_from on are learned. Its prompt and completion are JSON of the turns: rows
    are compared by them, and nothing is trained on them. form: as its file has it.
    """

    prompt: str
    completion: str | None
    label: str = ""
    source: str = ""
    messages: tuple[Message, ...] = ()
    trained_from: int = 0
    form: str = TEXT

    @property
    def answers(self) -> list[int]:
        """Of a conversation, which turns are learned."""
        turns = range(self.trained_from, len(self.messages))
        return [turn for turn in turns if self.completion is not None and self.messages[turn].role == ASSISTANT]


def conversation(
    messages: Iterable[Message], trained_from: int | None, label: str = "", source: str = "", *, form: str
) -> Row:
    """The row of a conversation. trained_from: from which turn on the assistant's are learned; None: unlabelled."""
    turns = tuple(messages)
    prompt = turns if trained_from is None else turns[:trained_from]
    completion = None if trained_from is None else _as_json(turns[trained_from:])
    return Row(_as_json(prompt), completion, label, source, turns, trained_from or 0, form)


def unlabelled(row: Row) -> Row:
    """The row without its completion and label."""
    if not row.messages:
        return replace(row, completion=None, label="")
    last = row.answers[-1]
    return conversation(row.messages[:last], None, source=row.source, form=TURNS)


def rows_bytes(rows: Iterable[Row]) -> bytes:
    """Rows as JSON lines; label and source stay behind."""
    return "".join(json.dumps(_value(row), ensure_ascii=False) + "\n" for row in rows).encode()


def check_one_form(rows: Iterable[Row], what: str) -> None:
    """Raise UsageProblem for rows of several forms, which one file may not hold. what: whose rows these are."""
    forms = {TEXT if row.form == INSTRUCTION else row.form: row for row in rows if row.completion is not None}
    if len(forms) > 1:
        message = f"{what} are of several forms: {' and '.join(sorted(forms))}"
        raise UsageProblem(message, mend="bring them into one form")


def unit_of(path: Path) -> str:
    """What the rows of a file are counted in: its lines; of a table its rows, without the names of the columns."""
    return "line" if path.suffix not in TABLES else "row"


def _value(row: Row) -> dict[str, Any]:
    if row.form == MESSAGES and row.completion is not None:
        return {"messages": _told(row.messages)}
    cut = row.trained_from if row.completion is not None else len(row.messages)
    prompt: Any = _told(row.messages[:cut]) if row.messages else row.prompt
    completion: Any = _told(row.messages[cut:]) if row.messages else row.completion
    return {"prompt": prompt} | ({} if row.completion is None else {"completion": completion})


def _told(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [one._asdict() for one in messages]


def _as_json(messages: Iterable[Message]) -> str:
    return json.dumps(_told(messages), ensure_ascii=False)
