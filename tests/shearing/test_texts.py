"""Text as rows: nothing lost, nothing twice, the last part kept out."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import vocabularies
from builders import rows, write_rows
from stages.runtime.errors import Damaged, NotReady, UsageProblem
from stages.shearing.texts import as_rows, evenly, read_auxiliary, read_texts


def text_of(folder: Path, paragraphs: int) -> Path:
    path = folder / "text.txt"
    path.write_text("\n\n".join(f"red blue green {i % 4}" for i in range(paragraphs)))
    return path


def test_rows_are_the_text_in_order_and_the_last_twentieth_is_kept_out(base_models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_models / "llm")
    found = as_rows(read_texts([text_of(tmp_path, 100)]), tokenizer, 8)
    assert (len(found.trained), len(found.kept_out)) == (48, 2)  # 100 paragraphs of 4 tokens are 50 rows of 8
    expected = tokenizer.encode(" ".join(f"red blue green {i % 4}" for i in range(100)), add_special_tokens=False)
    assert [token for row in found.trained + found.kept_out for token in row] == expected


def test_a_text_from_another_system_is_the_same_text(tmp_path: Path) -> None:
    found = read_texts([text_of(tmp_path, 3)])
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "text.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert read_texts([elsewhere]).paragraphs == found.paragraphs == [f"red blue green {i}" for i in range(3)]


def test_each_row_begins_with_what_the_tokenizer_puts_first(tmp_path: Path) -> None:
    texts = [*vocabularies.TEXTS, "red blue green 0123"]
    tokenizer = vocabularies.sentence_piece(300, first=True, texts=texts)
    found = as_rows(read_texts([text_of(tmp_path, 100)]), tokenizer, 16)
    assert tokenizer.bos_token_id is not None
    for row in found.trained + found.kept_out:
        assert len(row) == 16
        assert row[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in row[1:]


def test_auxiliary_rows_are_prompts_with_their_completions(base_models: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "auxiliary.jsonl", [*rows(12), {"prompt": "Q : a circle"}])
    text = read_auxiliary(path)
    assert text.paragraphs[0] == "Q : what colour is the big square 0 ? A : red"
    assert text.paragraphs[-1] == "Q : a circle"


def test_a_sample_is_from_all_over() -> None:
    assert evenly([[i] for i in range(10)], 4) == [[0], [2], [5], [7]]
    assert evenly([[1], [2]], 4) == [[1], [2]]


def test_a_text_that_is_too_short_is_refused_with_its_length(base_models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_models / "llm")
    text = read_texts([text_of(tmp_path, 7)])
    with pytest.raises(UsageProblem, match="too short: 28 tokens; 4 rows of 8 are needed") as refused:
        as_rows(text, tokenizer, 8)
    assert "--length" in str(refused.value.mend)
    assert refused.value.where == tmp_path / "text.txt"
    assert len(as_rows(text, tokenizer, 7).trained) == 3


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"absent\.txt is not there"):
        read_texts([tmp_path / "absent.txt"])
    with pytest.raises(Damaged, match="not a plain file"):
        read_texts([tmp_path])
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(Damaged, match=r"latin\.txt is no text in UTF-8: .* at byte 2"):
        read_texts([tmp_path / "latin.txt"])
