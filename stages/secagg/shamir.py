"""Shamir's secret sharing over p = 2^257 - 93: any threshold of the shares give the secret, one fewer give nothing.

A holder is a number x >= 1, its share the value there of a polynomial that is the secret at 0 and has uniform
coefficients. Secrets have 32 bytes, shares 33, little-endian.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

from stages.artefacts.sizes import SHARE_BYTES

PRIME = 2**257 - 93
SECRET_BYTES = 32

Draw = Callable[[int], bytes]
"""Where random bytes come from: given how many, returns as many."""


def split(
    secret: bytes, *, threshold: int, holders: Iterable[int], draw: Draw = secrets.token_bytes
) -> dict[int, bytes]:
    """One share for each holder. Coefficients are drawn from the power of x upwards."""
    holders = list(holders)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, this one {len(secret)}")
    if not 1 <= threshold <= len(holders) or len(set(holders)) != len(holders) or min(holders) < 1:
        raise ValueError(f"no {threshold} of the holders {holders} can be told apart")
    falling = [_uniform(draw) for _ in range(threshold - 1)][::-1]
    falling.append(int.from_bytes(secret, "little"))
    return {x: _value(falling, x).to_bytes(SHARE_BYTES, "little") for x in holders}


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of exactly a threshold of shares, by holder; None if their value is none, a sure sign of damage."""
    return as_secret(interpolate(coefficients(list(shares)), shares.values()))


def as_secret(value: int) -> bytes | None:
    """32 bytes, unless the value at 0 is too large for them."""
    return value.to_bytes(SECRET_BYTES, "little") if value < 1 << (8 * SECRET_BYTES) else None


def coefficients(holders: Sequence[int], at: int = 0) -> list[int]:
    """Lagrange's coefficients of these holders for the value at a place, to be used for many polynomials."""
    found = []
    for i in holders:
        others = [j for j in holders if j != i]
        below = prod(i - j for j in others)  # small numbers: reduced once, at the end
        found.append(prod(at - j for j in others) * pow(below, -1, PRIME) % PRIME)
    return found


def interpolate(coefficients: Sequence[int], shares: Iterable[bytes]) -> int:
    """The polynomial's value where the coefficients say; shares in the order of their holders."""
    pairs = zip(coefficients, shares, strict=True)
    return sum(coefficient * int.from_bytes(share, "little") for coefficient, share in pairs) % PRIME


def _uniform(draw: Draw) -> int:
    """A number below the prime, each as likely as the others: what is not below it is drawn again."""
    while True:
        number = int.from_bytes(draw(SHARE_BYTES), "little") & ((1 << 257) - 1)
        if number < PRIME:
            return number


def _value(falling: Sequence[int], x: int) -> int:
    """The polynomial at x by Horner's rule. Reduced once: x is small, and so the sums grow slowly."""
    value = 0
    for coefficient in falling:
        value = value * x + coefficient
    return value % PRIME
