"""The bytes that each token of a tokenizer stands for: what two vocabularies can be compared by.

A tokenizer says in its own file how its pieces become text: by GPT-2's letters for bytes, by a mark for the space, by
pieces such as <0x0A> for single bytes, or as they are. This is read from there, never guessed from a class; and it is
proven: on sample texts, the bytes of the pieces must be those of the text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stages.artefacts.vocabulary_files import MOST_TOKEN_BYTES, TOKEN_ROLES, Kind, Vocabulary
from stages.models.identity import PROBE_TEXTS, tokenizer_sha256
from stages.runtime.errors import UsageProblem

SAMPLES = (
    *PROBE_TEXTS,
    "The 3 prices: 1,299.50 and 2026-11-26\n\nline\ttab\r\n  indented  twice",
    "日本語 한국어 العربية हिन्दी Ελληνικά ß ñ €",
    "👩‍🔬 🙂🙂 – “ok”",
    " starts with a space",
)
"""Texts that show how pieces are joined: marks of spaces, digits, line ends, characters of two to four bytes."""

BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
REFUSAL = "take a model whose tokenizer writes each byte of a text, as byte-level BPE and SentencePiece do"
OWN_WORDS = 50
AS_THEY_ARE = {"Fuse", "Strip"}
"""Decoders that change no piece. What Strip takes away, the space before the first word, is seen in each text."""


def vocabulary_of(tokenizer: Any, rows: int, whose: str) -> Vocabulary:
    """The vocabulary of a tokenizer whose model has so many token ids. whose: "the SLM".

    Raises UsageProblem for a tokenizer whose pieces cannot be joined to the bytes of a text.
    """
    where = tokenizer.name_or_path
    if not getattr(tokenizer, "is_fast", False):
        message = f"{whose}'s tokenizer has no tokenizer.json, which says how its pieces become text"
        raise UsageProblem(message, where=where, mend="convert it to a fast tokenizer of transformers")
    own = tokenizer.backend_tokenizer.decoder
    decoder = None if own is None else json.loads(own.__getstate__())  # as tokenizer.json has it
    try:
        as_bytes, takes_single_bytes = _joining(decoder)
    except _UnknownError as error:
        message = f"{whose}'s tokenizer cannot be aligned: its pieces become text by {error}, which loses bytes"
        raise UsageProblem(message, where=where, mend=REFUSAL) from None
    roles = {name: index for name in TOKEN_ROLES if (index := getattr(tokenizer, f"{name}_token_id")) is not None}
    tokens = [(Kind.NOTHING, b"")] * rows
    texts: set[bytes] = set()
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    is_byte_level = _is_byte_level(decoder)
    for piece, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        # An added token stands in a text as it is written; where the space has a mark, the mark in it is one.
        found = piece.encode() if index in added and is_byte_level else as_bytes(piece)
        if index in roles.values():
            tokens[index] = Kind.SPECIAL, b""
        elif takes_single_bytes and BYTE_PIECE.fullmatch(piece):
            tokens[index] = Kind.BYTE, found
        elif added.get(index) or found in texts or len(found) > MOST_TOKEN_BYTES:
            tokens[index] = Kind.SPECIAL, found[:MOST_TOKEN_BYTES]  # of one text's tokens, the first is its own
        elif found:
            tokens[index] = Kind.TEXT, found
            texts.add(found)
    vocabulary = Vocabulary.of(tokens, roles, tokenizer_sha256(tokenizer))
    for text in (*SAMPLES, _own_words(vocabulary)):
        _prove(vocabulary, tokenizer, text, whose)
    return vocabulary


def joined(vocabulary: Vocabulary, ids: Sequence[int]) -> bytes:
    """The bytes that tokens stand for together."""
    tokens = vocabulary.tokens
    return b"".join(tokens[index] for index in ids)


def ends_of(vocabulary: Vocabulary, ids: Sequence[int], text: str) -> np.ndarray | None:
    """How many bytes of the text have been read after each token, int32 [tokens]; None if they do not make the text.

    First, end and padding tokens have no bytes. A space before the first word, which a tokenizer adds by itself, does
    not count.
    """
    found, whole = joined(vocabulary, ids), text.encode()
    if found not in (whole, b" " + whole):
        return None
    offsets = vocabulary.offsets
    lengths = (offsets[1:] - offsets[:-1])[np.array(ids, np.int64)]
    ends: np.ndarray = np.maximum(np.cumsum(lengths) - (len(found) - len(whole)), 0).astype(np.int32)
    return ends


class _UnknownError(Exception):
    """A way of joining pieces that cannot be followed, by name."""


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """A decoder's parts, in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for one in decoder["decoders"] for step in _steps(one)]
    return [decoder]


def _is_byte_level(decoder: Any) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(decoder))


def _joining(decoder: Any) -> tuple[Callable[[str], bytes], bool]:
    """How a piece becomes bytes, by the tokenizer's decoder; and whether pieces such as <0x0A> are single bytes."""
    replaced: list[tuple[str, str]] = []
    steps = _steps(decoder)
    for step in steps:
        match step["type"]:
            case "Replace" if "String" in step["pattern"]:
                replaced.append((step["pattern"]["String"], step["content"]))
            case "Metaspace":
                replaced.append((step["replacement"], " "))
            case "ByteLevel" | "ByteFallback":
                pass
            case other if other not in AS_THEY_ARE:
                raise _UnknownError(other)
    takes_single_bytes = any(step["type"] == "ByteFallback" for step in steps)
    letters = {letter: byte for byte, letter in enumerate(_letters())} if _is_byte_level(decoder) else None

    def as_bytes(piece: str) -> bytes:
        if takes_single_bytes and (found := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        for mark, text in replaced:
            piece = piece.replace(mark, text)
        if letters and all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece)
        return piece.encode(errors="surrogatepass")

    return as_bytes, takes_single_bytes


def _letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]


def _own_words(vocabulary: Vocabulary) -> str:
    """A text of words that it knows: one that knows few of other texts shows on this whether it keeps spaces."""
    known = (token.decode(errors="ignore").strip() for token in vocabulary.ids)
    return " ".join(itertools.islice((word for word in known if word.isalpha()), OWN_WORDS))


def _prove(vocabulary: Vocabulary, tokenizer: Any, text: str, whose: str) -> None:
    """Raise UsageProblem unless the bytes of a text's pieces are the text's; where a piece is unknown, those around it.

    A space before the first word, which the tokenizer adds by itself, may be there.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    unknown = vocabulary.roles.get("unk")
    parts: list[list[int]] = [[]]
    for index in ids:
        if index == unknown:
            parts.append([])
        else:
            parts[-1].append(index)
    pattern = b".+?".join(re.escape(joined(vocabulary, part)) for part in parts)
    whole = text.encode()
    if not any(re.fullmatch(pattern, one, re.DOTALL) for one in (whole, b" " + whole)):
        found = joined(vocabulary, ids).decode(errors="replace")
        message = f"{whose}'s tokenizer cannot be aligned: of {text[:60]!r} its pieces make {found[:60]!r}"
        raise UsageProblem(message, where=tokenizer.name_or_path, mend=REFUSAL)
