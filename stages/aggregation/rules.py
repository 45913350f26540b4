"""Line 13 of Algorithm 1: many clients' adapters become one, by the mean or by a rule that bad ones sway less.

FedAvg averages A and B apart: mean(B) mean(A) is not mean(BA), and the cross term tells by how much. With
combine = "product" BA is averaged, and cut back to the rank of A and B. No rule's memory grows with the number of
clients, but for layers of all of them at a time in that one: means take one client at a time, the others some numbers
of all clients at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from stages.aggregation.means import Mean
from stages.aggregation.products import mean_of_products
from stages.aggregation.sorting import in_order
from stages.aggregation.updates import Updates, inner_products
from stages.artefacts.adapter_files import Tensors, flat
from stages.workspace.averaging import Aggregation

TIED_AT_ONCE = 1 << 12
"""Columns of equal numbers that are sorted together with whose they are, which takes four times their memory."""

STEPS, SETTLED, INDISTINCT = 1000, 1e-9, 1e-13
"""Of the search for a geometric median: the most, the smallest move that counts, and the rounding of a squared distance
as a share of the squares it is made of."""


def uniform(examples: int) -> int:
    """Every client weighs the same: 1/K, line 13 of Algorithm 1."""
    return 1


def by_samples(examples: int) -> int:
    """A client weighs what it saw: n_k/n, as in FedAvg (McMahan et al., 2017)."""
    return examples


WEIGHTINGS: dict[str, Callable[[int], int]] = {"uniform": uniform, "samples": by_samples}


# --- rules


class Combined(NamedTuple):
    """What a rule makes of K adapters. clients: what it did to which, by name and position; 0 stands for nothing.

    layers: what each layer loses, under the name of that: cross_term or remainder.
    """

    tensors: Tensors
    clients: Mapping[str, Sequence[float]] = {}
    layers: Mapping[str, Mapping[str, float]] = {}


Rule = Callable[[Updates, Sequence[int]], Combined]
"""From the updates and their weights; rules that do not weigh take weights of 1 (the settings see to that)."""


def mean(updates: Updates, weights: Sequence[int]) -> Combined:
    """The weighted mean, Eq. 8."""
    made = Mean()
    for adapter, weight in zip(updates.adapters(), weights, strict=True):
        made.add(adapter, weight)
    return Combined(made.result(), layers={"cross_term": made.cross_terms()})


def product_mean(updates: Updates, weights: Sequence[int]) -> Combined:
    """The weighted mean of BA, as the best A and B of the agreed rank."""
    made, remainders = mean_of_products(updates, weights)
    return Combined(made, layers={"remainder": remainders})


def median(updates: Updates, weights: Sequence[int]) -> Combined:
    """Each number's median over clients (Yin et al., 2018): right while fewer than half of them are bad.

    Of A and B as given: a median of factors is not the factor of a median.
    """
    made, count = np.empty(updates.size, np.float32), len(weights)
    for place, block in updates.blocks():
        low, *high = in_order(block, (count - 1) // 2, count // 2 + 1)  # one in the middle, or two
        made[place] = (low.astype(np.float64) + high[0]) / 2 if high else low
    return Combined(updates.tensors(made))


def trimmed_mean(updates: Updates, weights: Sequence[int], *, outliers: int) -> Combined:
    """Each number's mean over clients without the `outliers` largest and smallest (Yin et al., 2018).

    Of A and B as given, as the median. 2 outliers < K. `left_out` tells which share of a client's numbers was.
    """
    count, last = len(weights), len(weights) - outliers
    made, left_out = np.empty(updates.size, np.float32), np.zeros(count)
    for place, block in updates.blocks():
        rows = in_order(block.copy(), 0, count)
        total = rows[outliers].astype(np.float64)
        for row in rows[outliers + 1 : last]:
            total += row
        made[place] = total / (last - outliers)
        left_out += _ends(block, rows, outliers)
    return Combined(updates.tensors(made), {"left_out": (left_out / updates.size).tolist()})


def _ends(block: np.ndarray, rows: list[np.ndarray], outliers: int) -> np.ndarray:
    """How many of each client's numbers are among the `outliers` largest or smallest, [K]; of equals the first is less.

    block: [K, n]; rows: the same, each column in order.
    """
    count, last = len(block), len(block) - outliers
    low, high = rows[outliers - 1], rows[last]
    tied = (low == rows[outliers]) | (high == rows[last - 1])
    found = np.zeros(count)
    places = np.flatnonzero(tied)
    for some in np.split(places, range(TIED_AT_ONCE, len(places), TIED_AT_ONCE)):
        order = np.argsort(block[:, some], axis=0, kind="stable")
        found += np.bincount(np.concatenate([order[:outliers], order[last:]]).ravel(), minlength=count)
    low, high = np.where(tied, -np.inf, low), np.where(tied, np.inf, high)
    found += np.count_nonzero(block <= low, axis=1)
    found += np.count_nonzero(block >= high, axis=1)
    return found


def clipped_mean(updates: Updates, weights: Sequence[int]) -> Combined:
    """The weighted mean of updates, each shortened to the median of their norms: none pulls further than that.

    An update is what a client changed of theta, the adapter it was sent; its norm is L2 over all of it. The median,
    since no agreed number fits every round, and since more than half of the clients would have to be bad to move it at
    will. `shortened` tells by which factor. Every update is read twice, and hashed twice.
    """
    norms = _norms(updates)
    largest = float(np.median(norms))
    made, shortened = Mean(), []
    for adapter, weight, norm in zip(updates.adapters(), weights, norms, strict=True):
        factor = largest / norm if norm > largest else 1.0
        made.add(_shortened(adapter, updates.theta, factor) if factor < 1 else adapter, weight)
        shortened.append(factor if factor < 1 else 0.0)
    return Combined(made.result(), {"shortened": shortened}, {"cross_term": made.cross_terms()})


def _norms(updates: Updates) -> list[float]:
    """||u_k|| of every update, computed in float64."""
    theta, squares = flat(updates.theta), np.zeros(len(updates.heads))
    for place, block in updates.blocks():
        squares += _squares(block, theta[place])
    return [*map(float, np.sqrt(squares))]


def _squares(block: np.ndarray, start: np.ndarray) -> np.ndarray:
    """||block_k - start||^2 of every row, [K], float64. A row at a time, which stays in the processor's cache."""
    start = start.astype(np.float64)
    moves = (row - start for row in block)
    return np.array([moved @ moved for moved in moves])


