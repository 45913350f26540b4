"""rows: JSON lines read strictly, and tokens split where lm-eval splits them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from builders import SHARED_DATA, rows, tiny_model, write_rows
from stages.data.examples import Example, encode, encode_row
from stages.data.row_files import read_rows
from stages.data.rows import Row, rows_bytes
from stages.data.spacing import warn_of_spacing
from stages.runtime.errors import Damaged, NotReady

GOOD = '{"prompt": "Q", "completion": " A"}'
TOKENIZERS = {"gpt2": SHARED_DATA / "tokenizers/gpt2", "llama (adds <s>)": SHARED_DATA / "models/stories3M"}


def test_rows_are_read_in_order_with_the_digest_of_their_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", rows(5))
    found, digest = read_rows(path)
    assert found == [Row(row["prompt"], row["completion"]) for row in rows(5)]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_label_and_source_are_read_where_they_are_and_left_behind_where_rows_are_written(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "Q", "completion": " A", "label": 3, "source": "arc", "id": 7}\n')
    found, _ = read_rows(tmp_path / "x.jsonl")
    assert found == [Row("Q", " A", label="3", source="arc")]
    assert rows_bytes(found) == GOOD.encode() + b"\n"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_last_line_may_end_or_not(tmp_path: Path, end: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(f"{GOOD}\n{GOOD}{end}".encode())
    assert len(read_rows(tmp_path / "x.jsonl")[0]) == 2


@pytest.mark.parametrize("border", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c"])
def test_a_character_that_only_looks_like_the_end_of_a_line_survives(tmp_path: Path, border: str) -> None:
    row = Row(f"one{border}two", f" three{border}four")
    (tmp_path / "x.jsonl").write_bytes(rows_bytes([row, row]))
    assert read_rows(tmp_path / "x.jsonl")[0] == [row, row]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", "an empty line"),
        ("   ", "an empty line"),
        ("prompt: Q", "not JSON"),
        (GOOD[:-1], "not JSON"),
        (GOOD + GOOD, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["Q", "A"]', "a list"),
        ('"Q"', "a str"),
        ("{}", "no prompt"),
        ('{"completion": "A"}', "no prompt"),
        ('{"prompt": "Q"}', "no completion"),
        ('{"prompt": "Q", "Completion": "A"}', "no completion"),
        ('{"prompt": "", "completion": "A"}', "prompt is not text, or is empty"),
        ('{"prompt": " \\n", "completion": "A"}', "prompt is not text, or is empty"),
        ('{"prompt": "Q", "completion": ""}', "completion is not text, or is empty"),
        ('{"prompt": 5, "completion": "A"}', "prompt is not text, or is empty"),
        ('{"prompt": "Q", "completion": null}', "completion is not text, or is empty"),
        ('{"prompt": "Q \\ud800", "completion": "A"}', "prompt holds half a character"),
        ('{"prompt": "Q", "completion": "A", "prompt": "R"}', "the key 'prompt' appears twice"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_its_mend(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(Damaged, match=rf"^line 3 of train\.jsonl: {re.escape(found)}") as caught:
        read_rows(path)
    assert 'expected {"prompt": "...", "completion": "..."}' in caught.value.message
    assert caught.value.where == f"{path}:3"
    assert caught.value.mend == "correct line 3 of train.jsonl"


def test_all_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n{{}}\n{GOOD}\n[]\n")
    with pytest.raises(Damaged, match=r"^line 2 of x\.jsonl: no prompt; (?s:.*)line 4: a list$") as caught:
        read_rows(path)
    assert caught.value.mend == "correct these 2 lines of x.jsonl"


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n" * 27)
    with pytest.raises(Damaged, match=r"line 20: no prompt\n(?s:.*)and 7 lines more$"):
        read_rows(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_an_editor_of_another_system_adds_changes_no_row(tmp_path: Path, end: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}{end}{GOOD}{end}".encode())
    assert read_rows(path)[0] == [Row("Q", " A")] * 2


def test_a_null_label_is_no_label(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "Q", "completion": " A", "label": null, "source": null}\n')
    assert read_rows(path)[0] == [Row("Q", " A", label="", source="")]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"),
        (GOOD.encode("utf-16"), "not UTF-8"),
        (gzip.compress(GOOD.encode(), mtime=0), "is compressed with gzip"),
    ],
)
def test_a_file_without_readable_rows_is_refused_with_its_mend(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(Damaged, match=found) as caught:
        read_rows(tmp_path / "x.jsonl")
    assert caught.value.mend


def test_a_file_that_is_not_there_is_not_ready(tmp_path: Path) -> None:
    with pytest.raises(NotReady):
        read_rows(tmp_path / "x.jsonl")


def test_rows_survive_writing_and_reading_to_the_last_character(tmp_path: Path) -> None:
    made = [Row('"\\/\b\f\n\t ü 数学 🙂', "\x00\x7f\ufeff ")]
    (tmp_path / "x.jsonl").write_bytes(rows_bytes(made))
    assert read_rows(tmp_path / "x.jsonl")[0] == made
    assert len(rows_bytes(made).splitlines()) == 1


# --- tokens

PAIRS = [
    ("Question: Which of these is a mammal?\nAnswer:", " a whale"),
    ("Question: Which?\nAnswer: ", "a whale"),  # whitespace at the end belongs to the completion
    ("Question: Which?\nAnswer:  \n\t", " a whale"),
    ("The answer is\n", "\nno"),
    ("数学と", "物理 🙂"),
    ("  leading and  double  spaces", "  kept"),
    ("x" * 50, " y" * 50),
]


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def harness(request: pytest.FixtureRequest) -> Any:
    """lm-eval's own model around a real tokenizer."""
    folder = TOKENIZERS[request.param]
    if not folder.is_dir():
        pytest.skip(f"no tokenizer in {folder}")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=tiny_model(vocabulary=len(tokenizer), width=4), tokenizer=tokenizer)


