"""diff: how two adapters differ, tensor by tensor and in what they add to each layer.

Reads two adapter folders, ours or any of PEFT's; writes nothing and loads no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.artefacts.adapter_files import A, B
from stages.audit.foreign_adapters import AnyAdapter, effective_rank, product_spectrum, read_any
from stages.files import reading
from stages.workspace.names import ADAPTER_WEIGHTS, RESIDUAL

ROUNDING = 1e-6
"""Of a norm: below it a difference is no more than float32's rounding of A and B."""

Factors = tuple[np.ndarray, np.ndarray]
"""A layer's A and its scaled B."""
ABSENT: Factors = (np.zeros((0, 0)), np.zeros((0, 0)))


@dataclass(frozen=True)
class TensorDifference:
    """Of one tensor that both have; rank is the effective rank.

    None is what has no value: the cosine to zero, anything of NaN, the rank of what is no matrix, and where the shapes
    differ, the cosine and the difference.
    """

    name: str
    shape_a: list[int]
    shape_b: list[int]
    norm_a: float | None
    norm_b: float | None
    cosine: float | None
    largest_difference: float | None
    rank_a: float | None
    rank_b: float | None

    @property
    def is_equal(self) -> bool:
        """Whether every value is the same. NaN equals nothing."""
        return self.largest_difference == 0


@dataclass(frozen=True)
class LayerDifference:
    """Of what two adapters add to one layer's weights: B A times alpha/r, as PEFT has it; Frobenius norms.

    An adapter that lacks the layer adds 0 to it. None is what is not known (settings that are not understood, NaN,
    other shapes), and the cosine to zero.
    """

    name: str
    norm_a: float | None
    norm_b: float | None
    difference: float | None
    cosine: float | None

    @property
    def is_equal(self) -> bool:
        """Whether both add the same, to rounding."""
        if self.difference is None or self.norm_a is None or self.norm_b is None:
            return False
        return self.difference <= ROUNDING * max(self.norm_a, self.norm_b)


@dataclass(frozen=True)
class Difference:
    """Two adapters. config: of each key that differs, the value in A and in B. verdict: in words.

    not_understood: of "A" and "B", why what it does to its base is not known here, or not in full. beneath: which of
    them have a residual beneath the adapter, which is not compared.
    """

    tensors: list[TensorDifference]
    layers: list[LayerDifference]
    not_understood: dict[str, list[str]]
    only_in_a: list[str]
    only_in_b: list[str]
    config: dict[str, tuple[Any, Any]]
    same_bytes: bool
    beneath: list[str]

    @property
    def same_values(self) -> bool:
        """Whether they have the same tensors, however they are stored."""
        return not self.only_in_a and not self.only_in_b and all(one.is_equal for one in self.tensors)

    @property
    def verdict(self) -> str:
        """What an auditor wants to hear first."""
        if self.same_bytes:
            tensors = "tensors: identical, byte for byte"
        elif self.same_values:
            tensors = "tensors: identical in every value, stored in other bytes"
        else:
            differing = sum(not one.is_equal for one in self.tensors) + len(self.only_in_a) + len(self.only_in_b)
            tensors = f"tensors: {differing} differ, {sum(one.is_equal for one in self.tensors)} identical"
        configuration = _differ(len(self.config)) if self.config else "identical"
        return f"{tensors}; configuration: {configuration}; what they add: {self._added}"

    @property
    def _added(self) -> str:
        if any(self.not_understood.values()):
            return "not known here"
        differing = [one for one in self.layers if not one.is_equal]
        if not differing:
            return "the same in every layer" + ("" if self.same_values else ", to rounding")
        return f"other in {len(differing)} of {len(self.layers)} layers"

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self) | {"same_values": self.same_values, "verdict": self.verdict}


def _differ(keys: int) -> str:
    return "1 key differs" if keys == 1 else f"{keys} keys differ"


def diff(first: Path, second: Path) -> Difference:
    """Compare two adapter folders. Raises NotReady for what is not there, Damaged for what cannot be read."""
    a, b = read_any(first), read_any(second)
    shared = [name for name in a.tensors if name in b.tensors]
    return Difference(
        tensors=[_compared(name, a.tensors[name], b.tensors[name]) for name in shared],
        layers=_layers(a, b),
        not_understood={"A": a.not_understood(), "B": b.not_understood()},
        only_in_a=[name for name in a.tensors if name not in b.tensors],
        only_in_b=[name for name in b.tensors if name not in a.tensors],
        config={
            key: (a.config.get(key), b.config.get(key))
            for key in sorted(a.config.keys() | b.config.keys())
            if a.config.get(key) != b.config.get(key)
        },
        same_bytes=_weights(first) == _weights(second),
        beneath=[name for name, folder in (("A", first), ("B", second)) if (folder / RESIDUAL).exists()],
    )


def _compared(name: str, a: np.ndarray, b: np.ndarray) -> TensorDifference:
    first, second = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm_a, norm_b = _number(float(np.linalg.norm(first))), _number(float(np.linalg.norm(second)))
    cosine = largest = None
    if a.shape == b.shape:
        largest = _number(float(np.abs(first - second).max(initial=0)))
        if norm_a and norm_b:
            cosine = float(np.clip(first @ second / (norm_a * norm_b), -1, 1))
    return TensorDifference(
        name, list(a.shape), list(b.shape), norm_a, norm_b, cosine, largest, effective_rank(a), effective_rank(b)
    )


def _layers(a: AnyAdapter, b: AnyAdapter) -> list[LayerDifference]:
    of_a, of_b = _factors(a), _factors(b)
    names = [*of_a, *(name for name in of_b if name not in of_a)]
    return [_layer(name, of_a.get(name, _none_of(a)), of_b.get(name, _none_of(b))) for name in names]


def _factors(adapter: AnyAdapter) -> dict[str, Factors | None]:
    """Of each layer that an adapter has anything of."""
    whole = {name for name, _, _ in adapter.modules()}
    named = dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in adapter.tensors if name.endswith((A, B)))
    return {name: adapter.scaled(name) if name in whole else None for name in named}


def _none_of(adapter: AnyAdapter) -> Factors | None:
    """What an adapter adds to a layer that it does not have: nothing, of rank 0, where it is understood."""
    return None if adapter.not_understood() else ABSENT


def _layer(name: str, a: Factors | None, b: Factors | None) -> LayerDifference:
    """Without forming a product: the difference of two of rank r is one of rank 2r."""
    norm_a, norm_b = _norm(a), _norm(b)
    difference = cosine = None
    if a is ABSENT or b is ABSENT:
        difference = norm_b if a is ABSENT else norm_a
    elif a and b and (a[0].shape[1], len(a[1])) == (b[0].shape[1], len(b[1])):
        difference = _norm((np.vstack([a[0], b[0]]), np.hstack([a[1], -b[1]])))
        if norm_a and norm_b:
            product = float(((a[1].T @ b[1]) * (a[0] @ b[0].T)).sum())
            cosine = float(np.clip(product / (norm_a * norm_b), -1, 1))
    return LayerDifference(name, norm_a, norm_b, difference, cosine)


def _norm(factors: Factors | None) -> float | None:
    if factors is None or factors is ABSENT:
        return 0.0 if factors is ABSENT else None
    return _number(float(np.linalg.norm(product_spectrum(*factors))))


def _number(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if np.isfinite(value) else None


def _weights(folder: Path) -> str:
    return reading.sha256(reading.read(folder / ADAPTER_WEIGHTS, limit_bytes=reading.LARGEST_ADAPTER_BYTES))
