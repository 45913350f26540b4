"""A vocabulary as a file: the bytes that each token id stands for, so that who receives it needs no tokenizer.

One safetensors file. Its metadata holds one key, "vocabulary", whose value is JSON: FORMAT, the tokenizer's sha256, and
the ids of the tokens that have a role. Its tensors:

    kinds     uint8   [rows]        what each id is: see Kind
    offsets   int32   [rows + 1]    where the bytes of each id begin in content; last, how many there are
    content   uint8   [bytes]       the bytes of all ids, one after the other

It may come from another party: it is read strictly, with bounds of its own, and equal vocabularies are equal files.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.sizes import LARGEST_VOCABULARY_BYTES, MOST_TOKENS, MOST_TOKENS_BYTES
from stages.artefacts.tensor_files import bad, read_header, told_in
from stages.files import reading

FORMAT = "fedcollm-vocabulary/1"
TOKEN_ROLES = ("bos", "eos", "pad", "unk")
MOST_TOKEN_BYTES = 1 << 12
"""Of one token. The longest of known vocabularies have some 250: runs of spaces."""


class Kind(IntEnum):
    """What a token id is."""

    NOTHING = 0
    """A row without a token, as padding of the embedding has."""
    TEXT = 1
    BYTE = 2
    """A single byte, which the tokenizer takes only where it has no text for it."""
    SPECIAL = 3
    """Marks something, and stands for no text unless it is spelled out. One with a role has no bytes."""


@dataclass(frozen=True)
class Vocabulary:
    """The contents of such a file. roles: ids of first, end, padding and unknown token, by name, where there is one."""

    tokenizer_sha256: str
    roles: Mapping[str, int]
    kinds: np.ndarray
    offsets: np.ndarray
    content: np.ndarray

    @staticmethod
    def of(tokens: list[tuple[Kind, bytes]], roles: Mapping[str, int], tokenizer_sha256: str) -> Vocabulary:
        """From what each id is and its bytes, in the order of ids."""
        kinds = np.array([kind for kind, _ in tokens], np.uint8)
        offsets = np.cumsum([0, *(len(token) for _, token in tokens)]).astype(np.int32)
        content = np.frombuffer(b"".join(token for _, token in tokens), np.uint8)
        return Vocabulary(tokenizer_sha256, dict(sorted(roles.items())), kinds, offsets, content)

    @property
    def rows(self) -> int:
        """How many token ids there are, padding included."""
        return len(self.kinds)

    @functools.cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of each id; none for padding and roles."""
        content, offsets = self.content.tobytes(), self.offsets.tolist()
        return [content[start:end] for start, end in itertools.pairwise(offsets)]

    @functools.cached_property
    def ids(self) -> dict[bytes, int]:
        """By its bytes, the id that a text has for them: of several, text before single bytes, then the smallest."""
        found: dict[bytes, int] = {}
        for kind in (Kind.TEXT, Kind.BYTE):
            for index in np.flatnonzero(self.kinds == kind).tolist():
                found.setdefault(self.tokens[index], index)
        return found

    @functools.cached_property
    def sha256(self) -> str:
        """Of its file."""
        return reading.sha256(vocabulary_bytes(self))


def vocabulary_bytes(vocabulary: Vocabulary) -> bytes:
    """The file, byte for byte the same for the same contents."""
    told = {
        "format": FORMAT,
        "tokenizer_sha256": vocabulary.tokenizer_sha256,
        "roles": dict(vocabulary.roles),
    }
    tensors = {"kinds": vocabulary.kinds, "offsets": vocabulary.offsets, "content": vocabulary.content}
    return safetensors.numpy.save(tensors, metadata={"vocabulary": json.dumps(told, sort_keys=True)})


def parse_vocabulary(content: bytes, path: Path) -> Vocabulary:
    """The contents of such a file. Raises Damaged unless it is exactly of this form, and of no absurd size."""
    header = read_header(content, path)
    digest, roles = _told(told_in(header, "vocabulary"), path)
    rows, size = _size(header, "kinds", path, MOST_TOKENS), _size(header, "content", path, MOST_TOKENS_BYTES)
    expected = {"kinds": ("U8", [rows]), "offsets": ("I32", [rows + 1]), "content": ("U8", [size])}
    if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != expected:
        raise bad(path, "has other arrays than a vocabulary")
    try:
        vocabulary = Vocabulary(digest, roles, **safetensors.numpy.load(content))
    except safetensors.SafetensorError as error:
        raise bad(path, f"is not a sound safetensors file: {error}") from error
    _check(vocabulary, path)
    if vocabulary_bytes(vocabulary) != content:
        raise bad(path, "is not written as a vocabulary is: there is one way to write each")
    return vocabulary


def read_vocabulary(path: Path) -> Vocabulary:
    """Read such a file. Raises as parse_vocabulary does, NotReady if it is absent."""
    return parse_vocabulary(reading.read(path, limit_bytes=LARGEST_VOCABULARY_BYTES), path)


def _check(vocabulary: Vocabulary, path: Path) -> None:
    """Raise Damaged for what no tokenizer has."""
    kinds, offsets, rows = vocabulary.kinds, vocabulary.offsets, vocabulary.rows
    lengths = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or offsets[-1] != len(vocabulary.content) or (lengths < 0).any():
        raise bad(path, "has tokens that do not lie one after the other")
    if lengths.max() > MOST_TOKEN_BYTES:
        raise bad(path, f"has a token of {lengths.max()} bytes, at most {MOST_TOKEN_BYTES} are expected")
    if kinds.max() > max(Kind):
        raise bad(path, f"has a token of the unknown kind {kinds.max()}")
    wrong = (kinds == Kind.NOTHING) & (lengths > 0) | (kinds == Kind.TEXT) & (lengths == 0)
    if (wrong | (kinds == Kind.BYTE) & (lengths != 1)).any():
        raise bad(path, "has a token of another length than its kind has")
    for name, index in vocabulary.roles.items():
        if index >= rows or kinds[index] != Kind.SPECIAL or lengths[index]:
            raise bad(path, f"names as its {name} token one that is none")
    single = [vocabulary.tokens[index] for index in np.flatnonzero(kinds == Kind.BYTE)]
    if len(set(single)) < len(single):
        raise bad(path, "has a single byte twice")
    text = [vocabulary.tokens[index] for index in np.flatnonzero(kinds == Kind.TEXT)]
    if len(set(text)) < len(text):
        raise bad(path, "has a text twice")


def _told(told: dict[str, Any], path: Path) -> tuple[str, dict[str, int]]:
    """The tokenizer's sha256 and the roles, as the file says."""
    digest, roles = told.get("tokenizer_sha256"), told.get("roles")
    is_ours = told.keys() == {"format", "tokenizer_sha256", "roles"} and told["format"] == FORMAT
    if not is_ours or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise bad(path, f"does not say that it is a {FORMAT}")
    if not isinstance(roles, dict) or not all(type(index) is int and index >= 0 for index in roles.values()):
        raise bad(path, "names roles in an unknown way")
    if not set(roles) <= set(TOKEN_ROLES):
        raise bad(path, "names a role that there is not")
    return digest, roles


def _size(header: dict[str, Any], name: str, path: Path, most: int) -> int:
    """The length of a list that must be there, and no longer than this."""
    shape = header.get(name, {}).get("shape", [])
    if len(shape) != 1 or not 1 <= shape[0] <= most:
        raise bad(path, f"has {name} of shape {shape}, at most {most} are expected")
    return int(shape[0])
