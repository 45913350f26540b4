"""Conversations as tokens, by the chat template that lies in a model's folder; the assistant's turns alone are learned.

transformers renders a template in Jinja's sandbox, so that a model from elsewhere cannot run anything by it. Where a
turn of the assistant lies is found by rendering what stands before it, and it too: both must be beginnings of the whole
conversation, as text and as tokens. A template for which they are none is refused, since no mask would be exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from stages.data.rows import Message, Row
from stages.runtime import quiet
from stages.runtime.errors import Damaged, Problem, UsageProblem


class Turns(NamedTuple):
    """A conversation as tokens, and where the answers that are learned lie in it, from and up to."""

    input_ids: list[int]
    answers: list[tuple[int, int]]


def turns_of(row: Row, tokenizer: Any) -> Turns:
    """A row's turns up to the last that is learned, with the token that ends it, and nothing that follows.

    Raises UsageProblem for a tokenizer without a template and for one whose masks would not be exact, and Damaged for a
    conversation that the template refuses.
    """
    if not getattr(tokenizer, "chat_template", None):
        mend = "take the instruct model, put its chat_template.jinja into the model's folder, or bring rows of text"
        raise UsageProblem(f"{_whose(tokenizer)} has no chat template, which rows of messages need", mend=mend)
    if row.completion is None:
        return Turns(_ids(_rendered(row.messages, tokenizer, asks=True), tokenizer), [])
    answers = row.answers
    messages = row.messages[: answers[-1] + 1]
    text = _rendered(messages, tokenizer)
    whole, found = _ids(text, tokenizer), list[tuple[int, int]]()
    for turn in answers:
        before = _rendered(messages[:turn], tokenizer, asks=True)
        after = _rendered(messages[: turn + 1], tokenizer)
        first, end = (_ids(part, tokenizer) for part in (before, after))
        is_exact = text.startswith(after) and after.startswith(before)
        if not is_exact or whole[: len(end)] != end or end[: len(first)] != first or len(first) == len(end):
            raise _inexact(tokenizer, turn, messages[turn].content, is_text=not is_exact)
        last = len(end)
        if not after[len(before) :].rstrip().endswith(messages[turn].content.rstrip()):
            # What follows the token that ends a turn, a line end as a rule, is the template's; nobody ever writes it.
            while last > len(first) + 1 and not tokenizer.decode([end[last - 1]]).strip():
                last -= 1
        found.append((len(first), last))
    return Turns(whole[: found[-1][1]], found)


def _rendered(messages: tuple[Message, ...], tokenizer: Any, *, asks: bool = False) -> str:
    """As the template has it. asks: with what comes before an answer."""
    told = [one._asdict() for one in messages]
    try:
        with quiet.libraries():
            return str(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=asks))
    except Problem:
        raise
    except Exception as error:  # a template raises what it likes, and Jinja whatever it stumbles over
        said = str(error).strip().splitlines() or [type(error).__name__]
        message = f"the chat template of {_whose(tokenizer)} refuses it: {said[-1][:200]}"
        mend = "correct its messages; some templates take no system, or only user and assistant in turn"
        raise Damaged(message, mend=mend) from error


def _ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens; the template has written the special ones by itself."""
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return found


def _inexact(tokenizer: Any, turn: int, content: str, *, is_text: bool) -> Problem:
    if not is_text and content[0].isspace():
        message = (
            f"turn {turn + 1} begins with a space or a line end, which becomes one token with what stands before it"
        )
        return Damaged(message, mend="take it away: it is no part of an answer")
    why = "it renders earlier turns otherwise once a conversation goes on" if is_text else "tokens join across turns"
    message = f"the chat template of {_whose(tokenizer)} has no exact place for turn {turn + 1}: {why}"
    mend = "bring rows with one answer each, the turns before it in prompt; or a model with a template that only adds"
    return UsageProblem(message, mend=mend)


def _whose(tokenizer: Any) -> str:
    """Which tokenizer, by the folder that it is from."""
    name = Path(str(getattr(tokenizer, "name_or_path", "") or "")).name
    return f"the tokenizer of {name}" if name else "the tokenizer"