def _shortened(adapter: Tensors, theta: Tensors, factor: float) -> Tensors:
    """An adapter as theta + factor (adapter - theta), float64."""
    made = {}
    for name, start in theta.items():
        moved = np.subtract(adapter[name], start, dtype=np.float64)
        moved *= factor
        moved += start
        made[name] = moved
    return made


def krum(updates: Updates, weights: Sequence[int], *, outliers: int) -> Combined:
    """The one adapter whose K - f - 2 nearest others are nearest to it, f = outliers (Blanchard et al., 2017).

    K >= 2f + 3. Distances are squared and over the whole adapter; of equals the first is `chosen`. They come from inner
    products, whose rounding is bounded; the updates that this does not tell apart are compared number by number.
    """
    count, nearest = len(weights), slice(1, len(weights) - outliers - 1)  # without the distance to itself, which is 0
    squared, error = _distances(updates)
    least = np.sort(squared - error, axis=1)[:, nearest].sum(axis=1)
    most = np.sort(squared + error, axis=1)[:, nearest].sum(axis=1)
    first = {digest: number for number, digest in reversed([*enumerate(updates.digests)])}
    able = sorted(number for number in first.values() if least[number] <= most.min())
    if len(able) > 1:
        exact = np.sort(_distances_from(updates, able), axis=1)[:, nearest].sum(axis=1)
        able = [able[int(exact.argmin())]]
    chosen = [float(number == able[0]) for number in range(count)]
    return Combined(updates.adapter(able[0]), {"chosen": chosen})


def _distances(updates: Updates) -> tuple[np.ndarray, np.ndarray]:
    """||u_j - u_k||^2 of every two updates, and how far each can be from the truth, [K, K], float64.

    Of the updates, not the adapters, since they are shorter. The error of a sum of n products is at most n roundings
    of the sum of their sizes (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), that is, of |u_j| |u_k|.
    """
    theta, products = flat(updates.theta), np.zeros((len(updates.heads), len(updates.heads)))
    for place, block in updates.blocks():
        products += inner_products(block, theta[place])
    squares = np.diag(products)
    norms = np.sqrt(squares)
    error = (updates.size + 16) * np.finfo(np.float64).eps * (norms[:, None] + norms) ** 2
    np.fill_diagonal(error, 0.0)
    distances = squares[:, None] + squares - 2 * products
    np.fill_diagonal(distances, -np.inf)  # the first in order, whatever the others are
    return distances, error


