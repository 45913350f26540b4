"""secret_random: uniform and normal numbers, never the same twice."""

from __future__ import annotations

import os

import numpy as np
import pytest
from scipy import stats

from stages.accounting.noise import SecretRandom

COUNT = 200_001
CHANCE = 1e-9
"""How likely a right generator fails a test."""


def test_normal_numbers_are_normal_and_independent() -> None:
    drawn = SecretRandom().normal(COUNT)
    assert len(drawn) == COUNT
    assert stats.kstest(drawn, "norm").pvalue > CHANCE
    # Box and Muller make two of one radius and angle: the halves must not know of each other.
    half = COUNT // 2
    correlation = [stats.pearsonr(drawn[:half], drawn[half + 1 :]), stats.pearsonr(drawn[:-1], drawn[1:])]
    assert min(found.pvalue for found in correlation) > CHANCE


def test_the_tails_are_there() -> None:
    drawn = np.abs(SecretRandom().normal(1_000_000))
    expected = 1_000_000 * 2 * stats.norm.sf(4)  # 63
    assert stats.binomtest(int((drawn > 4).sum()), 1_000_000, expected / 1_000_000).pvalue > CHANCE


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    drawn = SecretRandom().uniform(COUNT)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > CHANCE


def test_two_streams_differ_whatever_seeds_were_set() -> None:
    np.random.seed(1)
    first = SecretRandom().normal(10)
    np.random.seed(1)
    assert not set(first) & set(SecretRandom().normal(10))


def test_the_key_is_256_bits_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    monkeypatch.setattr(os, "urandom", urandom)
    first, second = SecretRandom().uniform(3), SecretRandom().uniform(3)
    assert asked == [32, 32]
    np.testing.assert_array_equal(first, second)  # nothing but the key makes two streams differ
    # AES-256 of block 0 under the key 0 begins dc95c078a2408989 (NIST's known answer), read as a little-endian word.
    assert first[0] == (int.from_bytes(bytes.fromhex("dc95c078a2408989"), "little") >> 11) / 2**53
