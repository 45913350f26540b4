"""diff: how two adapters differ, tensor by tensor.

Reads two adapter folders, ours or any of PEFT's; writes nothing and loads no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.parts import files
from stages.parts.any_adapter import effective_rank, read_any
from stages.parts.workspace import ADAPTER_WEIGHTS


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
class Difference:
    """Two adapters. config: of each key that differs, the value in A and in B. verdict: in words."""

    tensors: list[TensorDifference]
    only_in_a: list[str]
    only_in_b: list[str]
    config: dict[str, tuple[Any, Any]]
    same_bytes: bool

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
        return f"{tensors}; configuration: " + (_differ(len(self.config)) if self.config else "identical")

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
        only_in_a=[name for name in a.tensors if name not in b.tensors],
        only_in_b=[name for name in b.tensors if name not in a.tensors],
        config={
            key: (a.config.get(key), b.config.get(key))
            for key in sorted(a.config.keys() | b.config.keys())
            if a.config.get(key) != b.config.get(key)
        },
        same_bytes=_weights(first) == _weights(second),
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


def _number(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if np.isfinite(value) else None


def _weights(folder: Path) -> str:
    return files.sha256(files.read(folder / ADAPTER_WEIGHTS, limit_bytes=files.LARGEST_ADAPTER_BYTES))
