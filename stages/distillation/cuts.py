"""How a tokenizer cuts the public rows, as a file: a party makes it once, and others need none of its tokenizer.

One safetensors file. Its metadata holds one key, "cuts", whose value is JSON: FORMAT, and the sha256 of the rows' file
and of the vocabulary file beside it. Its tensors:

    positions   int32   [rows]   how many tokens of its completion each public row has; 0: the party leaves it out
    ends        int32   [n]      at each of them, together n, the bytes of prompt and completion read before it

It may come from another party: it is read strictly, without torch.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.tensor_files import bad, read_header, told_in
from stages.artefacts.vocabulary_files import Vocabulary
from stages.data.examples import Example
from stages.data.rows import Row

if TYPE_CHECKING:
    from stages.distillation.alignment_figures import Read

FORMAT = "fedcollm-cuts/1"


@dataclass(frozen=True)
class Cuts:
    """The contents of such a file."""

    data_sha256: str
    vocabulary_sha256: str
    positions: np.ndarray
    ends: np.ndarray

    @functools.cached_property
    def firsts(self) -> np.ndarray:
        """Where each row's positions begin in ends; last, how many there are: [rows + 1]."""
        firsts: np.ndarray = np.concatenate([[0], np.cumsum(self.positions, dtype=np.int64)])
        return firsts

    def of_row(self, row: int) -> np.ndarray:
        """A row's ends."""
        first, end = self.firsts[row : row + 2]
        return self.ends[first:end]


def cuts_of(rows: Sequence[Row], examples: Sequence[Example | None], vocabulary: Vocabulary, data_sha256: str) -> Cuts:
    """The cuts of a party's own tokenizer. A row that it does not give back byte for byte is left out.

    examples: the rows as its tokens; None for one that it leaves out.
    """
    from stages.models.token_bytes import ends_of

    positions, ends = np.zeros(len(rows), np.int32), [np.empty(0, np.int32)]
    for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
        if example is None:
            continue
        found = ends_of(vocabulary, example.input_ids, row.prompt + (row.completion or ""))
        if found is not None:
            ends.append(found[example.prompt_tokens - 1 : -1])
            positions[place] = example.answer_tokens
    return Cuts(data_sha256, vocabulary.sha256, positions, np.concatenate(ends))


def cuts_bytes(cuts: Cuts) -> bytes:
    """The file, byte for byte the same for the same contents."""
    told = {"format": FORMAT, "data_sha256": cuts.data_sha256, "vocabulary_sha256": cuts.vocabulary_sha256}
    tensors = {"positions": cuts.positions.astype(np.int32), "ends": cuts.ends.astype(np.int32)}
    return safetensors.numpy.save(tensors, metadata={"cuts": json.dumps(told, sort_keys=True)})


def parse_cuts(content: bytes, path: Path, vocabulary: Vocabulary) -> Cuts:
    """The contents of such a file. Raises Damaged unless it is of this form and of this vocabulary.

    Whether it can be true of the rows is for check_cuts.
    """
    header = read_header(content, path)
    told: dict[str, Any] = told_in(header, "cuts")
    if told.keys() != {"format", "data_sha256", "vocabulary_sha256"} or told["format"] != FORMAT:
        raise bad(path, f"does not say that it is a {FORMAT}")
    if not isinstance(told["data_sha256"], str) or not re.fullmatch("[0-9a-f]{64}", told["data_sha256"]):
        raise bad(path, "does not say of which rows it is")
    if told["vocabulary_sha256"] != vocabulary.sha256:
        raise bad(path, "is of another vocabulary than the one beside it")
    shapes = {name: (entry["dtype"], len(entry["shape"])) for name, entry in header.items()}
    if shapes != {"positions": ("I32", 1), "ends": ("I32", 1)}:
        raise bad(path, "has other arrays than cuts")
    try:
        cuts = Cuts(told["data_sha256"], vocabulary.sha256, **safetensors.numpy.load(content))
    except safetensors.SafetensorError as error:
        raise bad(path, f"is not a sound safetensors file: {error}") from error
    if (cuts.positions < 0).any() or cuts.positions.sum(dtype=np.int64) != len(cuts.ends):
        raise bad(path, f"its rows have {cuts.positions.sum(dtype=np.int64)} positions, {len(cuts.ends)} are there")
    if not len(cuts.ends):
        raise bad(path, "leaves out every row")
    is_wrong = cuts.ends < 0
    is_wrong[1:] |= cuts.ends[1:] < cuts.ends[:-1]
    begins = cuts.firsts[:-1][cuts.positions > 0]
    is_wrong[begins] = cuts.ends[begins] < 0
    if is_wrong.any():
        number = np.searchsorted(cuts.firsts, is_wrong.argmax(), side="right")
        raise bad(path, f"cuts row {number} at bytes that it has not, or not in order")
    return cuts


def check_cuts(cuts: Cuts, path: Path, rows: Sequence[Row]) -> None:
    """Raise Damaged for cuts that these rows cannot have."""
    if len(cuts.positions) != len(rows):
        raise bad(path, f"has the cuts of {len(cuts.positions)} rows, there are {len(rows)}")
    lengths = [len((row.prompt + (row.completion or "")).encode()) for row in rows]
    spans = itertools.pairwise(cuts.firsts.tolist())
    for number, (row, length, (first, end)) in enumerate(zip(rows, lengths, spans, strict=True), 1):
        ends = cuts.ends[first:end]
        if len(ends) and (row.completion is None or len(ends) > length + 1):
            raise bad(path, f"cuts row {number} into {len(ends)} tokens, which cannot be")
        if len(ends) and ends[-1] > length:
            raise bad(path, f"cuts row {number} at bytes that it has not")


def reads(cuts: Cuts, vocabulary: Vocabulary, rows: Sequence[Row]) -> list[Read | None]:
    """Each row as its party reads it: cuts, and the token that follows each; -1 where no token has those bytes."""
    from stages.distillation.alignment_figures import Read

    found: list[Read | None] = []
    for row, (first, end) in zip(rows, itertools.pairwise(cuts.firsts.tolist()), strict=True):
        ends = cuts.ends[first:end]
        if not len(ends):
            found.append(None)
            continue
        text = (row.prompt + (row.completion or "")).encode()
        borders = [*ends.tolist(), len(text)]
        following = [vocabulary.ids.get(text[one:other], -1) for one, other in itertools.pairwise(borders)]
        found.append(Read(ends, np.array(following, np.int64)))
    return found