def _distances_from(updates: Updates, some: Sequence[int]) -> np.ndarray:
    """||u_j - u_k||^2 of some updates and all, [some, K], float64, from their differences."""
    found = np.zeros((len(some), len(updates.heads)))
    for _, block in updates.blocks():
        found += [_squares(block, block[number]) for number in some]
    return found


def geometric_median(updates: Updates, weights: Sequence[int]) -> Combined:
    """The point of least weighted sum of distances to all updates (Weiszfeld, 1937), as in RFA (Pillutla et al., 2022).

    Distances are over the whole adapter. It is a weighted mean of the updates, so their inner products tell the `share`
    of each; the updates are then read once more. Bad updates of less than half of the weight cannot move it further
    than the good ones lie apart, times a factor that grows with their share.
    """
    theta, products = flat(updates.theta), np.zeros((len(weights), len(weights)))
    for place, block in updates.blocks():
        products += inner_products(block, theta[place])
    shares = weiszfeld(products, np.array(weights, np.float64) / sum(weights))
    made = Mean()
    for adapter, share in zip(updates.adapters(), shares, strict=True):
        made.add(adapter, share)
    return Combined(made.result(), {"share": shares.tolist()}, {"cross_term": made.cross_terms()})


def weiszfeld(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The shares in their geometric median, [K], of K vectors known by their inner products, [K, K], float64.

    weights: [K], which come to 1. It begins at the vector of the least sum, which is the median if any vector is, and
    lies where most of the weight does: from the mean, one vector that is far away would have all others lie at one
    place by rounding. The first step leaves as Vardi and Zhang (2000) have it. It ends when a step moves by less than
    SETTLED of the harmonic mean distance, which those far away do not lengthen, or after STEPS, near enough by then:
    each step lowers the sum.
    """
    squares, shares = np.diag(products), _least_sum(products, weights)
    for _ in range(STEPS):
        to_point = products @ shares
        own = float(shares @ to_point)
        squared = squares - 2 * to_point + own
        apart = squared > INDISTINCT * (squares + own)  # or it is rounding
        distances = np.sqrt(np.where(apart, squared, 1.0))
        pulls = np.where(apart, weights / distances, 0.0)
        if not apart.any():
            break
        following = pulls / pulls.sum()
        if here := float(weights[~apart].sum()):
            leaving = pulls - pulls.sum() * shares
            force = float(np.sqrt(max(leaving @ products @ leaving, 0.0)))
            stays = min(1.0, here / force) if force else 1.0
            following = (1 - stays) * following + stays * shares
        moved = following - shares
        shares = following
        if max(moved @ products @ moved, 0.0) <= (SETTLED * float(weights[apart].sum() / pulls.sum())) ** 2:
            break
    return shares


def _least_sum(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The shares, [K], of the vector of the least weighted sum of distances to all; of equals each has its weight."""
    squares = np.diag(products)
    squared = squares[:, None] + squares - 2 * products
    apart = squared > INDISTINCT * (squares[:, None] + squares)
    sums = np.sqrt(np.where(apart, squared, 0.0)) @ weights
    least = np.where(sums <= sums.min() * (1 + SETTLED), weights, 0.0)
    shares: np.ndarray = least / least.sum()
    return shares


def combine(settings: Aggregation, updates: Updates, weights: Sequence[int]) -> tuple[Tensors, dict[str, float]]:
    """The adapter that the agreed rule makes of the updates, float32, and what the manifest says of it.

    That is the cross term of every layer, where there is one, or the remainder; and for another rule than the mean
    which it was, and what it did to which client, such as chosen/client-2.
    """
    outliers = settings.outliers or 0
    rules: dict[str, Rule] = {
        "mean": product_mean if settings.combine == "product" else mean,
        "median": median,
        "trimmed-mean": partial(trimmed_mean, outliers=outliers),
        "clipped-mean": clipped_mean,
        "krum": partial(krum, outliers=outliers),
        "geometric-median": geometric_median,
    }
    made = rules[settings.rule](updates, weights)
    metrics = {} if settings.rule == "mean" else {f"rule/{settings.rule}": 1.0}
    for what, values in made.clients.items():
        pairs = zip(updates.heads, values, strict=True)
        metrics |= {f"{what}/client-{head.manifest.client}": value for head, value in pairs if value}
    return made.tensors, metrics | {
        f"{what}/{layer}": share for what, shares in made.layers.items() for layer, share in shares.items()
    }
