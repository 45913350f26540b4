"""The privacy accountant: what epsilon the steps of DP-SGD come to, and the least noise for a budget.

A step takes each example with probability q, shortens its gradient to norm C, and adds Gaussian noise of standard
deviation sigma C to the sum. Steps compose, over rounds too. Opacus computes the bounds: privacy loss random variables
(Gopi et al., 2021) and, where those are out of reach, Renyi divergences. Neighbouring data sets differ in one row; how
many rows there are counts as public.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from stages.runtime.errors import UsageProblem

RENYI_ABOVE = 100.0
"""Beyond this epsilon the finer computation needs much memory, and nobody needs it."""

SMALLEST_NOISE, LARGEST_NOISE = 1e-3, 1024.0
"""Less is as good as none, and nothing that one can compute with; more drowns whatever there is to learn."""


class Charge(NamedTuple):
    """So many steps, each with this noise multiplier (sigma) and sample rate (q)."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def total_epsilon(charges: Iterable[Charge], delta: float) -> float:
    """An upper bound of epsilon at this delta for all the charges together; infinite where there is no guarantee."""
    steps: Counter[tuple[float, float]] = Counter()
    for charge in charges:
        steps[charge.noise_multiplier, charge.sample_rate] += charge.steps
    merged = [Charge(*kind, count) for kind, count in sorted(steps.items())]
    return _epsilon(tuple(merged), delta) if merged else 0.0


def least_noise(
    spent: Iterable[Charge], *, sample_rate: float, steps: int, epsilon: float, delta: float
) -> float | None:
    """The least noise multiplier, within half a percent, with which so many more steps keep to epsilon in all.

    None if no noise does: what is spent already leaves too little.
    """
    before = tuple(spent)

    def keeps_to_budget(noise_multiplier: float) -> bool:
        return total_epsilon([*before, Charge(noise_multiplier, sample_rate, steps)], delta) <= epsilon

    if not keeps_to_budget(LARGEST_NOISE):
        return None
    high = 1.0
    while not keeps_to_budget(high):
        high *= 2
    low = high / 2 if high > 1 else 0.0
    while high - low > 0.005 * high:
        middle = round((low + high) / 2, 4)
        low, high = (low, middle) if keeps_to_budget(middle) else (middle, high)
    return high


@functools.lru_cache
def _epsilon(charges: tuple[Charge, ...], delta: float) -> float:
    opacus = accountants()
    if min(charge.noise_multiplier for charge in charges) < SMALLEST_NOISE:
        return math.inf
    history = [tuple(charge) for charge in charges]
    renyi, fine = opacus.RDPAccountant(), opacus.PRVAccountant()
    renyi.history, fine.history = list(history), list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # divisions by zero and orders at their limit, where a bound is loose
        bound = float(renyi.get_epsilon(delta))
        if bound > RENYI_ABOVE:
            return bound
        try:
            finer = float(fine.get_epsilon(delta, eps_error=max(1e-4, bound / 500)))
        except (RuntimeError, ValueError):  # its grid does not fit, as where almost nothing is spent
            return bound
    return min(bound, finer)  # both hold


def accountants() -> Any:
    """Opacus's. Raises UsageProblem if it is not installed."""
    try:
        from opacus import accountants
    except ImportError as error:
        mend = "pip install '.[dp]' in fedcollm's folder, or pip install opacus"
        raise UsageProblem("differential privacy needs opacus, which is not installed", mend=mend) from error
    return accountants
