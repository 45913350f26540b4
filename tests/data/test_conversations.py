"""conversations: what is learned is the assistant's text and the token that ends it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chat_templates import BARE, CHATML, ENDS, GEMMA, LLAMA_3, QWEN_3, TEMPLATES, chatting
from stages.data.examples import Example, encode, encode_row
from stages.data.formats import row_of
from stages.data.rows import Row
from stages.runtime.errors import Damaged, Problem, UsageProblem

QUESTION = {"role": "user", "content": "what colour is the big star ?"}
ANSWER = {"role": "assistant", "content": "blue 1"}
MORE = [{"role": "user", "content": "and the circle ?"}, {"role": "assistant", "content": "green, not\n\nblue"}]
SYSTEM = {"role": "system", "content": "Say a colour ."}


def row(*messages: dict[str, str]) -> Row:
    return row_of({"messages": list(messages)}, unlabelled=False)


def learned(example: Example, tokenizer: Any) -> list[str]:
    """The text of each answer."""
    return [tokenizer.decode(example.input_ids[first:end]) for first, end in example.turns]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("before", [[], [SYSTEM]], ids=["no system", "system"])
def test_of_one_answer_its_text_and_the_token_that_ends_it_are_learned(name: str, before: list[dict[str, str]]) -> None:
    tokenizer = chatting(TEMPLATES[name])
    messages = [*before, QUESTION, ANSWER]
    example = encode_row(row(*messages), tokenizer)
    thought = "<think>\n\n</think>\n\n" if name == "qwen-3" else ""
    assert learned(example, tokenizer) == [f"{thought}blue 1{ENDS[name]}"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.input_ids) == whole.removesuffix("\n")
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: example.prompt_tokens] == asked


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama-3"])
def test_of_several_answers_each_is_learned_and_by_offsets_no_other_token_is(name: str) -> None:
    tokenizer = chatting(TEMPLATES[name])
    messages = [QUESTION, ANSWER, *MORE]
    example = encode_row(row(*messages), tokenizer)
    assert learned(example, tokenizer) == [f"blue 1{ENDS[name]}", f"green, not\n\nblue{ENDS[name]}"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    wanted = [answer + ENDS[name] for answer in ("blue 1", "green, not\n\nblue")]
    spans = [(text.index(answer), text.index(answer) + len(answer)) for answer in wanted]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(low <= first and end <= high for low, high in spans) for first, end in encoded["offset_mapping"]]
    ours = [any(first <= place < end for first, end in example.turns) for place in range(len(example.input_ids))]
    assert example.input_ids == encoded["input_ids"][: len(example.input_ids)]
    assert ours == inside[: len(ours)]
    assert not any(inside[len(ours) :])
    assert example.answer_tokens == sum(inside)


def test_of_prompt_and_completion_only_the_completion_is_learned() -> None:
    tokenizer = chatting(CHATML)
    value = {"prompt": [QUESTION, ANSWER, MORE[0]], "completion": [MORE[1]]}
    example = encode_row(row_of(value, unlabelled=False), tokenizer)
    assert learned(example, tokenizer) == ["green, not\n\nblue<|im_end|>"]
    assert example.input_ids == encode_row(row(QUESTION, ANSWER, *MORE), tokenizer).input_ids


def test_what_follows_the_last_answer_is_left_out() -> None:
    tokenizer = chatting(LLAMA_3)
    assert encode_row(row(QUESTION, ANSWER, MORE[0]), tokenizer) == encode_row(row(QUESTION, ANSWER), tokenizer)


def test_where_a_line_end_ends_a_turn_it_is_learned() -> None:
    tokenizer = chatting(BARE)
    example = encode_row(row(QUESTION, ANSWER), tokenizer)
    assert learned(example, tokenizer) == [" blue 1\n"]


def test_an_unlabelled_conversation_ends_where_an_answer_would_begin() -> None:
    tokenizer = chatting(GEMMA)
    example = encode_row(row_of({"prompt": [QUESTION]}, unlabelled=True), tokenizer)
    text = "<start_of_turn>user\nwhat colour is the big star ?<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(example.input_ids) == tokenizer.bos_token + text
    assert (example.prompt_tokens, example.distilled_positions) == (len(example.input_ids), 1)


def refusal(given: Row, template: str | None) -> Problem:
    with pytest.raises(Problem) as caught:
        encode([given], chatting(template), max_length=99, context=99, too_long="refuse", path=Path("train.jsonl"))
    return caught.value


def test_a_template_that_renders_earlier_turns_otherwise_is_refused_for_several_answers() -> None:
    found = refusal(row(QUESTION, ANSWER, *MORE), QWEN_3)
    assert isinstance(found, UsageProblem)
    assert found.message.startswith("line 1 of train.jsonl: the chat template of the tokenizer has no exact place for")
    assert found.mend is not None
    assert found.mend.startswith("bring rows with one answer each")


def test_a_template_whose_answers_join_with_what_stands_before_is_refused() -> None:
    joined = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    sticks = row({"role": "user", "content": "ci"}, {"role": "assistant", "content": "rcle"})
    tokenizer = chatting(joined)
    assert len(tokenizer.encode("circle")) < len(tokenizer.encode("ci")) + len(tokenizer.encode("rcle"))
    assert "tokens join across" in refusal(sticks, joined).message


def test_an_answer_whose_first_space_joins_with_the_template_is_named_as_that() -> None:
    tokenizer = chatting(CHATML)
    assert len(tokenizer.encode("\n  two")) < len(tokenizer.encode("\n")) + len(tokenizer.encode("  two"))
    found = refusal(row(QUESTION, {"role": "assistant", "content": "  two"}), CHATML)
    assert found.message.startswith("line 1 of train.jsonl: turn 2 begins with a space or a line end")


def test_a_conversation_that_its_template_refuses_is_named_with_the_template_s_words() -> None:
    found = refusal(row(QUESTION, QUESTION, ANSWER), GEMMA)
    assert isinstance(found, Damaged)
    assert "refuses it: Conversation roles must alternate" in found.message


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    found = refusal(row(QUESTION, ANSWER), "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert "refuses it" in found.message


def test_without_a_template_the_mend_says_what_to_bring() -> None:
    found = refusal(row(QUESTION, ANSWER), None)
    assert "has no chat template, which rows of messages need" in found.message
    assert "chat_template.jinja" in str(found.mend)
