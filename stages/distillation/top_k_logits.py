"""A captured teacher as a file: what a model says at every distilled position of the auxiliary data, in short.

One safetensors file, which stays at the server. Its metadata holds one key, "capture", whose value is JSON: FORMAT and
the fields of Source. Its tensors:

    positions           int32   [rows]            how many distilled positions each row has: together n
    tokens              int32   [n, k]            the k likeliest tokens there, ids in rising order
    log_probabilities   float32 [n, k + 1]        theirs in nats, at the distillation's temperature; last, that of all
                                                  other tokens together, which is left out where k is the vocabulary
    confidence          float32 [n]               the probability of the likeliest token, at temperature 1
    losses              float64 [rows]            where rows are selected: -log p of the row's completion, in nats;
                                                  NaN for an unlabelled row
    chances             float32 [n]               for FedMKT: log p of the completion's own token

Written and read strictly, as adapters are, without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.tensor_files import read_header, told_in
from stages.data.examples import Example
from stages.runtime.errors import BadNumbers, Damaged

FORMAT = "fedcollm-capture/1"
AGAIN = "capture again with --overwrite"
OFF_ONE = 1e-3
"""How far the probabilities of one position may be off 1 together: float32 rounds, over a whole vocabulary."""


@dataclass(frozen=True)
class Source:
    """What a capture was made from and how: another one of these is another capture.

    data_sha256: of the auxiliary data. rows_sha256: of those rows as tokens. vocabulary: how many ids the models share.
    """

    data_sha256: str
    rows_sha256: str
    temperature: float
    vocabulary: int
    top_k: int


@dataclass(frozen=True)
class Captured:
    """The contents of such a file."""

    source: Source
    positions: np.ndarray
    tokens: np.ndarray
    log_probabilities: np.ndarray
    confidence: np.ndarray
    losses: np.ndarray | None = None
    chances: np.ndarray | None = None

    @property
    def firsts(self) -> np.ndarray:
        """Where each row's positions begin, [rows]."""
        firsts: np.ndarray = np.cumsum(self.positions, dtype=np.int64) - self.positions
        return firsts

    @property
    def kept(self) -> np.ndarray:
        """The probability that the k tokens have together, at each position."""
        k = self.tokens.shape[1]
        kept: np.ndarray = np.exp(self.log_probabilities[:, :k]).sum(axis=1)
        return kept


def rows_sha256(examples: Sequence[Example]) -> str:
    """The digest of rows as tokens."""
    whole = hashlib.sha256()
    for example in examples:
        ids = [len(example.input_ids), example.prompt_tokens, *example.input_ids]
        ids += [place for gap in example.gaps for place in gap]
        whole.update(np.array(ids, dtype="<i8").tobytes())
    return whole.hexdigest()


def largest_bytes(rows: int, positions: int, k: int) -> int:
    """The most that a capture of so many rows can have; its header takes less than is counted here."""
    return 4096 + 12 * rows + positions * (8 * k + 8)


def capture_bytes(captured: Captured) -> bytes:
    """The file, byte for byte the same for the same contents."""
    told = json.dumps({"format": FORMAT, **asdict(captured.source)}, sort_keys=True)
    tensors: dict[str, np.ndarray] = {
        "positions": captured.positions.astype(np.int32),
        "tokens": captured.tokens.astype(np.int32),
        "log_probabilities": captured.log_probabilities.astype(np.float32),
        "confidence": captured.confidence.astype(np.float32),
    }
    if captured.losses is not None:
        tensors["losses"] = captured.losses.astype(np.float64)
    if captured.chances is not None:
        tensors["chances"] = captured.chances.astype(np.float32)
    return safetensors.numpy.save(tensors, metadata={"capture": told})


def parse_capture(content: bytes, path: Path) -> Captured:
    """The contents of such a file. Raises Damaged unless it is exactly of this form, BadNumbers for NaN."""
    header = read_header(content, path)
    source = _source(told_in(header, "capture"), path)
    rows, positions = _size(header, "positions", path), _size(header, "confidence", path)
    k = min(source.top_k, source.vocabulary)
    expected: dict[str, tuple[str, list[int]]] = {
        "positions": ("I32", [rows]),
        "tokens": ("I32", [positions, k]),
        "log_probabilities": ("F32", [positions, k + (k < source.vocabulary)]),
        "confidence": ("F32", [positions]),
        **({"losses": ("F64", [rows])} if "losses" in header else {}),
        **({"chances": ("F32", [positions])} if "chances" in header else {}),
    }
    found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise _bad(path, f"{name} is {_shown(found.get(name))}, expected {_shown(expected.get(name))}")
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise _bad(path, f"not a sound safetensors file: {error}") from error
    captured = Captured(source, **tensors)
    check(captured, path)
    return captured


def check(captured: Captured, path: Path | str) -> None:
    """Raise BadNumbers for NaN and infinity, Damaged for numbers that no model can have said."""
    chances = captured.log_probabilities
    if not np.isfinite(chances).all() or not np.isfinite(captured.confidence).all():
        mend = "compute with --dtype float32, and capture again"
        raise BadNumbers(f"{Path(path).name} holds NaN or infinity", where=path, mend=mend)
    tokens, source = captured.tokens, captured.source
    if captured.losses is not None and ((captured.losses < 0) | np.isinf(captured.losses)).any():
        raise _bad(path, "a loss is no -log p")
    if (captured.positions < 1).any() or captured.positions.sum(dtype=np.int64) != len(tokens):
        raise _bad(path, f"its rows have {captured.positions.sum(dtype=np.int64)} positions, {len(tokens)} are there")
    if len(tokens) and (tokens[:, 0].min() < 0 or tokens[:, -1].max() >= source.vocabulary):
        raise _bad(path, f"holds a token outside the vocabulary of {source.vocabulary}")
    if (tokens[:, 1:] <= tokens[:, :-1]).any():
        raise _bad(path, "the tokens of a position are not in rising order")
    totals = np.exp(chances, dtype=np.float64).sum(axis=1)
    if len(totals) and abs(totals - 1).max() > OFF_ONE:
        raise _bad(path, f"the probabilities of a position add up to {totals[abs(totals - 1).argmax()]:.4g}")
    if ((captured.confidence <= 0) | (captured.confidence > 1 + OFF_ONE)).any():
        raise _bad(path, "a confidence is no probability")


def _source(told: dict[str, Any], path: Path) -> Source:
    """What the file says it was made from."""
    kinds = {"data_sha256": str, "rows_sha256": str, "temperature": float, "vocabulary": int, "top_k": int}
    is_ours = told.pop("format", None) == FORMAT and {key: type(value) for key, value in told.items()} == kinds
    if not is_ours or told["vocabulary"] < 1 or told["top_k"] < 1 or not 0 < told["temperature"] < math.inf:
        raise _bad(path, f"does not say that it is a {FORMAT}")
    return Source(**told)


def _size(header: dict[str, Any], name: str, path: Path) -> int:
    """The length of a list of numbers that must be there."""
    shape = header.get(name, {}).get("shape", [])
    if len(shape) != 1 or shape[0] < 1:
        raise _bad(path, f"{name} is {shape or 'missing'}, expected a list")
    return int(shape[0])


def _shown(entry: tuple[str, list[int]] | None) -> str:
    return f"{entry[0]} {entry[1]}" if entry else "not there"


def _bad(path: Path | str, found: str) -> Damaged:
    return Damaged(f"{Path(path).name}: {found}", where=path, mend=AGAIN)
