"""ring: whole numbers by arithmetic shown here, and the mean against NumPy's in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime.errors import BadNumbers, Damaged
from stages.secagg import fixed_point


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def heavy_tailed(clients: int, size: int) -> list[np.ndarray]:
    """Updates whose mean has an RMS of some 5e-3, with a few values in a thousand far out."""
    rng = np.random.default_rng(clients)
    common = rng.standard_t(4, size) * 3.5e-3
    return [(common + rng.standard_t(4, size) * 2e-3).astype(np.float32) for _ in range(clients)]


def summed(
    updates: list[np.ndarray], *, clients: int, examples: list[int] | None = None, largest: int = 1
) -> np.ndarray:
    counts = examples or [None] * len(updates)
    return np.sum(
        [
            fixed_point.encode(update, bound=8.0, clients=clients, examples=count, largest_examples=largest)
            for update, count in zip(updates, counts, strict=True)
        ],
        axis=0,
        dtype=np.uint32,
    )


def test_values_weight_and_one() -> None:
    """Three clients: the weight is (2^31 - 1) // 3 = 715,827,882; 4 of 8 is half of it, -2 a quarter below 2^32."""
    found = fixed_point.encode(numbers(0, 4, -2, 8), bound=8.0, clients=3)
    assert found.dtype == np.uint32
    assert found.tolist() == [0, 357_913_941, 2**32 - 178_956_970, 715_827_882, 715_827_882, 1]


def test_halves_go_to_even_numbers() -> None:
    """weight = bound = 536,870,911 (four clients), so that 0.5, 1.5 and 2.5 stay as they are before rounding."""
    found = fixed_point.encode(numbers(0.5, 1.5, 2.5, -0.5, -1.5), bound=536_870_911.0, clients=4)
    assert found[:5].view(np.int32).tolist() == [0, 2, 2, 0, -2]


def test_a_client_with_half_of_the_examples_weighs_half() -> None:
    found = fixed_point.encode(numbers(8), bound=8.0, clients=4, examples=50, largest_examples=100)
    assert found.tolist() == [268_435_456, 268_435_456, 1]  # rint(0.5 x 536,870,911): halves to even


@pytest.mark.parametrize("clients", [3, 4, 255, 256])
def test_no_sum_of_the_largest_updates_overflows(clients: int) -> None:
    for sign in (1, -1):
        total = summed([numbers(sign * 8, 0)] * clients, clients=clients)
        mean, weight, count = fixed_point.decode(total, bound=8.0, clients=clients)
        assert mean.tolist() == [sign * 8, 0]
        assert (weight, count) == (clients * ((2**31 - 1) // clients), clients)


@pytest.mark.parametrize("clients", [3, 4, 16, 64])
def test_the_mean_is_the_exact_one_to_five_in_a_million(clients: int) -> None:
    updates = heavy_tailed(clients, 20_000)
    exact = np.mean(updates, axis=0, dtype=np.float64)
    mean, _, _ = fixed_point.decode(summed(updates, clients=clients), bound=8.0, clients=clients)
    assert mean.dtype == np.float64
    assert np.sqrt(np.mean((mean - exact) ** 2) / np.mean(exact**2)) <= 5e-6


def test_the_weighted_mean_is_numpys_average() -> None:
    updates, examples = heavy_tailed(5, 5000), [100, 250, 1000, 999, 640]
    total = summed(updates, clients=5, examples=examples, largest=1000)
    mean, _, count = fixed_point.decode(total, bound=8.0, clients=5)
    exact = np.average(np.array(updates, np.float64), axis=0, weights=examples)
    assert count == 5
    assert np.sqrt(np.mean((mean - exact) ** 2) / np.mean(exact**2)) <= 5e-6


@given(st.integers(3, 256), st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20))
def test_a_single_update_comes_back_within_half_a_step(clients: int, values: list[float]) -> None:
    update = numbers(*values)
    mean, _, _ = fixed_point.decode(fixed_point.encode(update, bound=8.0, clients=clients), bound=8.0, clients=clients)
    assert np.abs(mean - update).max() <= 0.51 * 8 / ((2**31 - 1) // clients)


def test_a_vector_longer_than_a_chunk_is_encoded_like_its_parts() -> None:
    update = np.random.default_rng(1).standard_normal(2 * fixed_point.CHUNK + 5).astype(np.float32)
    whole = fixed_point.encode(update, bound=8.0, clients=4)
    for start in (0, fixed_point.CHUNK - 3, 2 * fixed_point.CHUNK - 1):
        part = fixed_point.encode(update[start : start + 6], bound=8.0, clients=4)
        np.testing.assert_array_equal(whole[start : start + 6], part[:6])
    assert whole[-2:].tolist() == [536_870_911, 1]


def test_the_update_stays_as_it_was() -> None:
    update = numbers(1, -2, 3)
    fixed_point.encode(update, bound=8.0, clients=3)
    assert update.tolist() == [1, -2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_what_is_no_number_is_refused(bad: float, place: int) -> None:
    update = np.zeros(10, np.float32)
    update[place] = bad
    with pytest.raises(BadNumbers, match="NaN or infinity") as raised:
        fixed_point.encode(update, bound=8.0, clients=3)
    assert "learning rate" in str(raised.value.mend)


def test_a_value_beyond_the_bound_is_refused_and_never_clipped() -> None:
    with pytest.raises(BadNumbers, match=r"holds 9.5, aggregation.max_update_value allows 8") as raised:
        fixed_point.encode(numbers(1, -9.5), bound=8.0, clients=3)
    assert "max_update_value = 16" in str(raised.value.mend)
    assert "all parties" in str(raised.value.mend)


@pytest.mark.parametrize("examples", [0, -1, 1001])
def test_examples_out_of_range_are_refused(examples: int) -> None:
    with pytest.raises(BadNumbers, match=f"has {examples} examples, aggregation.max_examples allows 1 to 1000"):
        fixed_point.encode(numbers(1), bound=8.0, clients=3, examples=examples, largest_examples=1000)


def test_the_fewest_examples_of_the_most_clients_still_weigh() -> None:
    """(2^31 - 1) // 256 = 8,388,607; one of 2^20 examples is 8 of it."""
    assert fixed_point.encode(numbers(0), bound=8.0, clients=256, examples=1).tolist() == [0, 8, 1]


@pytest.mark.parametrize(("weight", "count"), [(5, 0), (0, 1), (1, 2), (5, 4), (2**31 - 1, 2)])
def test_a_weight_or_count_that_no_clients_can_have_is_damage(weight: int, count: int) -> None:
    with pytest.raises(Damaged, match="broke the protocol"):
        fixed_point.decode(np.array([0, weight, count], np.uint32), bound=8.0, clients=3)


@pytest.mark.parametrize("value", [1001, 2**32 - 1001, 2**31])
def test_a_mean_beyond_the_bound_is_damage(value: int) -> None:
    with pytest.raises(Damaged, match="values beyond 8"):
        fixed_point.decode(np.array([value, 1000, 1], np.uint32), bound=8.0, clients=3)
