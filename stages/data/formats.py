"""The forms in which people have rows, each made a row: one function, whatever kind of file they came from.

Texts, conversations, and instructions. An instruction is told in Alpaca's own words, as its authors trained on it
(https://github.com/tatsu-lab/stanford_alpaca, train.py). A file holds rows of one form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from stages.data.rows import ASSISTANT, INSTRUCTION, MESSAGES, TURNS, Message, Row, conversation

KEYS = ("prompt", "completion", "label", "source", "messages", "instruction", "input", "output")
"""What a row may hold that is used here."""

ROLES = ("system", "user", ASSISTANT)

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Known(NamedTuple):
    """What `prepare` knows of a row beside its texts."""

    label: str
    source: str


class BadRow(ValueError):
    """What is wrong with one row."""


def row_of(value: Mapping[str, Any], *, unlabelled: bool) -> Row:
    """A row as a mapping of its keys. unlabelled: whether it may be without an answer. Raises BadRow."""
    known = Known(*("" if value.get(key) is None else str(value[key]) for key in Known._fields))
    given = {key for key in KEYS if value.get(key) is not None}
    if "messages" in given:
        if others := sorted(given & {"prompt", "completion", "instruction", "output"}):
            raise BadRow(f"messages and {others[0]} in one row")
        return _of_messages(value["messages"], known)
    if "prompt" not in given and given & {"instruction", "output"}:
        return _of_instruction(value, known)
    if isinstance(value.get("prompt"), list):
        return _of_turns(value, known, unlabelled)
    # Another key may be a completion with its name misspelt.
    is_unlabelled = unlabelled and given | set(value) <= {"prompt", "label", "source"}
    for key in ("prompt",) if is_unlabelled else ("prompt", "completion"):
        _check_text(value, key)
    return Row(value["prompt"], None if is_unlabelled else value["completion"], *known)


def of_one_form(rows: Sequence[tuple[str, Row | str]]) -> list[tuple[str, Row | str]]:
    """The rows with what they were read from; of another form than the first is, what is wrong with them instead."""
    known = [(number, row) for number, (_, row) in enumerate(rows, 1) if isinstance(row, Row)]
    if all(_is_alike(row, known[0][1]) for _, row in known):
        return list(rows)
    number, first = known[0]
    return [
        (text, row)
        if not isinstance(row, Row) or _is_alike(row, first)
        else (text, f"a row {row.form}, where row {number} is {first.form}")
        for text, row in rows
    ]


def _is_alike(row: Row, first: Row) -> bool:
    """Whether two rows are of one form; one without an answer may stand among conversations of any, or among texts."""
    is_open = row.completion is None or first.completion is None
    return row.form == first.form or (is_open and bool(row.messages) == bool(first.messages))


def _check_text(value: Mapping[str, Any], key: str) -> None:
    if key not in value:
        raise BadRow(f"no {key}")
    if not isinstance(value[key], str) or not value[key].strip():
        raise BadRow(f"{key} is not text, or is empty")
    try:
        value[key].encode()
    except UnicodeEncodeError:
        raise BadRow(f"{key} holds half a character, a surrogate without its other") from None


def _of_instruction(value: Mapping[str, Any], known: Known) -> Row:
    told = {"input": "", **{key: text for key, text in value.items() if text is not None}}
    _check_text(told, "instruction")
    _check_text(told, "output")
    if told["input"] != "":
        _check_text(told, "input")
    template = WITH_INPUT if told["input"] else WITHOUT_INPUT
    prompt = template.format(instruction=told["instruction"], input=told["input"])
    return Row(prompt, told["output"], *known, form=INSTRUCTION)


def _of_messages(value: Any, known: Known) -> Row:
    messages = _messages(value, "messages")
    first = _first_answer(messages, "messages")
    return conversation(messages, first, *known, form=MESSAGES)


def _of_turns(value: Mapping[str, Any], known: Known, unlabelled: bool) -> Row:
    prompt = _messages(value["prompt"], "prompt")
    if unlabelled and set(value) <= {"prompt", "label", "source"}:
        return conversation(prompt, None, *known, form=TURNS)
    if value.get("completion") is None:
        raise BadRow("no completion")
    completion = _messages(value["completion"], "completion")
    messages = [*prompt, *completion]
    _first_answer(messages, "completion")
    if all(one.role != ASSISTANT for one in completion):
        raise BadRow("no turn of the assistant in completion")
    return conversation(messages, len(prompt), *known, form=TURNS)


def _first_answer(messages: Sequence[Message], key: str) -> int:
    """Which turn is the assistant's first. Raises BadRow where none is, or where nobody has spoken before."""
    before = list(takewhile(lambda one: one.role != ASSISTANT, messages))
    if len(before) == len(messages):
        raise BadRow(f"no turn of the assistant in {key}")
    if all(one.role == "system" for one in before):
        raise BadRow("the assistant speaks before any user")
    return len(before)


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key} is not a list of messages, or is empty")
    found = []
    for number, one in enumerate(value, 1):
        what = f"message {number} of {key}"
        if not isinstance(one, Mapping):
            raise BadRow(f"{what} is a {type(one).__name__}, not an object")
        if one.get("role") not in ROLES:
            raise BadRow(f"{what} has the role {str(one.get('role'))[:40]!r}; there are {', '.join(ROLES)}")
        if others := sorted(name for name, held in one.items() if name not in Message._fields and held is not None):
            raise BadRow(f"{what} has {others[0][:40]!r} beside role and content, which is not used here")
        try:
            _check_text(one, "content")
        except BadRow as error:
            raise BadRow(f"{what}: {error}") from None
        found.append(Message(one["role"], one["content"]))
    return found
