"""aggregators: FedAvg by numbers worked out by hand, and the cross term by its formula."""

from __future__ import annotations

import numpy as np
import pytest

from builders import random_adapter
from stages.aggregation.means import PROBES, Mean
from stages.aggregation.rules import WEIGHTINGS
from stages.artefacts.adapter_files import Tensors

LAYERS = ("h.0", "h.1")
A, B = "h.0.lora_A.weight", "h.0.lora_B.weight"


def clients(count: int, *, inputs: int = 6, outputs: int = 5, rank: int = 2) -> list[Tensors]:
    layout = {f"{layer}.lora_A.weight": (rank, inputs) for layer in LAYERS}
    layout |= {f"{layer}.lora_B.weight": (outputs, rank) for layer in LAYERS}
    return [random_adapter(layout, seed=k) for k in range(count)]


def mean_of(adapters: list[Tensors], weights: list[int] | None = None) -> Mean:
    mean = Mean()
    for adapter, weight in zip(adapters, weights or [1] * len(adapters), strict=True):
        mean.add(adapter, weight)
    return mean


def one(value: float) -> Tensors:
    return {A: np.full((1, 2), value, np.float32), B: np.full((2, 1), -value, np.float32)}


def test_the_mean_is_the_mean() -> None:
    found = mean_of([one(1.0), one(2.0), one(6.0)]).result()
    np.testing.assert_array_equal(found[A], [[3, 3]])  # (1 + 2 + 6) / 3
    np.testing.assert_array_equal(found[B], [[-3], [-3]])
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(np.float32)}


def test_a_client_that_saw_twice_the_data_weighs_twice() -> None:
    weights = [WEIGHTINGS["samples"](examples) for examples in (100, 200)]
    np.testing.assert_array_equal(mean_of([one(1.0), one(4.0)], weights).result()[A], [[3, 3]])  # (1 + 2 x 4) / 3


def test_in_uniform_weighting_it_weighs_the_same() -> None:
    weights = [WEIGHTINGS["uniform"](examples) for examples in (100, 200)]
    np.testing.assert_array_equal(mean_of([one(1.0), one(4.0)], weights).result()[A], [[2.5, 2.5]])


@pytest.mark.parametrize("weights", [[1] * 5, [3, 1, 4, 1, 5], [1000, 1, 1, 1, 12_345]])
def test_the_mean_is_numpys_average(weights: list[int]) -> None:
    adapters = clients(5)
    found = mean_of(adapters, weights).result()
    for name, tensor in found.items():
        stack = np.stack([adapter[name] for adapter in adapters]).astype(np.float64)
        np.testing.assert_allclose(tensor, np.average(stack, axis=0, weights=weights), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("weight", [1, 3, 1001])
def test_identical_clients_give_the_identical_adapter_to_the_bit(count: int, weight: int) -> None:
    (adapter,) = clients(1)
    adapter[A].flat[:3] = [np.float32(1) / np.float32(3), 1e-38, 3e38]
    found = mean_of([adapter] * count, [weight] * count).result()
    assert {name: tensor.tobytes() for name, tensor in found.items()} == {
        name: tensor.tobytes() for name, tensor in adapter.items()
    }


def test_clients_are_added_without_being_changed() -> None:
    adapters = clients(3)
    before = [{name: tensor.tobytes() for name, tensor in adapter.items()} for adapter in adapters]
    mean = mean_of(adapters, [2, 1, 5])
    mean.result()
    mean.cross_terms()
    assert [{name: tensor.tobytes() for name, tensor in adapter.items()} for adapter in adapters] == before


def cross_term(adapters: list[Tensors], layer: str, weights: list[int]) -> float:
    """||mean(BA) - mean(B) mean(A)||_F / ||mean(BA)||_F as it is written, in float64."""
    a, b = (
        [adapter[f"{layer}.lora_{which}.weight"].astype(np.float64) for adapter in adapters] for which in ("A", "B")
    )
    together = np.average([y @ x for x, y in zip(a, b, strict=True)], axis=0, weights=weights)
    apart = np.average(b, axis=0, weights=weights) @ np.average(a, axis=0, weights=weights)
    return float(np.linalg.norm(together - apart) / np.linalg.norm(together))


def test_the_cross_term_of_two_opposite_clients_is_all_there_is() -> None:
    # A and -A, B and -B: mean(B) mean(A) = 0 while mean(BA) = BA.
    (adapter,) = clients(1)
    terms = mean_of([adapter, {name: -tensor for name, tensor in adapter.items()}]).cross_terms()
    assert terms == pytest.approx(dict.fromkeys(LAYERS, 1.0), rel=1e-6)


@pytest.mark.parametrize("inputs", [3, 6, PROBES])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [2, 1, 5, 3]])
def test_the_cross_term_is_exact_for_layers_with_few_inputs(inputs: int, weights: list[int]) -> None:
    adapters = clients(4, inputs=inputs, outputs=40)
    expected = {layer: cross_term(adapters, layer, weights) for layer in LAYERS}
    assert mean_of(adapters, weights).cross_terms() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(768, 2304, 8), (300, 50, 4), (2048, 64, 16)])
def test_the_cross_term_of_larger_layers_is_estimated_within_fifteen_per_cent(
    inputs: int, outputs: int, rank: int
) -> None:
    adapters = clients(4, inputs=inputs, outputs=outputs, rank=rank)
    expected = {layer: cross_term(adapters, layer, [1] * 4) for layer in LAYERS}
    assert mean_of(adapters).cross_terms() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("inputs", [6, 500])
def test_the_cross_term_of_identical_clients_is_zero(inputs: int) -> None:
    (adapter,) = clients(1, inputs=inputs)
    assert mean_of([adapter] * 3).cross_terms() == pytest.approx(dict.fromkeys(LAYERS, 0.0), abs=1e-6)


def test_the_cross_term_is_zero_where_no_client_has_learned_anything() -> None:
    adapters = [
        {name: tensor * ("lora_A" in name) for name, tensor in adapter.items()} for adapter in clients(3, inputs=50)
    ]
    assert mean_of(adapters).cross_terms() == dict.fromkeys(LAYERS, 0.0)


def test_the_cross_term_of_a_client_that_has_diverged_is_a_number_still() -> None:
    # B A reaches 2 x 1e30 x 1e30, which float32 cannot hold; a manifest cannot hold what is no number.
    adapters = [{name: np.sign(tensor) * np.float32(1e30) for name, tensor in one.items()} for one in clients(3)]
    expected = {layer: cross_term(adapters, layer, [1] * 3) for layer in LAYERS}
    assert mean_of(adapters).cross_terms() == pytest.approx(expected, rel=1e-5)


def test_the_cross_term_is_the_same_in_every_run() -> None:
    first, second = (mean_of(clients(3, inputs=500)).cross_terms() for _ in range(2))
    assert first == second
