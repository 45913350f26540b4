"""vocabulary_files: a vocabulary that another party sent is read strictly: one way to write each, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from stages.artefacts import vocabulary_files
from stages.artefacts.vocabulary_files import Kind, Vocabulary, parse_vocabulary, read_vocabulary, vocabulary_bytes
from stages.runtime.errors import Damaged
from vocabularies import vocabulary

WHERE = Path("vocabulary.safetensors")
TOKENS = [
    (Kind.SPECIAL, b""),
    b"a",
    b" the",
    "é".encode(),
    (Kind.BYTE, b"\n"),
    (Kind.SPECIAL, b"<x>"),
    (Kind.NOTHING, b""),
]


def whole() -> Vocabulary:
    return vocabulary(TOKENS, bos=0, eos=0)


def test_a_vocabulary_comes_back_as_it_was_written(tmp_path: Path) -> None:
    content = vocabulary_bytes(whole())
    (tmp_path / "v").write_bytes(content)
    found = read_vocabulary(tmp_path / "v")
    assert found.tokens == [b"", b"a", b" the", b"\xc3\xa9", b"\n", b"<x>", b""]
    assert found.roles == {"bos": 0, "eos": 0}
    assert found.kinds.tolist() == [3, 1, 1, 1, 2, 3, 0]
    assert found.sha256 == whole().sha256
    assert vocabulary_bytes(found) == content


def rewritten(change: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> bytes:
    """The file after a change of its arrays and of what it says, written soundly."""
    content = vocabulary_bytes(whole())
    arrays = {name: array.copy() for name, array in safetensors.numpy.load(content).items()}
    length = int.from_bytes(content[:8], "little")
    told = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["vocabulary"])
    change(arrays, told)
    return safetensors.numpy.save(arrays, metadata={"vocabulary": json.dumps(told, sort_keys=True)})


def test_rewriting_without_a_change_gives_the_file() -> None:
    assert rewritten(lambda arrays, told: None) == vocabulary_bytes(whole())


def setting(name: str, place: int, value: int) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda arrays, told: arrays[name].__setitem__(place, value)


def telling(**said: Any) -> Callable[[dict[str, np.ndarray], dict[str, Any]], None]:
    return lambda arrays, told: told.update(said)


def without_offsets(arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    del arrays["offsets"]


def of_wide_offsets(arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    arrays["offsets"] = arrays["offsets"].astype(np.int64)


def with_more(arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    arrays["more"] = np.zeros(1, np.uint8)


def with_a_text_twice(arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    arrays["kinds"][:] = [3, 1, 1, 1, 1, 1, 0]
    arrays["content"] = np.frombuffer(b"abbcdd", np.uint8)
    arrays["offsets"][:] = [0, 0, 1, 2, 3, 4, 6, 6]


def with_a_byte_twice(arrays: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    arrays["kinds"][:] = [3, 2, 2, 1, 1, 1, 0]
    arrays["content"] = np.frombuffer(b"aabbcddd", np.uint8)
    arrays["offsets"][:] = [0, 0, 1, 2, 4, 5, 8, 8]


BAD = {
    "offsets that fall": (setting("offsets", 2, 9), "do not lie one after the other"),
    "a first offset": (setting("offsets", 0, 1), "do not lie one after the other"),
    "a last offset": (setting("offsets", -1, 99), "do not lie one after the other"),
    "an offset below zero": (setting("offsets", 1, -1), "do not lie one after the other"),
    "an unknown kind": (setting("kinds", 1, 4), "unknown kind 4"),
    "a text without bytes": (setting("kinds", 6, 1), "another length than its kind"),
    "padding with bytes": (setting("kinds", 2, 0), "another length than its kind"),
    "a byte of two": (setting("kinds", 3, 2), "another length than its kind"),
    "an end that is text": (telling(roles={"eos": 1}), "names as its eos token one that is none"),
    "an end with bytes": (telling(roles={"eos": 5}), "names as its eos token one that is none"),
    "an end beyond": (telling(roles={"eos": 7}), "names as its eos token one that is none"),
    "an end below": (telling(roles={"eos": -1}), "roles in an unknown way"),
    "an end that is true": (telling(roles={"eos": True}), "roles in an unknown way"),
    "an unknown role": (telling(roles={"mask": 0}), "a role that there is not"),
    "another format": (telling(format="fedcollm-vocabulary/2"), "does not say that it is a fedcollm-vocabulary/1"),
    "no digest": (telling(tokenizer_sha256="x"), "does not say that it is"),
    "more told": (telling(more=1), "does not say that it is"),
    "no offsets": (without_offsets, "other arrays"),
    "wide offsets": (of_wide_offsets, "other arrays"),
    "another array": (with_more, "other arrays"),
    "a text twice": (with_a_text_twice, "a text twice"),
    "a byte twice": (with_a_byte_twice, "a single byte twice"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_no_tokenizer_has_is_damage_by_name(what: str) -> None:
    change, said = BAD[what]
    with pytest.raises(Damaged, match=said):
        parse_vocabulary(rewritten(change), WHERE)


def test_a_file_cut_anywhere_or_longer_is_damaged() -> None:
    content = vocabulary_bytes(whole())
    for end in [*range(0, len(content), 7), len(content) - 1]:
        with pytest.raises(Damaged):
            parse_vocabulary(content[:end], WHERE)
    with pytest.raises(Damaged):
        parse_vocabulary(content + b"\0", WHERE)


def test_the_same_contents_in_another_spelling_are_refused() -> None:
    arrays = safetensors.numpy.load(vocabulary_bytes(whole()))
    told = {"format": vocabulary_files.FORMAT, "tokenizer_sha256": "0" * 64, "roles": {"eos": 0, "bos": 0}}
    content = safetensors.numpy.save(arrays, metadata={"vocabulary": json.dumps(told, indent=1)})
    with pytest.raises(Damaged, match="one way to write each"):
        parse_vocabulary(content, WHERE)


def test_absurd_sizes_are_refused_from_the_header_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = vocabulary_bytes(whole())
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary_files, "MOST_TOKENS", 6)
        with pytest.raises(Damaged, match=r"kinds of shape \[7\], at most 6"):
            parse_vocabulary(content, WHERE)
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary_files, "MOST_TOKEN_BYTES", 3)
        with pytest.raises(Damaged, match="a token of 4 bytes, at most 3"):
            parse_vocabulary(content, WHERE)
    monkeypatch.setattr(vocabulary_files, "LARGEST_VOCABULARY_BYTES", len(content) - 1)
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(Damaged, match="at most"):
        read_vocabulary(tmp_path / "v")
