"""keystreams: RFC 5869's own example, and words against counter mode by hand, wherever a chunk or a thread begins."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import secagg_reference
from stages.parties import one_time_keys
from stages.secagg import prg
from stages.secagg.prg import CHUNK

KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(3)]


def words(key: bytes, count: int) -> np.ndarray:
    return np.array(secagg_reference.words(key, count), np.uint32)


def test_keys_are_derived_as_rfc_5869_says() -> None:
    """Its appendix A.1, of which 32 of 42 bytes."""
    found = one_time_keys.derive(b"\x0b" * 22, salt=bytes(range(13)), info=bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"))
    assert found.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_the_words_of_a_key_are_aes_in_counter_mode() -> None:
    """The first block is that of counter 0; for the key of zeros it is H of test case 13 in McGrew and Viega's GCM."""
    total = np.zeros(4, np.uint32)
    prg.add(total, [(bytes(32), 1)])
    assert total.astype("<u4").tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("size", [1, 3, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 6])
@pytest.mark.parametrize("threads", [None, 1, 2, 3])
def test_streams_are_added_and_taken_away_over_any_length(size: int, threads: int | None) -> None:
    start = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    total = start.copy()
    prg.add(total, [(KEYS[0], 1), (KEYS[1], -1)], threads=threads)
    np.testing.assert_array_equal(total, start + words(KEYS[0], size) - words(KEYS[1], size))


def test_adding_and_taking_away_leaves_nothing() -> None:
    total = np.arange(CHUNK + 9, dtype=np.uint32)
    prg.add(total, [(key, sign) for key in KEYS for sign in (1, -1)])
    np.testing.assert_array_equal(total, np.arange(CHUNK + 9))


@pytest.mark.parametrize("size", [0, 1, 7, CHUNK + 5])
def test_a_checksum_is_a_product_with_the_words(size: int) -> None:
    values = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    expected = sum(a * b for a, b in zip(values.tolist(), secagg_reference.words(KEYS[2], size), strict=True)) % 2**32
    assert prg.checksum(KEYS[2], values) == expected


def test_the_checksum_of_a_sum_is_the_sum_of_checksums() -> None:
    one, other = (np.random.default_rng(i).integers(0, 2**32, 1000, dtype=np.uint32) for i in (1, 2))
    apart = prg.checksum(KEYS[0], one) + prg.checksum(KEYS[0], other)
    assert prg.checksum(KEYS[0], one + other) == apart % 2**32
