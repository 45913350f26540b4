"""audit_clients: cosines and outliers from inner products alone, against vectors written out."""

from __future__ import annotations

import numpy as np
import pytest

from stages.aggregation import drift
from stages.aggregation.drift import inner_products
from stages.audit.check_clients import pairwise, robust_z, toward_the_rest

UPDATES = np.array([[3.0, 4.0], [4.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])


def test_cosines_are_those_of_the_vectors_and_zero_where_there_is_none() -> None:
    found = pairwise(UPDATES @ UPDATES.T)
    assert found[0, 1] == pytest.approx(24 / 25)
    assert found[0, 2] == pytest.approx(-3 / 5)
    assert found[3].tolist() == [0, 0, 0, 0]


def test_the_rest_is_everyone_else() -> None:
    found = toward_the_rest(UPDATES @ UPDATES.T)
    # The rest of the first is (3, 3); that of the third is (7, 7), and -7 / (1 * 7 sqrt 2).
    assert found[0] == pytest.approx(21 / (5 * np.sqrt(18)))
    assert found[2] == pytest.approx(-1 / np.sqrt(2))
    assert found[3] == 0


def test_two_that_cancel_leave_no_rest() -> None:
    updates = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert toward_the_rest(updates @ updates.T)[0] == 0


def test_z_is_robust_and_needs_five_that_differ() -> None:
    norms = np.exp([0.0, 1.0, 2.0, 3.0, 100.0])
    found = robust_z(norms)  # median 2, distances 2, 1, 0, 1, 98: their median is 1
    assert found is not None
    assert found.tolist() == pytest.approx([-2 * 0.6745, -0.6745, 0, 0.6745, 98 * 0.6745])
    assert robust_z(norms[:4]) is None
    assert robust_z(np.ones(5)) is None
    assert robust_z(np.array([0.0, 1, 2, 3, 4])) is None


@pytest.mark.parametrize("held", [1, 2, 5, 100])
def test_however_few_are_held_at_a_time_the_products_are_the_same(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    start = {"b": draw.standard_normal((2, 3)), "a": draw.standard_normal(4)}
    adapters = [{name: draw.standard_normal(t.shape) for name, t in start.items()} for _ in range(5)]
    monkeypatch.setattr(drift, "HELD_BYTES", held * 8 * 10)
    vectors = np.stack([np.concatenate([(one[name] - start[name]).ravel() for name in ("a", "b")]) for one in adapters])
    found = inner_products(start, [lambda one=one: one for one in adapters])
    assert found == pytest.approx(vectors @ vectors.T)