def test_a_row_is_split_where_lm_eval_splits_context_and_continuation(harness: Any) -> None:
    for prompt, completion in PAIRS:
        context, continuation = harness._encode_pair(prompt, completion)
        found = encode_row(Row(prompt, completion), harness.tokenizer)
        assert found == Example(context + continuation, len(context)), (prompt, completion)
        assert found.answer_tokens == len(continuation) > 0


@pytest.mark.parametrize(("prompt", "completion"), [("a", "nswer that goes on"), ("The unbeliev", "able and more")])
def test_where_a_token_lies_across_the_border_the_same_tokens_are_learned_and_no_letter_is_lost(
    harness: Any, prompt: str, completion: str
) -> None:
    context, continuation = harness._encode_pair(prompt, completion)
    found = encode_row(Row(prompt, completion), harness.tokenizer)
    assert found.input_ids[found.prompt_tokens :] == continuation
    assert found.prompt_tokens == len(context)
    assert harness.tokenizer.decode(found.input_ids, skip_special_tokens=True).strip() == prompt + completion


def test_a_prompt_that_spells_the_first_token_out_does_not_get_it_twice(harness: Any) -> None:
    first = harness.tokenizer.bos_token
    context, continuation = harness._encode_pair(f"{first} Question: Which?", " a whale")
    found = encode_row(Row(f"{first} Question: Which?", " a whale"), harness.tokenizer)
    assert found == Example(context + continuation, len(context))


class Letters:
    """A tokenizer in which arithmetic is easy: a token for each letter."""

    bos_token = eos_token = None

    def encode(self, text: str, **_: bool) -> list[int]:
        return [ord(letter) for letter in text]


class Greedy(Letters):
    """One that merges what it can: "QA" is a single token."""

    def encode(self, text: str, **_: bool) -> list[int]:
        return super().encode(text.replace("QA", "\u0100"))


def encoded(items: list[Row], tokenizer: Any = None, **changed: Any) -> list[Example]:
    given: dict[str, Any] = {"max_length": 6, "context": 100, "too_long": "refuse", "path": Path("private/x.jsonl")}
    return encode(items, tokenizer or Letters(), **(given | changed))


def test_a_row_as_long_as_allowed_is_whole() -> None:
    assert encoded([Row("Q??", "abc")]) == [Example([ord(letter) for letter in "Q??abc"], 3)]


@pytest.mark.parametrize("limits", [{"max_length": 6, "context": 100}, {"max_length": 100, "context": 6}])
def test_a_row_too_long_is_refused_by_line_with_both_limits(limits: dict[str, int]) -> None:
    with pytest.raises(Damaged) as caught:
        encoded([Row("Q", "a"), Row("Q??", "abcd")], **limits)
    bound = f"max_length is {limits['max_length']}, the model's context {limits['context']}"
    assert caught.value.message == f"line 2 of x.jsonl has 7 tokens; {bound}"
    assert 'data.too_long = "skip"' in str(caught.value.mend)


def test_a_row_too_long_is_skipped_where_that_is_agreed_and_never_cut() -> None:
    found = encoded([Row("Q??", "abcd"), Row("Q", "a")], too_long="skip")
    assert found == [Example([ord("Q"), ord("a")], 1)]


def test_data_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(Damaged, match=r"no row of x\.jsonl fits in 6 tokens"):
        encoded([Row("Q??", "abcd")] * 3, too_long="skip")


