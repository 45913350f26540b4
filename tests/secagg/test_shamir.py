"""shamir: the secret from any threshold of shares, nothing from one fewer, by polynomials worked out here."""

from __future__ import annotations

import secrets
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.secagg import shamir
from stages.secagg.shamir import PRIME


def number(share: bytes) -> int:
    return int.from_bytes(share, "little")


def test_the_modulus_is_prime() -> None:
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 40):  # Miller-Rabin
        power = pow(base, odd, PRIME)
        assert power == 1 or PRIME - 1 in [pow(power, 2**i, PRIME) for i in range(twos)]


@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.data())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, holders))
    numbers = data.draw(st.lists(st.integers(1, 256), min_size=holders, max_size=holders, unique=True))
    shares = shamir.split(secret, threshold=threshold, holders=numbers)
    chosen = data.draw(st.permutations(numbers))[:threshold]
    assert shamir.join({x: shares[x] for x in chosen}) == secret
    assert {len(share) for share in shares.values()} == {33}


def test_a_share_is_the_polynomials_value() -> None:
    drawn = iter((5, 7))  # secret + 5 x + 7 x^2
    shares = shamir.split(
        (11).to_bytes(32, "little"),
        threshold=3,
        holders=[1, 2, 10],
        draw=lambda size: next(drawn).to_bytes(size, "little"),
    )
    assert {x: number(share) for x, share in shares.items()} == {1: 23, 2: 49, 10: 761}


def test_the_largest_secret_and_coefficients_come_back() -> None:
    largest = (PRIME - 1).to_bytes(33, "little")
    shares = shamir.split(b"\xff" * 32, threshold=4, holders=range(1, 6), draw=lambda size: largest)
    assert shamir.join({x: shares[x] for x in (2, 3, 4, 5)}) == b"\xff" * 32


def test_a_drawn_number_that_is_not_below_the_prime_is_drawn_again() -> None:
    drawn = iter([PRIME.to_bytes(33, "little"), b"\xff" * 33, (3).to_bytes(33, "little")])
    shares = shamir.split(bytes(32), threshold=2, holders=[1, 2], draw=lambda size: next(drawn))
    assert [number(share) for share in shares.values()] == [3, 6]


def test_only_257_bits_of_a_draw_count() -> None:
    shares = shamir.split(
        bytes(32), threshold=2, holders=[1, 2], draw=lambda size: (2**257 * 127 + 9).to_bytes(size, "little")
    )
    assert number(shares[1]) == 9


@pytest.mark.parametrize("threshold", [2, 3, 5])
def test_one_share_too_few_is_consistent_with_every_secret(threshold: int) -> None:
    """For each of several other secrets, a polynomial of the right degree through the same threshold - 1 shares."""
    holders = range(1, 7)
    shares = shamir.split(secrets.token_bytes(32), threshold=threshold, holders=holders)
    for seen in combinations(holders, threshold - 1):
        for other in (0, 1, 2**255, 2**256 - 1, number(secrets.token_bytes(32))):
            points = [(0, other), *((x, number(shares[x])) for x in seen)]
            polynomial = through(points)
            assert len(polynomial) == threshold
            assert polynomial[0] == other
            for x in seen:
                assert value(polynomial, x) == number(shares[x])


def test_every_value_of_a_share_is_as_likely_whatever_the_secret() -> None:
    """Two shares of threshold 2: the share of 1 is secret + c, and c is uniform, so the top bit is a fair coin."""
    tops = [number(shamir.split(bytes(32), threshold=2, holders=[1, 2])[1]) > PRIME // 2 for _ in range(4000)]
    assert abs(sum(tops) - 2000) < 6 * 4000**0.5 / 2  # six standard deviations: 2e-9


def test_wrong_shares_give_no_secret_or_another() -> None:
    shares = shamir.split(b"\x01" * 32, threshold=3, holders=[1, 2, 3])
    shares[2] = ((number(shares[2]) + 1) % PRIME).to_bytes(33, "little")
    assert shamir.join(shares) != b"\x01" * 32


def test_a_value_that_32_bytes_do_not_hold_is_no_secret() -> None:
    assert shamir.join({1: (2**256).to_bytes(33, "little")}) is None
    assert shamir.join({1: (2**256 - 1).to_bytes(33, "little")}) == b"\xff" * 32


def test_coefficients_give_the_value_at_any_place() -> None:
    shares = shamir.split(b"\x07" * 32, threshold=3, holders=[1, 4, 9, 16])
    weights = shamir.coefficients([1, 4, 9], at=16)
    assert shamir.interpolate(weights, [shares[x] for x in (1, 4, 9)]) == number(shares[16])


@pytest.mark.parametrize(("threshold", "holders"), [(0, [1, 2]), (3, [1, 2]), (2, [1, 1, 2]), (2, [0, 1, 2])], ids=str)
def test_holders_that_cannot_hold_shares_are_refused(threshold: int, holders: list[int]) -> None:
    with pytest.raises(ValueError, match="can be told apart"):
        shamir.split(bytes(32), threshold=threshold, holders=holders)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.split(bytes(size), threshold=2, holders=[1, 2])


def through(points: list[tuple[int, int]]) -> list[int]:
    """The coefficients of the polynomial through points, by solving Vandermonde's equations modulo the prime."""
    rows = [[pow(x, power, PRIME) for power in range(len(points))] + [y] for x, y in points]
    for i in range(len(rows)):
        pivot = next(r for r in range(i, len(rows)) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        inverse = pow(rows[i][i], -1, PRIME)
        rows[i] = [value * inverse % PRIME for value in rows[i]]
        for r in range(len(rows)):
            if r != i:
                rows[r] = [(a - rows[r][i] * b) % PRIME for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


def value(polynomial: list[int], x: int) -> int:
    return sum(coefficient * x**power for power, coefficient in enumerate(polynomial)) % PRIME
