"""Means: many clients' adapters as one, and how far averaging A and B apart strays from averaging BA.

Neither one client after the other nor all side by side takes more memory the more clients there are.
"""

from __future__ import annotations

import numpy as np

from stages.aggregation.updates import CACHED_NUMBERS
from stages.artefacts.adapter_files import A, B, Tensors, layers_of

PROBES = 16
"""Directions the cross term is measured in. Exact where a layer has at most this many inputs."""


class Mean:
    """A running weighted mean of adapters, and how far averaging A and B apart strays from averaging BA.

    Sums are float64: weights that are whole numbers times float32 values add up without rounding that a float32 result
    could show, and identical clients give the identical adapter.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._sums: Tensors = {}
        self._products: Tensors = {}
        self._probes: dict[int, np.ndarray] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        """Take in one client's adapter."""
        self._weight += weight
        for name, tensor in tensors.items():
            scaled = tensor if weight == 1 else tensor * np.float64(weight)
            if name in self._sums:
                self._sums[name] += scaled
            else:
                self._sums[name] = scaled.astype(np.float64)
        for layer in layers_of(tensors):
            a, b = tensors[layer + A], tensors[layer + B]
            product = b @ (a @ self._probe(a.shape[1]))
            product *= weight
            if layer in self._products:
                self._products[layer] += product
            else:
                self._products[layer] = product

    def add_all(self, tensors: Tensors) -> None:
        """Take in layers of all K clients at once, each with weight 1: every tensor is [K, ...]. No layer twice."""
        self._weight = len(next(iter(tensors.values())))
        self._sums |= {name: stacked.sum(axis=0, dtype=np.float64) for name, stacked in tensors.items()}
        for layer in layers_of(tensors):
            a, b = tensors[layer + A], tensors[layer + B]  # [K, r, in], [K, out, r]
            self._products[layer] = _through(b, _probed(a, self._probe(a.shape[2])))

    def result(self) -> Tensors:
        """The mean, float32."""
        return {name: (total / self._weight).astype(np.float32) for name, total in self._sums.items()}

    def cross_terms(self) -> dict[str, float]:
        """||mean(BA) - mean(B) mean(A)|| / ||mean(BA)|| per layer, Frobenius norms.

        The exact value costs K^2 products or forming BA. Here both norms are measured in PROBES random orthonormal
        directions of the input: exact for layers with no more inputs than that, elsewhere an estimate within about
        ten per cent. Zero where mean(BA) is.
        """
        terms = {}
        for layer in self._products:
            a = self._sums[layer + A] / self._weight
            b = self._sums[layer + B] / self._weight
            together = self._products[layer] / self._weight
            apart = b @ (a @ self._probe(a.shape[1]))
            size = np.linalg.norm(together)
            terms[layer] = float(np.linalg.norm(together - apart) / size) if size > 0 else 0.0
        return terms

    def _probe(self, inputs: int) -> np.ndarray:
        """Orthonormal columns, float64, [inputs, min(inputs, PROBES)], the same in every run."""
        if inputs not in self._probes:
            draws = np.random.default_rng(inputs).standard_normal((inputs, min(inputs, PROBES)))
            self._probes[inputs] = np.linalg.qr(draws)[0]
        return self._probes[inputs]


def _probed(a: np.ndarray, probe: np.ndarray) -> np.ndarray:
    """A_k P of every client, float64, [K, r, probes]: as many clients at a time as stay in the cache.

    a: [K, r, inputs], probe: [inputs, probes].
    """
    found = np.empty((*a.shape[:2], probe.shape[1]))
    clients = max(1, CACHED_NUMBERS // a[0].size)
    for first in range(0, len(a), clients):
        some = slice(first, first + clients)
        found[some] = a[some].astype(np.float64) @ probe
    return found


def _through(b: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The sum over clients of B_k I_k, float64, [outputs, probes]: as many outputs at a time as stay in the cache.

    b: [K, outputs, r], inner: [K, r, probes].
    """
    found = np.zeros((b.shape[1], inner.shape[2]))
    outputs = max(1, CACHED_NUMBERS // (len(b) * b.shape[2]))
    for first in range(0, b.shape[1], outputs):
        some = slice(first, first + outputs)
        wide = b[:, some].astype(np.float64)
        for column in range(b.shape[2]):
            found[some] += wide[:, :, column].T @ inner[:, column]
    return found