def test_a_border_inside_a_token_leaves_at_least_one_token_to_learn() -> None:
    # "!Q" + "A" is "!" and "QA": two tokens, though the prompt alone has two.
    assert encoded([Row("!Q", "A")], Greedy()) == [Example([ord("!"), 0x100], 1)]


def test_a_row_that_is_one_single_token_has_no_prompt_to_learn_from_and_is_refused_by_line() -> None:
    with pytest.raises(Damaged, match=r"line 2 of x\.jsonl") as caught:
        encoded([Row("Q", "B"), Row("Q", "A")], Greedy())
    assert caught.value.mend


def test_reading_a_row_is_reading_its_json(tmp_path: Path) -> None:
    row = rows(1)[0]
    path = write_rows(tmp_path / "new" / "x.jsonl", [row])
    assert [json.loads(line) for line in rows_bytes(read_rows(path)[0]).splitlines()] == [row]


# --- unlabelled rows


def test_rows_without_a_completion_are_read_where_that_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "auxiliary.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt": "Q :"}}\n{{"prompt": "R :", "source": "s", "label": 2}}\n')
    found, _ = read_rows(path, unlabelled=True)
    assert found[1:] == [Row("Q :", None), Row("R :", None, "2", "s")]
    assert found[0].completion is not None
    with pytest.raises(Damaged, match=r"line 2 of auxiliary\.jsonl: no completion"):
        read_rows(path)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "Q", "Completion": "A"}', "no completion"),  # a name misspelt is no unlabelled row
        ('{"prompt": "Q", "completion": ""}', "completion is not text, or is empty"),
        ('{"prompt": "Q", "completion": null}', "completion is not text, or is empty"),
        ('{"prompt": " "}', "prompt is not text, or is empty"),
        ("{}", "no prompt"),
    ],
)
def test_what_is_neither_labelled_nor_unlabelled_is_refused_naming_both(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "auxiliary.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(Damaged, match=rf"^line 2 of auxiliary\.jsonl: {found}") as caught:
        read_rows(path, unlabelled=True)
    assert '{"prompt": "...", "completion": "..."}, both not empty, or {"prompt": "..."} alone' in caught.value.message


def test_unlabelled_rows_survive_writing_and_reading(tmp_path: Path) -> None:
    made = [Row("Q", " a"), Row("R ", None)]
    (tmp_path / "x.jsonl").write_bytes(rows_bytes(made))
    assert read_rows(tmp_path / "x.jsonl", unlabelled=True)[0] == made
    assert rows_bytes(made).splitlines()[1] == b'{"prompt": "R "}'


def test_an_unlabelled_row_is_its_prompt_as_a_labelled_row_has_it(harness: Any) -> None:
    for prompt, completion in PAIRS:
        context, _ = harness._encode_pair(prompt, completion)
        found = encode_row(Row(prompt, None), harness.tokenizer)
        assert found == Example(context, len(context)), prompt
        assert (found.answer_tokens, found.distilled_positions) == (0, 1)


def test_an_unlabelled_row_must_fit_too() -> None:
    with pytest.raises(Damaged, match=r"line 1 of x\.jsonl has 7 tokens"):
        encoded([Row("Q??????", None)])
    assert encoded([Row("Q?????", None)]) == [Example([ord(letter) for letter in "Q?????"], 6)]


@pytest.mark.parametrize(("prompt", "completion"), [("Q ", " a"), ("Q", "  a"), ("Q  ", "a"), ("Q\n ", " a")])
def test_completions_after_two_spaces_are_counted(prompt: str, completion: str) -> None:
    told: list[str] = []
    rows = [Row(prompt, completion), Row("Q ", "a"), Row("Q", " a"), Row("Q\n", " a"), Row("Q  ", None)]
    warn_of_spacing(rows, lambda event: told.append(event.text))
    assert told == ["1 of 4 completions have two spaces or more before them"]


def test_rows_behind_a_link_are_read_and_a_link_to_nothing_is_told_as_such(tmp_path: Path) -> None:
    elsewhere = write_rows(tmp_path / "scratch/rows.jsonl", rows(5))
    link = tmp_path / "train.jsonl"
    link.symlink_to("scratch/rows.jsonl")
    assert read_rows(link) == read_rows(elsewhere)
    elsewhere.unlink()
    with pytest.raises(NotReady, match=r"train\.jsonl is a symbolic link to scratch/rows\.jsonl, which is not there"):
        read_rows(link)


def test_completions_without_a_space_are_counted_among_the_labelled_rows_alone() -> None:
    told: list[str] = []
    warn_of_spacing([Row("Q", "a"), Row("Q", " a"), Row("Q", None)], lambda event: told.append(event.text))
    assert told == ["1 of 2 completions begin without a space after their prompt"]
    warn_of_spacing([Row("Q", None)], lambda event: told.append(event.text))
    assert len(told) == 1
