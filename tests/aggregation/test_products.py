"""products: the mean of BA at the agreed rank, by forming it; and that training can go on from what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from builders import random_adapter, sent
from stages.aggregation import updates as reading_updates
from stages.aggregation.products import best_of_rank
from stages.aggregation.rules import combine
from stages.artefacts.adapter_files import Tensors
from stages.workspace.averaging import Aggregation

PRODUCT = Aggregation(combine="product")


def clients(count: int, *, rank: int, outputs: int, inputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A [K, r, inputs] and B [K, outputs, r] of clients that have gone their own way from one A."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((rank, inputs))
    a = start + 0.3 * rng.standard_normal((count, rank, inputs))
    return a.astype(np.float32), rng.standard_normal((count, outputs, rank)).astype(np.float32)


def mean_product(a: np.ndarray, b: np.ndarray, shares: np.ndarray) -> np.ndarray:
    found: np.ndarray = sum(
        share * one_b.astype(np.float64) @ one_a for one_a, one_b, share in zip(a, b, shares, strict=True)
    )
    return found


@pytest.mark.parametrize("weights", [[1, 1, 1], [5, 1, 2]])
@pytest.mark.parametrize(
    ("rank", "outputs", "inputs"),
    [(2, 20, 30), (2, 30, 20), (4, 9, 40), (4, 40, 9), (8, 5, 30), (8, 30, 5), (8, 6, 7), (1, 12, 12)],
)
def test_no_product_of_that_rank_is_nearer_to_the_mean_of_products(
    rank: int, outputs: int, inputs: int, weights: list[int]
) -> None:
    a, b = clients(3, rank=rank, outputs=outputs, inputs=inputs)
    shares = np.array(weights) / sum(weights)
    found, mean = best_of_rank(a, b, shares), mean_product(a, b, shares)
    assert found.a.shape == a.shape[1:]
    assert found.b.shape == b.shape[1:]
    values = np.linalg.svd(mean, compute_uv=False)
    left = np.sqrt((values[rank:] ** 2).sum())  # Eckart and Young
    assert np.linalg.norm(mean - found.b @ found.a) == pytest.approx(left, rel=1e-9, abs=1e-9)
    assert found.remainder == pytest.approx(left / np.linalg.norm(mean), rel=1e-9, abs=1e-9)


def test_rows_of_the_new_a_are_orthogonal_and_as_long_as_the_clients_are_on_average() -> None:
    a, b = clients(4, rank=3, outputs=30, inputs=40)
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    found = best_of_rank(a, b, shares)
    squared = sum(share * np.sum(one.astype(np.float64) ** 2) for one, share in zip(a, shares, strict=True)) / 3
    np.testing.assert_allclose(found.a @ found.a.T, squared * np.eye(3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_direction_that_b_does_not_use_can_still_be_learned(used: int) -> None:
    a, b = clients(1, rank=3, outputs=20, inputs=30)
    b[:, :, used:] = 0
    found = best_of_rank(np.repeat(a, 5, axis=0), np.repeat(b, 5, axis=0), np.full(5, 0.2))
    np.testing.assert_allclose(found.b @ found.a, b[0].astype(np.float64) @ a[0], atol=1e-6)
    assert np.linalg.matrix_rank(found.a) == 3
    assert np.linalg.matrix_rank(found.b) == used
    inside = np.linalg.lstsq(a[0].T.astype(np.float64), found.a.T)[0]  # where training was before
    np.testing.assert_allclose(a[0].T @ inside, found.a.T, atol=1e-6)
    assert found.remainder == pytest.approx(0, abs=1e-9)


def test_untrained_clients_give_the_mean_of_a() -> None:
    a, b = clients(3, rank=3, outputs=20, inputs=30)
    found = best_of_rank(a, 0 * b, np.full(3, 1 / 3))
    np.testing.assert_allclose(found.a, a.mean(axis=0), atol=1e-6)
    assert not found.b.any()
    assert found.remainder == 0


def test_clients_whose_factors_differ_in_sign_alone_lose_nothing() -> None:
    a, b = clients(1, rank=2, outputs=20, inputs=30)
    signs = np.array([1, -1], np.float32)[:, None, None]
    found = best_of_rank(signs * a, signs * b, np.full(2, 0.5))  # the mean of A, and of B, is zero
    np.testing.assert_allclose(found.b @ found.a, b[0].astype(np.float64) @ a[0], atol=1e-6)
    assert np.linalg.norm(found.a) == pytest.approx(np.linalg.norm(a), rel=1e-6)


@pytest.mark.parametrize("beside", ["nothing, since all rows are alike", "nothing, since A is opposite", "one number"])
def test_directions_that_complete_a_are_at_right_angles_whatever_is_left_of_the_mean(beside: str) -> None:
    a, b = clients(1, rank=3, outputs=20, inputs=30)
    b[:, :, 1:] = 0  # one direction is used, two are to be completed
    if "alike" in beside:
        a[:] = a[:, :1]
    if "opposite" in beside:
        a, b = np.concatenate([a, -a]), np.concatenate([b, -b])
    if "number" in beside:
        a = np.eye(1, 30, dtype=np.float32)[None].repeat(3, axis=1)
    found = best_of_rank(a, b, np.full(len(a), 1 / len(a)))
    np.testing.assert_allclose(found.b @ found.a, b[0].astype(np.float64) @ a[0], atol=1e-6)
    length = np.mean(np.square(a[0], dtype=np.float64).sum(axis=1))
    np.testing.assert_allclose(found.a @ found.a.T, length * np.eye(3), atol=1e-6 * length)


HUGE, TINY = np.float32(2e37), np.float32(1e-8)


@pytest.mark.parametrize(
    ("a_of_first", "b_of_first", "b_of_others"),
    [
        (HUGE, np.float32(0), TINY),  # as long as the first's A, B would be zero
        (np.float32(1e-30), HUGE, np.float32(1)),
        (HUGE, np.float32(1e-37), np.float32(1)),
        (np.float32(1e-38), np.float32(1e30), np.float32(1e-30)),
    ],
)
def test_a_and_b_of_any_size_keep_their_product_as_float32(
    a_of_first: np.float32, b_of_first: np.float32, b_of_others: np.float32
) -> None:
    a, b = clients(3, rank=2, outputs=20, inputs=30)
    a[0] *= a_of_first
    b[0] *= b_of_first
    b[1:] *= b_of_others
    shares = np.full(3, 1 / 3)
    found, mean = best_of_rank(a, b, shares), mean_product(a, b, shares)
    kept = found.b.astype(np.float32).astype(np.float64) @ found.a.astype(np.float32)
    left = np.linalg.norm(mean - kept) / np.linalg.norm(mean)
    assert left == pytest.approx(found.remainder, abs=1e-6)  # what is told is true of what is sent
    assert left < 0.99


def test_b_at_the_end_of_float32_stays_a_number() -> None:
    a, b = np.ones((2, 3, 30), np.float32), np.full((2, 20, 3), 3e38, np.float32)  # B of one direction would be 9e38
    found = best_of_rank(a, b, np.full(2, 0.5))
    kept = found.b.astype(np.float32).astype(np.float64) @ found.a.astype(np.float32)
    np.testing.assert_allclose(kept, np.full((20, 30), 3 * float(np.float32(3e38))), rtol=1e-6)


def test_one_client_alone_keeps_its_product() -> None:
    a, b = clients(1, rank=4, outputs=12, inputs=16)
    found = best_of_rank(a, b, np.ones(1))
    np.testing.assert_allclose(found.b @ found.a, b[0].astype(np.float64) @ a[0], atol=1e-6)


@pytest.fixture
def adapters() -> list[Tensors]:
    layout = {f"h.{i}.lora_{which}.weight": shape for i in (0, 1) for which, shape in (("A", (2, 6)), ("B", (9, 2)))}
    return [random_adapter(layout, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("block", [1, 16 << 20])
def test_each_layer_of_an_adapter_is_cut_by_itself_however_many_are_read_at_once(
    block: int, adapters: list[Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_updates, "BLOCK_BYTES", block)
    monkeypatch.setattr(reading_updates, "FEWEST_NUMBERS", 7)
    weights = [3, 1, 1, 2]
    found, told = combine(PRODUCT, sent(tmp_path, adapters[0], adapters, range(1, 5)), weights)
    assert set(told) == {"remainder/h.0", "remainder/h.1"}
    for layer in ("h.0", "h.1"):
        names = [f"{layer}.lora_{which}.weight" for which in "AB"]
        cut = best_of_rank(*(np.stack([one[name] for one in adapters]) for name in names), np.array(weights) / 7)
        for name, tensor in zip(names, (cut.a, cut.b), strict=True):
            np.testing.assert_array_equal(found[name], tensor.astype(np.float32))
        assert 0 < told[f"remainder/{layer}"] < 1
        assert told[f"remainder/{layer}"] == cut.remainder


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rule": "median"}, "rule median is for A and B as they are, combine product averages BA"),
        ({"rule": "clipped-mean"}, "rule clipped-mean is for A and B as they are"),
        ({"mode": "secure"}, "combine product needs each client's A and B, mode secure shows their sums"),
    ],
)
def test_what_products_cannot_be_combined_with_is_refused(settings: dict[str, str], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Aggregation.model_validate({"combine": "product"} | settings)
