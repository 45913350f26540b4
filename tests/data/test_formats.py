"""formats: rows as people have them, one form in a file, each mistake named with its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import write_rows
from stages.data.formats import BadRow, row_of
from stages.data.partition import unlabel
from stages.data.prepare import prepare
from stages.data.row_files import read_rows
from stages.data.rows import INSTRUCTION, MESSAGES, TURNS, Message, Row, rows_bytes
from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace.paths import Workspace

ASKED, SAID = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CHAT = {"messages": [ASKED, SAID]}
TURN = {"prompt": [ASKED], "completion": [SAID]}
TOLD = {"instruction": "Name it.", "input": "", "output": "A"}


def test_an_instruction_is_told_in_alpaca_s_words() -> None:
    # https://github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT, by hand
    short = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName it.\n\n### Response:"
    )
    long = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nName it.\n\n### Input:\na {star}"
        "\n\n### Response:"
    )
    for value in (TOLD, {"instruction": "Name it.", "output": "A"}, TOLD | {"input": None}):
        assert row_of(value, unlabelled=False) == Row(short, "A", form=INSTRUCTION)
    assert row_of(TOLD | {"input": "a {star}"}, unlabelled=False).prompt == long


def test_messages_and_turns_are_read_with_what_is_learned_of_them() -> None:
    found = row_of({"messages": [ASKED, SAID, ASKED, SAID], "label": 3}, unlabelled=False)
    assert (found.form, found.label, found.answers) == (MESSAGES, "3", [1, 3])
    assert found.messages[1] == Message("assistant", "A")
    found = row_of({"prompt": [ASKED, SAID, ASKED], "completion": [SAID]}, unlabelled=False)
    assert (found.form, found.answers) == (TURNS, [3])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (CHAT | {"prompt": "Q"}, "messages and prompt in one row"),
        ({"messages": []}, "messages is not a list of messages, or is empty"),
        ({"messages": "Q"}, "messages is not a list of messages, or is empty"),
        ({"messages": ["Q"]}, "message 1 of messages is a str, not an object"),
        ({"messages": [ASKED]}, "no turn of the assistant in messages"),
        ({"messages": [SAID]}, "the assistant speaks before any user"),
        ({"messages": [{"role": "system", "content": "S"}, SAID]}, "the assistant speaks before any user"),
        (
            {"messages": [ASKED, {"role": "tool", "content": "A"}]},
            "message 2 of messages has the role 'tool'; there are",
        ),
        ({"messages": [ASKED, {"role": "assistant"}]}, "message 2 of messages: no content"),
        ({"messages": [ASKED, SAID | {"content": " "}]}, "message 2 of messages: content is not text, or is empty"),
        ({"messages": [ASKED, SAID | {"content": [{"type": "text"}]}]}, "message 2 of messages: content is not text"),
        ({"messages": [ASKED, SAID | {"tool_calls": [1]}]}, "message 2 of messages has 'tool_calls' beside role"),
        ({"prompt": [ASKED]}, "no completion"),
        ({"prompt": ["Q"], "completion": "A"}, "message 1 of prompt is a str, not an object"),
        ({"prompt": [ASKED], "completion": "A"}, "completion is not a list of messages, or is empty"),
        ({"prompt": [ASKED, SAID], "completion": [ASKED]}, "no turn of the assistant in completion"),
        ({"prompt": "Q", "completion": [SAID]}, "completion is not text, or is empty"),
        ({"instruction": "I"}, "no output"),
        ({"output": "A"}, "no instruction"),
        (TOLD | {"input": 5}, "input is not text, or is empty"),
        (TOLD | {"output": ""}, "output is not text, or is empty"),
    ],
)
def test_a_row_that_is_none_is_told_why(value: dict[str, Any], found: str) -> None:
    with pytest.raises(BadRow) as caught:
        row_of(value, unlabelled=False)
    assert str(caught.value).startswith(found)


def test_a_key_that_is_null_as_in_a_table_with_all_columns_counts_as_absent() -> None:
    found = row_of({"messages": [ASKED, SAID | {"tool_calls": None}], "prompt": None, "output": None}, unlabelled=False)
    assert found == row_of(CHAT, unlabelled=False)


def test_a_file_of_several_forms_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (CHAT, CHAT, TURN, {"prompt": "Q", "completion": "A"})))
    with pytest.raises(Damaged) as caught:
        read_rows(path)
    assert f"line 3 of train.jsonl: a row {TURNS}, where row 1 is {MESSAGES}" in caught.value.message
    assert "line 4: a row" in caught.value.message
    assert "expected {" not in caught.value.message


def test_public_rows_of_models_of_several_families_are_no_conversations(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "public.jsonl", [CHAT])  # type: ignore[list-item]
    with pytest.raises(Damaged, match=r"line 1 of public\.jsonl: a conversation, which each model's template"):
        read_rows(path, texts=True)


@pytest.mark.parametrize("value", [CHAT, TURN, {"prompt": "Q", "completion": " A"}])
def test_rows_are_written_as_they_were_read(value: dict[str, Any]) -> None:
    assert json.loads(rows_bytes([row_of(value, unlabelled=False)])) == value


def test_a_conversation_without_its_answer_is_asked_only() -> None:
    more = row_of({"messages": [ASKED, SAID, ASKED, SAID]}, unlabelled=False)
    [found] = unlabel([more], 1.0, seed=1)
    assert (found.completion, found.answers) == (None, [])
    assert json.loads(rows_bytes([found])) == {"prompt": [ASKED, SAID, ASKED]}
    assert row_of(json.loads(rows_bytes([found])), unlabelled=True) == found


def test_prepare_deals_conversations_and_refuses_two_forms(workspace_folder: Path) -> None:
    agreement = workspace_folder / "fedcollm.toml"
    agreement.write_text(agreement.read_text() + '\n[data]\nfiles = ["data/chats.jsonl"]\n')
    chats = [{"messages": [{"role": "user", "content": f"Q {i}"}, SAID]} for i in range(20)]
    write_rows(workspace_folder / "data/chats.jsonl", chats)  # type: ignore[arg-type]
    for path in workspace_folder.glob("private/*/*.jsonl"):
        path.unlink()
    prepare(Workspace(workspace_folder))
    dealt = [row for k in (1, 2, 3) for row in read_rows(Workspace(workspace_folder).client_data(k))[0]]
    assert {row.form for row in dealt} == {MESSAGES}
    assert len({row.prompt for row in dealt}) == len(dealt) == 15
    agreement.write_text(agreement.read_text().replace("files =", "unlabelled_share = 0.4\nfiles ="))
    prepare(Workspace(workspace_folder), overwrite=True)
    auxiliary, _ = read_rows(Workspace(workspace_folder).auxiliary_data, unlabelled=True)
    assert sorted(row.completion is None for row in auxiliary) == [False] * 3 + [True] * 2
    write_rows(workspace_folder / "data/texts.jsonl", [{"prompt": "Q", "completion": "A"}])
    agreement.write_text(agreement.read_text().replace('"data/chats.jsonl"', '"data/chats.jsonl", "data/texts.jsonl"'))
    with pytest.raises(UsageProblem, match=r"the rows of data.files are of several forms"):
        prepare(Workspace(workspace_folder), overwrite=True)
