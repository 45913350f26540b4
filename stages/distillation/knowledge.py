"""What a model knows of the public rows, as a file that travels: S_k and S_0 of FedMKT.

One safetensors file. Its metadata holds one key, "knowledge", whose value is JSON: FORMAT and the fields of Told. Rows
and positions are those of the party's cuts. Its tensors:

    losses              float64 [rows]        -log p of each row's completion, in nats, over the whole vocabulary, at
                                              temperature 1; NaN for a row that the party leaves out
    chances             float32 [n]           log p of the completion's own token at each position, at temperature 1
    tokens              int32   [n, k]        the k likeliest tokens there, ids in rising order
    log_probabilities   float32 [n, k + 1]    theirs in nats, at the distillation's temperature; last, that of all other
                                              tokens together, which is left out where k is the vocabulary
    confidence          float32 [n]           the probability of the likeliest token, at temperature 1

8 k + 12 bytes a position, and 8 a row. It comes from another party: it is read strictly, without torch, and nothing of
it is taken that a model cannot have said.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.tensor_files import bad, read_header, told_in
from stages.distillation.cuts import Cuts
from stages.distillation.top_k_logits import Captured, Source
from stages.distillation.top_k_logits import check as check_said
from stages.runtime.errors import BadNumbers, Refused

FORMAT = "fedcollm-knowledge/1"
OFF_LOSS = 1e-4
"""How far a row's loss may be off the sum of its chances, in nats for each token: these are float32."""


@dataclass(frozen=True)
class Told:
    """Of what and how knowledge was told. vocabulary: how many ids the model has logits for."""

    data_sha256: str
    vocabulary_sha256: str
    temperature: float
    vocabulary: int
    top_k: int


@dataclass(frozen=True)
class Knowledge:
    """The contents of such a file."""

    told: Told
    losses: np.ndarray
    chances: np.ndarray
    tokens: np.ndarray
    log_probabilities: np.ndarray
    confidence: np.ndarray


def knowledge_of(captured: Captured, cuts: Cuts, told: Told) -> Knowledge:
    """From what was captured at the rows that the party does not leave out."""
    assert captured.losses is not None
    assert captured.chances is not None
    losses = np.full(len(cuts.positions), np.nan)
    losses[cuts.positions > 0] = captured.losses
    return Knowledge(told, losses, captured.chances, captured.tokens, captured.log_probabilities, captured.confidence)


def knowledge_bytes(knowledge: Knowledge) -> bytes:
    """The file, byte for byte the same for the same contents."""
    told = json.dumps({"format": FORMAT, **asdict(knowledge.told)}, sort_keys=True)
    tensors: dict[str, np.ndarray] = {
        "losses": knowledge.losses.astype(np.float64),
        "chances": knowledge.chances.astype(np.float32),
        "tokens": knowledge.tokens.astype(np.int32),
        "log_probabilities": knowledge.log_probabilities.astype(np.float32),
        "confidence": knowledge.confidence.astype(np.float32),
    }
    return safetensors.numpy.save(tensors, metadata={"knowledge": told})


def data_bytes(rows: int, positions: int, top_k: int, vocabulary: int) -> int:
    """The size of such a file but for its header, which has some 600 bytes."""
    k = min(top_k, vocabulary)
    return 8 * rows + positions * (8 * k + 8 + 4 * (k < vocabulary))


def parse_knowledge(content: bytes, path: Path, cuts: Cuts, expected: Told) -> Knowledge:
    """The contents of such a file. Raises Damaged unless it is exactly of this form, BadNumbers for NaN.

    Raises Refused, naming the difference, for knowledge of other rows, another vocabulary or temperature than expected.
    """
    header = read_header(content, path)
    said = asdict(_said(header, path))
    for name, value in asdict(expected).items():
        if said[name] != value:
            found, here = (str(one)[:16] for one in (said[name], value))
            message = f"{path.name} is of another {name.removesuffix('_sha256')}: {found}, here it is {here}"
            raise Refused(message, where=path, mend="take it out, and copy what that party tells now")
    rows, n, k = len(cuts.positions), len(cuts.ends), min(expected.top_k, expected.vocabulary)
    shapes: dict[str, tuple[str, list[int]]] = {
        "losses": ("F64", [rows]),
        "chances": ("F32", [n]),
        "tokens": ("I32", [n, k]),
        "log_probabilities": ("F32", [n, k + (k < expected.vocabulary)]),
        "confidence": ("F32", [n]),
    }
    if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != shapes:
        raise bad(path, f"has other arrays than knowledge of {n} positions in {rows} rows")
    try:
        knowledge = Knowledge(expected, **safetensors.numpy.load(content))
    except safetensors.SafetensorError as error:
        raise bad(path, f"is not a sound safetensors file: {error}") from error
    check(knowledge, cuts, path)
    return knowledge


def told_by_itself(content: bytes, path: Path) -> Told:
    """Of what and how such a file says that it was told; no more of it is looked at. Raises Damaged."""
    return _said(read_header(content, path), path)


def _said(header: dict[str, Any], path: Path) -> Told:
    said = told_in(header, "knowledge")
    kinds = {"data_sha256": str, "vocabulary_sha256": str, "temperature": float, "vocabulary": int, "top_k": int}
    if said.pop("format", None) != FORMAT or {name: type(value) for name, value in said.items()} != kinds:
        raise bad(path, f"does not say that it is a {FORMAT}")
    told = Told(**said)
    if told.vocabulary < 1 or told.top_k < 1 or not 0 < told.temperature < math.inf:
        raise bad(path, f"does not say that it is a {FORMAT}")
    return told


def check(knowledge: Knowledge, cuts: Cuts, path: Path) -> None:
    """Raise BadNumbers for NaN and infinity, Damaged for numbers that no model can have said of these rows."""
    told, has = knowledge.told, cuts.positions > 0
    losses, chances = knowledge.losses[has], knowledge.chances
    if not np.isfinite(losses).all() or not np.isfinite(chances).all():
        mend = "its party computes with --dtype float32, and tells it again"
        raise BadNumbers(f"{path.name} holds NaN or infinity", where=path, mend=mend)
    if not np.isnan(knowledge.losses[~has]).all():
        raise bad(path, "tells a loss of a row that its party leaves out")
    source = Source(told.data_sha256, told.vocabulary_sha256, told.temperature, told.vocabulary, told.top_k)
    parts = knowledge.tokens, knowledge.log_probabilities, knowledge.confidence
    check_said(Captured(source, cuts.positions[has], *parts, losses), path)
    if (chances > 1e-6).any() or (chances > np.log(knowledge.confidence) + 1e-3).any():
        raise bad(path, "a token of a completion is likelier than the likeliest")
    sums = -np.add.reduceat(chances.astype(np.float64), cuts.firsts[:-1][has])
    if (np.abs(sums - losses) > OFF_LOSS * (cuts.positions[has] + np.abs(losses))).any():
        raise bad(path, "a row's loss is not that of its tokens")


def figures(found: Knowledge) -> dict[str, float]:
    """What a manifest tells of knowledge: rows, nats of a row's completion, mean probability of the k tokens."""
    k = found.tokens.shape[1]
    kept = np.exp(found.log_probabilities[:, :k], dtype=np.float64).sum(axis=1).clip(max=1.0)
    has = ~np.isnan(found.losses)
    return {"rows": float(has.sum()), "loss": float(found.losses[has].mean()), "kept": float(kept.mean())}
