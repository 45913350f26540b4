"""Averages of client adapters, one client at a time, so that memory does not grow with their number.

FedAvg averages A and B apart: mean(B) mean(A) is not mean(BA), and the cross term tells by how much.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stages.parts.adapter_files import Tensors

PROBES = 16
"""Directions the cross term is measured in. Exact where a layer has at most this many inputs."""


def uniform(examples: int) -> int:
    """Every client weighs the same: 1/K, line 13 of Algorithm 1."""
    return 1


def by_samples(examples: int) -> int:
    """A client weighs what it saw: n_k/n, as in FedAvg (McMahan et al., 2017)."""
    return examples


WEIGHTINGS: dict[str, Callable[[int], int]] = {"uniform": uniform, "samples": by_samples}


class Mean:
    """A running weighted mean of adapters, and how far averaging A and B apart strays from averaging BA.

    Sums are float64: whole weights times float32 values add up without rounding that a float32 result could show, and
    identical clients give the identical adapter.
    """

    def __init__(self) -> None:
        self._weight = 0
        self._sums: Tensors = {}
        self._products: Tensors = {}
        self._probes: dict[int, np.ndarray] = {}

    def add(self, tensors: Tensors, weight: int) -> None:
        """Take in one client's adapter; weight is a whole number above zero."""
        self._weight += weight
        for name, tensor in tensors.items():
            scaled = tensor if weight == 1 else tensor * np.float64(weight)
            if name in self._sums:
                self._sums[name] += scaled
            else:
                self._sums[name] = scaled.astype(np.float64)
        for layer in _layers(tensors):
            a, b = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            product = b @ (a @ self._probe(a.shape[1]))
            product *= weight
            if layer in self._products:
                self._products[layer] += product
            else:
                self._products[layer] = product

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
            a = self._sums[f"{layer}.lora_A.weight"] / self._weight
            b = self._sums[f"{layer}.lora_B.weight"] / self._weight
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


def _layers(tensors: Tensors) -> list[str]:
    suffix = ".lora_A.weight"
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
