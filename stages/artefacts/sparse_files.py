"""The file of an update of which few numbers are sent: where they stand, and what is added there.

Numbers stand as in an adapter's file: tensor after tensor by name, row after row. Written and read strictly: a position
twice, one beyond the adapter, or another count than agreed is damaged.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from stages.artefacts.adapter_files import Layout, is_finite, loaded, numbers_in
from stages.artefacts.tensor_files import bad, read_header
from stages.runtime.errors import BadNumbers

KINDS = {"changes": "F32", "positions": "U32"}


class Sparse(NamedTuple):
    """positions: uint32 [n], ascending; changes: float32 [n], what is added to the broadcast there."""

    positions: np.ndarray
    changes: np.ndarray


def count_kept(numbers: int, share: float) -> int:
    """How many of so many numbers are sent: a share of them, rounded up."""
    return math.ceil(share * numbers)


def largest(change: np.ndarray, count: int) -> Sparse:
    """The `count` numbers of a change that are largest, by size. change: [numbers], float32. Of equals the first."""
    order = np.argsort(-np.abs(change), kind="stable")[:count]
    positions = np.sort(order)
    return Sparse(positions.astype(np.uint32), change[positions])


def sparse_bytes(sparse: Sparse) -> bytes:
    """The file of an update."""
    arrays = {"changes": sparse.changes.astype(np.float32), "positions": sparse.positions.astype(np.uint32)}
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def parse_sparse(content: bytes, path: Path) -> Sparse:
    """The update in such a file, whatever it belongs to. Raises Damaged for anything else, BadNumbers for NaN."""
    header = read_header(content, path)
    found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    counts = {tuple(shape) for _, shape in found.values()}
    if {name: kind for name, (kind, _) in found.items()} != KINDS or len(counts) != 1 or len(next(iter(counts))) != 1:
        raise bad(path, "is no sparse update: it has positions, U32 [n], and changes, F32 [n]")
    if "__metadata__" in header:
        raise bad(path, "carries metadata, which a sparse update has none of")
    arrays = loaded(content, path)
    sparse = Sparse(arrays["positions"], arrays["changes"])
    steps = np.diff(sparse.positions.astype(np.int64))
    if not (steps > 0).all():
        what = "names a position twice" if (steps == 0).any() else "names positions out of order"
        raise bad(path, what)
    if not is_finite(sparse.changes):
        raise BadNumbers(f"{path.name} holds NaN or infinity", where=path, mend="train again with --overwrite")
    return sparse


def read_sparse(content: bytes, path: Path, layout: Layout, share: float) -> Sparse:
    """An update of an adapter of this layout, of which this share is sent. Raises Damaged where it does not fit."""
    numbers = numbers_in(layout)
    sparse = parse_sparse(content, path)
    if len(sparse.positions) != count_kept(numbers, share):
        raise bad(path, f"has {len(sparse.positions)} numbers; of {numbers} {count_kept(numbers, share)} are sent")
    if sparse.positions[-1] >= numbers:
        raise bad(path, f"names position {sparse.positions[-1]} of {numbers} numbers")
    return sparse
