"""Sorting networks, by NumPy's sort."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from stages.aggregation.sorting import in_order


@pytest.mark.parametrize("count", range(1, 13))
def test_every_row_of_zeros_and_ones_is_sorted(count: int) -> None:
    # What sorts all zeros and ones sorts everything (Knuth, 5.3.4, theorem Z).
    block = np.array([*itertools.product([0, 1], repeat=count)], np.float32).T
    np.testing.assert_array_equal(in_order(block.copy(), 0, count), np.sort(block, axis=0))


@pytest.mark.parametrize("count", [2, 3, 17, 64, 65, 100])
def test_places_that_are_asked_for_hold_what_sorting_puts_there(count: int) -> None:
    block = np.random.default_rng(count).standard_normal((count, 50), dtype=np.float32)
    for first, last in ((0, 1), (count // 2, count // 2 + 1), ((count - 1) // 2, count // 2 + 1), (1, count)):
        np.testing.assert_array_equal(in_order(block.copy(), first, last), np.sort(block, axis=0)[first:last])
