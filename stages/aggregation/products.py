"""The mean of BA, cut back to the rank that travels: what clients have learned is averaged, not A and B apart.

As FlexLoRA does (Bai et al., 2024, https://arxiv.org/abs/2402.11505), but by the factors: BA is formed only where it is
smaller than the factors of all clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.aggregation.updates import Updates
from stages.artefacts.adapter_files import A, B, Tensors, layers_of

FLOAT32 = np.finfo(np.float32)
ROUNDING = float(FLOAT32.eps)
"""A singular value that is no larger share of the largest is what rounding has left of zero."""
LEAST, MOST = float(FLOAT32.tiny / FLOAT32.eps), float(FLOAT32.max)
"""Of B's largest direction, and of A's: so large that the smallest that counts is a number of float32 too."""


class Cut(NamedTuple):
    """The best BA of a rank for a mean of them. a: [r, inputs], b: [outputs, r], float64.

    remainder: ||mean(BA) - BA|| / ||mean(BA)||, Frobenius norms; zero where mean(BA) is.
    """

    a: np.ndarray
    b: np.ndarray
    remainder: float


class Principal(NamedTuple):
    """Of a matrix: all singular values, descending, and as many pairs of directions as are asked for.

    left: [outputs, n], values: [at least n], right: [n, inputs]; float64.
    """

    left: np.ndarray
    values: np.ndarray
    right: np.ndarray


def mean_of_products(updates: Updates, weights: Sequence[int]) -> tuple[Tensors, dict[str, float]]:
    """Each layer's weighted mean of BA as A and B of the agreed rank, float32, and the remainder of each.

    Tensors that are not of a pair of matrices are averaged as they are. Layers are read some at a time, of all clients.
    What is beyond float32 becomes infinite, and is for the caller to find.
    """
    shares = np.array(weights, np.float64) / sum(weights)
    made, remainders = Tensors(), dict[str, float]()
    for stacked in updates.layers():
        for layer in layers_of(stacked):
            cut = best_of_rank(stacked.pop(layer + A), stacked.pop(layer + B), shares)
            made[layer + A], made[layer + B], remainders[layer] = cut
        made |= {name: np.tensordot(shares, tensors, axes=1) for name, tensors in stacked.items()}
    with np.errstate(over="ignore"):
        return {name: tensor.astype(np.float32) for name, tensor in made.items()}, remainders


def best_of_rank(a: np.ndarray, b: np.ndarray, shares: np.ndarray, rank: int | None = None) -> Cut:
    """Of all BA of this rank, r if none is given, the nearest to the mean of B_k A_k (Eckart and Young, 1936).

    a: [K, r, inputs], b: [K, outputs, r], shares: [K], which come to 1. (B G)(G^-1 A) is the same product for every G,
    but training goes on otherwise from each. Taken are orthogonal rows of A, as long as the clients' are on average: so
    every direction learns alike, none dies out, and A stays as large as it was. Where float32 has no number for
    B beside such an A, each takes the root of BA's size.
    """
    rank = rank or a.shape[1]
    mean = np.tensordot(shares, a, axes=1)[:rank]
    found = _principal(a, b, shares, rank)
    size = float(np.linalg.norm(found.values))
    if not size:
        return Cut(mean, np.zeros((b.shape[1], rank)), 0.0)
    kept = np.count_nonzero(found.values[:rank] > ROUNDING * found.values[0])
    right = _completed(found.right[:kept], mean)
    rows = np.count_nonzero(a.any(axis=2), axis=1)  # of a client of a smaller rank the others are zero
    of_each = a.shape[1] if (rows == a.shape[1]).all() else max(np.tensordot(shares, rows, axes=1), 1.0)
    length = np.sqrt(np.tensordot(shares, np.square(a, dtype=np.float64).sum(axis=(1, 2)), axes=1) / of_each)
    largest = found.values[0] / length
    if found.values[0] > FLOAT32.tiny and (largest < LEAST or max(largest, length) > MOST):
        length = np.sqrt(found.values[0])
    made_a, made_b = np.zeros(mean.shape), np.zeros((b.shape[1], rank))
    made_a[: len(right)] = length * right
    made_b[:, :kept] = found.left[:, :kept] * found.values[:kept] / length
    return Cut(made_a, made_b, float(np.linalg.norm(found.values[rank:])) / size)


def _principal(a: np.ndarray, b: np.ndarray, shares: np.ndarray, rank: int) -> Principal:
    """Of the mean of B_k A_k: thin QRs of the factors of all clients side by side, and one SVD."""
    return principal(*side_by_side(a, b, shares), rank)


def side_by_side(a: np.ndarray, b: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices whose product is the mean of B_k A_k: [outputs, K r] and [K r, inputs], float64."""
    left = (b * shares[:, None, None]).transpose(1, 0, 2).reshape(b.shape[1], -1)
    return left, a.reshape(-1, a.shape[2]).astype(np.float64)


def principal(left: np.ndarray, right: np.ndarray, rank: int) -> Principal:
    """Of left @ right, [outputs, n] and [n, inputs], which is formed only where it is smaller than they are."""
    if len(right) >= min(len(left), right.shape[1]):
        u, values, vt = np.linalg.svd(left @ right, full_matrices=False)
        return Principal(u[:, :rank], values, vt[:rank])
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right.T)
    u, values, vt = np.linalg.svd(r_left @ r_right.T)
    return Principal(q_left @ u[:, :rank], values, vt[:rank] @ q_right.T)


def _completed(right: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Orthonormal rows, [min(r, inputs), inputs]: those of right, [kept, inputs], and what the mean of A has beside."""
    missing = min(mean.shape) - len(right)
    if not missing:
        return right
    beside = np.linalg.svd(mean - mean @ right.T @ right, full_matrices=False)[2][:missing]
    # Where little of the mean is beside them, its directions are rounding's and not at right angles to them, but those
    # of a QR are.
    completed = np.linalg.qr(np.concatenate([right, beside]).T)[0].T
    return np.concatenate([right, completed[len(right) :]])
