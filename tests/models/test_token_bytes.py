"""token_bytes: each token of every kind of tokenizer as the bytes it stands for, proven on texts, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

import vocabularies
from stages.artefacts.vocabulary_files import Kind, Vocabulary
from stages.models.token_bytes import ends_of, joined, vocabulary_of
from stages.runtime.errors import UsageProblem

KINDS: dict[str, Callable[[], Any]] = {
    "GPT-2": vocabularies.byte_level,
    "GPT-2, space first": lambda: vocabularies.byte_level(prefix=True),
    "Llama 3": lambda: vocabularies.byte_level(llama_3=True),
    "Llama 2": vocabularies.sentence_piece,
    "Gemma": lambda: vocabularies.sentence_piece(dummy=False),
    "T5": vocabularies.metaspace,
    "characters": vocabularies.characters,
    "bytes": vocabularies.single_bytes,
}
KNOWN = ["the cat sat", "a whale\nAnswer: 1997", " a mat", "  two  spaces"]
"""Texts whose characters all of them know."""


def of(tokenizer: Any, rows: int | None = None) -> Vocabulary:
    return vocabulary_of(tokenizer, rows or len(tokenizer), "the SLM")


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_text_s_tokens_are_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    found = of(tokenizer)
    for text in KNOWN:
        ids = tokenizer.encode(text, add_special_tokens=False)
        unknown = tokenizer.unk_token_id in ids
        assert not unknown or kind == "T5"
        assert unknown or joined(found, ids) in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("kind", ["GPT-2", "Llama 3", "Llama 2", "Gemma", "bytes"])
def test_what_it_has_no_word_for_is_there_byte_by_byte(kind: str) -> None:
    tokenizer = KINDS[kind]()
    text = "한국어 🙂 ﷽\x00\x7f"
    ends = ends_of(of(tokenizer), tokenizer.encode(text, add_special_tokens=False), text)
    assert ends is not None
    assert ends[-1] == len(text.encode()) == 3 * 3 + 1 + 4 + 1 + 3 + 2


def test_letters_marks_and_byte_tokens_are_read_as_what_they_stand_for() -> None:
    tokenizer = vocabularies.sentence_piece()
    found, ids = of(tokenizer), tokenizer.get_vocab()
    assert found.tokens[ids["<0x0A>"]] == b"\n"
    assert found.kinds[ids["<0x0A>"]] == Kind.BYTE
    assert found.tokens[ids["▁the"]] == b" the"
    # GPT-2's letters: Ġ is the space, Ċ the line end, and the two bytes of é are Ã and ©.
    plain = of(vocabularies.byte_level())
    ids = vocabularies.byte_level().get_vocab()
    assert [plain.tokens[ids[letter]] for letter in "ĠĊÃ©"] == [b" ", b"\n", b"\xc3", b"\xa9"]


def test_a_text_that_is_also_a_byte_is_the_one_that_texts_have() -> None:
    tokenizer = vocabularies.sentence_piece()
    found, ids = of(tokenizer), tokenizer.get_vocab()
    assert found.tokens[ids["a"]] == found.tokens[ids["<0x61>"]] == b"a"
    assert found.ids[b"a"] == ids["a"] == tokenizer.encode("ba", add_special_tokens=False)[-1]


def test_first_end_and_unknown_tokens_have_no_bytes_and_padded_rows_no_token() -> None:
    tokenizer = vocabularies.sentence_piece(first=True)
    found = of(tokenizer, len(tokenizer) + 7)
    assert found.roles == {"bos": 1, "eos": 2, "unk": 0}
    assert [found.tokens[index] for index in (0, 1, 2)] == [b""] * 3
    assert found.rows == len(tokenizer) + 7
    assert found.kinds[-7:].tolist() == [Kind.NOTHING] * 7
    ends = ends_of(found, tokenizer.encode("the cat"), "the cat")
    assert ends is not None
    assert (ends[0], ends[-1]) == (0, 7), "the first token has read nothing, nor does the space before the text count"


def test_an_added_token_is_the_text_it_is_spelled_as() -> None:
    tokenizer = vocabularies.byte_level()
    tokenizer.add_tokens(["é!"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    found, ids = of(tokenizer), tokenizer.get_vocab()
    assert (found.kinds[ids["é!"]], found.tokens[ids["é!"]]) == (Kind.TEXT, "é!".encode())
    assert (found.kinds[ids["<|user|>"]], found.tokens[ids["<|user|>"]]) == (Kind.SPECIAL, b"<|user|>")
    text = "a<|user|> caf é!"
    ends = ends_of(found, tokenizer.encode(text, add_special_tokens=False), text)
    assert ends is not None
    assert ends[-1] == len(text.encode())


def test_tokens_that_do_not_make_a_text_have_no_ends() -> None:
    tokenizer = vocabularies.characters()
    assert ends_of(of(tokenizer), tokenizer.encode("the 한 cat"), "the 한 cat") is None


@pytest.mark.parametrize("name", ["slm-1", "slm-2", "slm-3", "llm"])
def test_a_saved_model_s_tokenizer_is_read_as_the_one_in_memory_and_knows_all_of_a_row(
    name: str, unlike_models: Path
) -> None:
    config = AutoConfig.from_pretrained(unlike_models / name)
    tokenizer = AutoTokenizer.from_pretrained(unlike_models / name)
    text = "Q : what colour is the big star 2 ? A : green"
    ids = tokenizer.encode(text)
    ends = ends_of(of(tokenizer, config.vocab_size), ids, text)
    assert ends is not None
    assert (ends[-1], tokenizer.unk_token_id in ids) == (len(text), False)
    # Characters each end a byte later; what Llama 2 reads begins with <s>, which has read nothing.
    assert len(set(ends.tolist())) == (len(text) if name == "slm-1" else len(ids))
    assert (ends[0] == 0) == (name == "slm-3")


def test_words_without_spaces_are_refused_though_no_sample_is_known(base_models: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_models / "slm")
    with pytest.raises(UsageProblem, match="the SLM's tokenizer cannot be aligned"):
        of(tokenizer)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (vocabularies.word_piece, "its pieces become text by WordPiece, which loses bytes"),
        (vocabularies.words, "its pieces make 'Question:Which"),
        (vocabularies.in_lower_case, "its pieces make 'question: which"),
    ],
    ids=["BERT", "words", "lower case"],
)
def test_a_tokenizer_whose_pieces_are_not_the_text_is_refused_by_name(make: Callable[[], Any], said: str) -> None:
    tokenizer = make()
    with pytest.raises(UsageProblem, match="the SLM's tokenizer cannot be aligned") as caught:
        of(tokenizer)
    assert said in caught.value.message
    assert "byte-level BPE" in str(caught.value.mend)
