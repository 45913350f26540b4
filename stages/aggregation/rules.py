"""Line 13 of Algorithm 1: many clients' adapters become one, by the mean or by a rule that bad ones sway less.

FedAvg averages A and B apart: mean(B) mean(A) is not mean(BA), and the cross term tells by how much. The mean takes
one client at a time, so that memory does not grow with their number. The other rules need every update at once: they
hold K adapters (4 bytes a parameter; 256 clients of 3.1 million are 3.2 GB) and work tensor by tensor on top of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from stages.artefacts.adapter_files import Tensors
from stages.workspace.averaging import Aggregation

PROBES = 16
"""Directions the cross term is measured in. Exact where a layer has at most this many inputs."""


def uniform(examples: int) -> int:
    """Every client weighs the same: 1/K, line 13 of Algorithm 1."""
    return 1


def by_samples(examples: int) -> int:
    """A client weighs what it saw: n_k/n, as in FedAvg (McMahan et al., 2017)."""
    return examples


WEIGHTINGS: dict[str, Callable[[int], int]] = {"uniform": uniform, "samples": by_samples}


class Aggregator(Protocol):
    """What becomes of the updates of a round."""

    def add(self, tensors: Tensors, weight: int) -> None:
        """Take in one client's adapter; weight is a whole number above zero."""

    def result(self) -> Tensors:
        """The adapter made of all of them, float32."""

    def metrics(self, clients: Sequence[int]) -> dict[str, float]:
        """What the manifest says of it, once there is a result. clients: whose adapters were added, in that order."""


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

    def metrics(self, clients: Sequence[int]) -> dict[str, float]:
        """The cross term of every layer."""
        return {f"cross_term/{layer}": term for layer, term in self.cross_terms().items()}

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


# --- rules that need every update


class Combined(NamedTuple):
    """What a rule makes of K adapters. clients: what it did to which, by name and position; 0 stands for nothing."""

    tensors: Tensors
    clients: Mapping[str, Sequence[float]] = {}
    metrics: Mapping[str, float] = {}


Rule = Callable[[Sequence[Tensors], Sequence[int]], Combined]
"""From the adapters and their weights; rules that do not weigh take weights of 1 (the settings see to that)."""


def median(adapters: Sequence[Tensors], weights: Sequence[int]) -> Combined:
    """Each number's median over clients (Yin et al., 2018): right while fewer than half of them are bad.

    Of A and B as given: a median of factors is not the factor of a median.
    """
    return Combined({name: np.median(stack, axis=0).astype(np.float32) for name, stack in _stacks(adapters)})


def trimmed_mean(adapters: Sequence[Tensors], weights: Sequence[int], *, outliers: int) -> Combined:
    """Each number's mean over clients without the `outliers` largest and smallest (Yin et al., 2018).

    Of A and B as given, as the median. 2 outliers < K. `left_out` tells which share of a client's numbers was.
    """
    count, last = len(adapters), len(adapters) - outliers
    left_out, tensors = np.zeros(count), {}
    for name, stack in _stacks(adapters):
        order = np.argsort(stack, axis=0, kind="stable")
        inner = np.take_along_axis(stack, order[outliers:last], axis=0)
        tensors[name] = inner.mean(axis=0).astype(np.float32)
        ends = np.concatenate([order[:outliers], order[last:]])
        left_out += np.bincount(ends.ravel(), minlength=count)
    return Combined(tensors, {"left_out": (left_out / sum(tensor.size for tensor in tensors.values())).tolist()})


def clipped_mean(adapters: Sequence[Tensors], weights: Sequence[int], *, theta: Tensors) -> Combined:
    """The weighted mean of updates, each shortened to the median of their norms: none pulls further than that.

    An update is what a client changed of theta, the adapter it was sent; its norm is L2 over all of it. The median,
    since no agreed number fits every round, and since more than half of the clients would have to be bad to move it at
    will. `shortened` tells by which factor.
    """
    norms = np.sqrt(
        [sum(float(np.sum((one[n].astype(np.float64) - theta[n]) ** 2)) for n in theta) for one in adapters]
    )
    largest = float(np.median(norms))
    mean, shortened = Mean(), []
    for adapter, weight, norm in zip(adapters, weights, norms, strict=True):
        factor = largest / norm if norm > largest else 1.0
        if factor < 1:
            adapter = {name: theta[name] + factor * (adapter[name].astype(np.float64) - theta[name]) for name in theta}
        mean.add(adapter, weight)
        shortened.append(factor if factor < 1 else 0.0)
    return Combined(mean.result(), {"shortened": shortened}, mean.metrics([]))


def _distance(one: Tensors, other: Tensors) -> float:
    squares = (float(np.sum((one[name].astype(np.float64) - other[name]) ** 2)) for name in one)
    return float(np.sqrt(sum(squares)))


def krum(adapters: Sequence[Tensors], weights: Sequence[int], *, outliers: int) -> Combined:
    """The one adapter whose K - f - 2 nearest others are nearest to it, f = outliers (Blanchard et al., 2017).

    K >= 2f + 3. Distances are squared and over the whole adapter; of equals the first is `chosen`.
    """
    from scipy.spatial.distance import pdist, squareform

    count = len(adapters)
    distances = squareform(sum(pdist(stack.reshape(count, -1), "sqeuclidean") for _, stack in _stacks(adapters)))
    nearest = np.sort(distances, axis=1)[:, 1 : count - outliers - 1]  # without the distance to itself, which is 0
    chosen = int(nearest.sum(axis=1).argmin())
    return Combined(adapters[chosen], {"chosen": [float(number == chosen) for number in range(count)]})


def _stacks(adapters: Sequence[Tensors]) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of all clients, [K, ...], float64."""
    for name in adapters[0]:
        yield name, np.stack([adapter[name] for adapter in adapters]).astype(np.float64)


class Robust:
    """An aggregator that keeps every adapter until all are there, and then applies its rule."""

    def __init__(self, name: str, rule: Rule) -> None:
        self._name, self._rule = name, rule
        self._adapters: list[Tensors] = []
        self._weights: list[int] = []
        self._combined = Combined({})

    def add(self, tensors: Tensors, weight: int) -> None:
        """Keep one client's adapter."""
        self._adapters.append(tensors)
        self._weights.append(weight)

    def result(self) -> Tensors:
        """What the rule makes of them."""
        self._combined = self._rule(self._adapters, self._weights)
        return self._combined.tensors

    def metrics(self, clients: Sequence[int]) -> dict[str, float]:
        """Which rule acted, and what it did to which client, such as chosen/client-2."""
        done = {
            f"{what}/client-{client}": value
            for what, values in self._combined.clients.items()
            for client, value in zip(clients, values, strict=True)
            if value
        }
        return {f"rule/{self._name}": 1.0, **done, **self._combined.metrics}


def aggregator(settings: Aggregation, theta: Tensors) -> Aggregator:
    """The rule that the settings name, for clients that started from theta."""
    outliers = settings.outliers or 0
    rules: dict[str, Rule] = {
        "median": median,
        "trimmed-mean": partial(trimmed_mean, outliers=outliers),
        "clipped-mean": partial(clipped_mean, theta=theta),
        "krum": partial(krum, outliers=outliers),
    }
    return Mean() if settings.rule == "mean" else Robust(settings.rule, rules[settings.rule])
