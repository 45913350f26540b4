"""What the means of A and B lose of the mean of BA, kept: mean(BA) - mean(B) mean(A), as factors.

FedEx-LoRA adds it to the frozen weights, so that all go on with the exact mean of what they have learned (Singhal et
al., 2024, https://arxiv.org/abs/2410.09432). Here it is of all rounds so far: the one of the round before and what this
round adds, side by side, as few factors as give the same product. A round adds (K - 1) r to the rank at most, up to the
smaller side of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.aggregation.products import ROUNDING, principal, side_by_side
from stages.aggregation.updates import Updates
from stages.artefacts.adapter_files import A, B, Tensors, check_finite, layers_of


def residual(updates: Updates, weights: Sequence[int], average: Tensors, before: Tensors) -> Tensors:
    """What is beneath the average so that both together are the mean of what lay beneath the updates and of their BA.

    average: the weighted means of A and of B, float32. before: what lay beneath all updates. Layers are read some at a
    time, of all clients. Returns A, [rank, inputs], and B, [outputs, rank], of the layers that need any, float32: what
    is dropped is below the rounding of float32. Raises BadNumbers for what is beyond float32.
    """
    shares = np.array(weights, np.float64) / sum(weights)
    made = Tensors()
    for stacked in updates.layers():
        for layer in layers_of(stacked):
            a, b = (stacked[layer + end] - average[layer + end].astype(np.float64) for end in (A, B))
            left, right = side_by_side(a, b, shares)  # sum of w_k (B_k - B)(A_k - A), which is the mean of BA less BA
            if layer + A in before:
                left, right = np.hstack([left, before[layer + B]]), np.vstack([right, before[layer + A]])
            made |= _factors(layer, left, right)
    check_finite(made, "what is beneath the average")
    return made


def _factors(layer: str, left: np.ndarray, right: np.ndarray) -> Tensors:
    """Left @ right as A and B of the least rank, each with the root of its size; none where it is zero."""
    found = principal(left, right, min(len(left), right.shape[1]))
    rank = np.count_nonzero(found.values > ROUNDING * found.values[0])
    size = np.sqrt(found.values[:rank])
    if not rank:
        return {}
    with np.errstate(over="ignore"):
        a, b = size[:, None] * found.right[:rank], found.left[:, :rank] * size
        return {layer + A: a.astype(np.float32), layer + B: b.astype(np.float32)}


def largest_rank(tensors: Tensors) -> int:
    """Of all layers; 0 of none."""
    return max((len(tensors[layer + A]) for layer in layers_of(tensors)), default=0)
