"""The rules that bad updates sway less: by NumPy, SciPy and a Krum written out; one poisoned client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest
from scipy import optimize, stats

from builders import random_adapter, sent
from stages.aggregation import updates as reading_updates
from stages.aggregation.rules import combine
from stages.artefacts.adapter_files import Tensors
from stages.workspace.averaging import Aggregation

LAYOUT = {f"h.{i}.lora_{which}.weight": shape for i in (0, 1) for which, shape in (("A", (2, 6)), ("B", (5, 2)))}
A = "h.0.lora_A.weight"
THETA = random_adapter(LAYOUT, seed=99)


def updates(count: int, *, seed: int = 0) -> list[Tensors]:
    """What clients that learn much the same send back."""
    shared = random_adapter(LAYOUT, seed=seed + 50, scale=0.05)
    return [
        {name: THETA[name] + shared[name] + own[name] for name in THETA}
        for own in (random_adapter(LAYOUT, seed=seed + k, scale=0.01) for k in range(count))
    ]


def flat(adapter: Tensors) -> np.ndarray:
    return np.concatenate([adapter[name].astype(np.float64).ravel() for name in sorted(adapter)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of seven numbers, which begin and end within tensors."""
    monkeypatch.setattr(reading_updates, "BLOCK_BYTES", 1)
    monkeypatch.setattr(reading_updates, "FEWEST_NUMBERS", 7)


class Ruled(NamedTuple):
    """What a rule made, and what a manifest says of it."""

    tensors: Tensors
    metrics: dict[str, float]


def ruled(
    rule: str,
    adapters: list[Tensors],
    *,
    outliers: int | None = None,
    weights: list[int] | None = None,
    clients: list[int] | None = None,
) -> Ruled:
    weighting = "samples" if weights else "uniform"
    settings = Aggregation.model_validate({"rule": rule, "outliers": outliers, "weighting": weighting})
    theta = {name: THETA[name] for name in adapters[0]}
    with TemporaryDirectory() as folder:
        updates = sent(Path(folder), theta, adapters, clients or range(1, len(adapters) + 1))
        return Ruled(*combine(settings, updates, weights or [1] * len(adapters)))


def stack(adapters: list[Tensors], name: str) -> np.ndarray:
    return np.stack([adapter[name] for adapter in adapters]).astype(np.float64)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_median_is_numpys(count: int) -> None:
    adapters = updates(count)
    found = ruled("median", adapters).tensors
    for name in LAYOUT:
        np.testing.assert_array_equal(found[name], np.median(stack(adapters, name), axis=0).astype(np.float32))
        assert found[name].dtype == np.float32


@pytest.mark.parametrize(("count", "outliers"), [(3, 1), (5, 1), (5, 2), (8, 3)])
def test_the_trimmed_mean_is_scipys(count: int, outliers: int) -> None:
    adapters = updates(count)
    found = ruled("trimmed-mean", adapters, outliers=outliers).tensors
    for name in LAYOUT:
        # SciPy cuts int(share x K) at each end; half a client more than f keeps rounding out of it.
        expected = (
            stats.trim_mean(stack(adapters, name), (outliers + 0.5) / count, axis=0)
            if count > 3
            else (
                np.median(stack(adapters, name), axis=0)  # one of three is left
            )
        )
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_what_the_trimmed_mean_leaves_out_is_told_for_each_client() -> None:
    levels = (0.0, 1.0, 2.0, 3.0, -50.0)
    adapters = [{name: np.full(shape, level, np.float32) for name, shape in LAYOUT.items()} for level in levels]
    made = ruled("trimmed-mean", adapters, outliers=1, clients=[2, 3, 5, 6, 9])
    np.testing.assert_array_equal(made.tensors[A], np.full((2, 6), 1.0))  # (0 + 1 + 2) / 3
    left_out = {"left_out/client-6": 1.0, "left_out/client-9": 1.0}
    assert made.metrics == {"rule/trimmed-mean": 1.0, **left_out}


def test_the_clipped_mean_shortens_updates_to_the_median_of_their_norms() -> None:
    # Along one direction: updates of norm 1, 2 and 10. The median is 2: 1 + 2 + 2 = 5, by three.
    size = np.sqrt(sum(np.prod(shape) for shape in LAYOUT.values()))
    adapters = [{name: THETA[name] + np.float32(norm / size) for name in LAYOUT} for norm in (1, 2, 10)]
    made = ruled("clipped-mean", adapters)
    found = made.tensors
    for name in LAYOUT:
        np.testing.assert_allclose(found[name] - THETA[name], 5 / 3 / size, rtol=1e-4)
    told = {key: value for key, value in made.metrics.items() if "cross_term" not in key}
    assert told == {"rule/clipped-mean": 1.0, "shortened/client-3": pytest.approx(0.2, rel=1e-4)}  # 2 / 10


def test_the_clipped_mean_weighs_what_it_has_shortened() -> None:
    size = np.sqrt(sum(np.prod(shape) for shape in LAYOUT.values()))
    adapters = [{name: THETA[name] + np.float32(norm / size) for name in LAYOUT} for norm in (1, 2, 10)]
    found = ruled("clipped-mean", adapters, weights=[2, 1, 5]).tensors
    for name in LAYOUT:  # (2 x 1 + 1 x 2 + 5 x 2) / 8
        np.testing.assert_allclose(found[name] - THETA[name], 14 / 8 / size, rtol=1e-4)


def test_clients_that_are_all_alike_are_not_shortened_and_their_mean_is_theirs_to_the_bit() -> None:
    (adapter,) = updates(1)
    made = ruled("clipped-mean", [adapter] * 3)
    assert {name: tensor.tobytes() for name, tensor in made.tensors.items()} == {
        name: tensor.tobytes() for name, tensor in adapter.items()
    }
    assert not any("shortened" in name for name in made.metrics)


def krum(adapters: list[Tensors], outliers: int) -> int:
    """Blanchard et al. (2017), section 4, as it is written: least sum of squared distances to the K - f - 2 nearest."""
    vectors = [flat(adapter) for adapter in adapters]
    scores = []
    for i, one in enumerate(vectors):
        distances = sorted(float(np.sum((one - other) ** 2)) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(adapters) - outliers - 2]))
    return int(np.argmin(scores))


@pytest.mark.parametrize(("count", "outliers"), [(5, 1), (6, 1), (7, 2), (9, 3), (12, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_krum_chooses_the_update_that_the_paper_would(count: int, outliers: int, seed: int) -> None:
    adapters = updates(count, seed=100 * seed)
    made = ruled("krum", adapters, outliers=outliers)
    found, chosen = made.tensors, krum(adapters, outliers)
    assert all(np.array_equal(found[name], adapters[chosen][name]) for name in LAYOUT)
    assert made.metrics == {"rule/krum": 1.0, f"chosen/client-{chosen + 1}": 1.0}


def test_krum_counts_as_many_neighbours_as_the_paper_says() -> None:
    # Numbers on a line, K = 6 and f = 1: the three nearest count. Sums of squares: of 0.0: 1 + 1.44 + 1.69 = 4.13; of
    # 1.3: 0.01 + 0.09 + 1.69 = 1.79; of 1.2: 0.01 + 0.04 + 1.44 = 1.49; of 1.0: 0.04 + 0.09 + 1 = 1.13, the least. With
    # two neighbours 1.2 would have 0.05, less than 1.0's 0.13. Twelve times each here.
    levels = (0.0, 1.0, 1.2, 1.3, 9.0, -9.0)
    adapters = [{A: np.full((2, 6), level, np.float32)} for level in levels]
    made = ruled("krum", adapters, outliers=1)
    assert "chosen/client-2" in made.metrics


def objective(point: np.ndarray, vectors: np.ndarray, weights: np.ndarray) -> float:
    """The weighted sum of distances from a point to vectors, [K, n]."""
    return float(weights @ np.linalg.norm(vectors - point, axis=1))


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 4, 5, 6, 7], [50, 1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_no_point_is_nearer_to_all_updates_than_their_geometric_median(seed: int, weights: list[int] | None) -> None:
    adapters = updates(7, seed=seed)
    made = ruled("geometric-median", adapters, weights=weights)
    vectors, each = np.stack([flat(one) for one in adapters]), np.array(weights or [1] * 7, np.float64)
    start = vectors.mean(axis=0)
    best = optimize.minimize(objective, start, (vectors, each), method="L-BFGS-B", options={"ftol": 1e-14})
    least = min(best.fun, *(objective(vector, vectors, each) for vector in vectors))
    assert objective(flat(made.tensors), vectors, each) <= least * (1 + 1e-5)
    shares = [made.metrics.get(f"share/client-{k}", 0.0) for k in range(1, 8)]
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(flat(made.tensors), shares @ vectors, atol=1e-6)
    assert (max(shares) > 0.999) == (weights is not None and weights[0] == 50)  # whose half of the weight decides


@pytest.mark.parametrize("far", [1e2, 1e8, 1e20, 3e38])
@pytest.mark.parametrize("bad", [1, 4])
def test_however_far_less_than_half_of_the_updates_lie_the_geometric_median_stays_among_the_others(
    bad: int, far: float
) -> None:
    good = updates(5)
    away = {name: np.full(shape, far, np.float32) for name, shape in LAYOUT.items()}
    made = ruled("geometric-median", [*good, *[away] * bad])
    vectors = np.stack([flat(one) for one in good])
    # Far ones pull alike, whatever their distance: this is the sum of distances to the good, and that pull.
    towards = np.ones(vectors.shape[1]) / np.sqrt(vectors.shape[1])
    best = optimize.minimize(
        lambda point: np.linalg.norm(vectors - point, axis=1).sum() - bad * float(towards @ point),
        vectors.mean(axis=0),
        method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-9},
    )
    spread = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).mean()
    tolerance = 1e-3 * spread if far > 1e3 else 0.02 * spread  # at 100 they do not quite pull alike
    assert np.linalg.norm(flat(made.tensors) - best.x) < tolerance
    assert sum(made.metrics.get(f"share/client-{k}", 0.0) for k in range(1, 6)) == pytest.approx(1, abs=1e-2)
    assert all(np.isfinite(list(made.metrics.values())))


def test_an_update_with_half_of_the_weight_or_more_is_the_geometric_median_to_the_bit() -> None:
    one, *others = updates(4)
    for adapters, weights in (([one, *others], [3, 1, 1, 1]), ([others[0], one, one, one], [1, 1, 1, 1])):
        made = ruled("geometric-median", adapters, weights=weights)
        np.testing.assert_array_equal(flat(made.tensors), flat(one))
    told = {key for key in made.metrics if key.startswith("share/")}
    assert told == {"share/client-2", "share/client-3", "share/client-4"}


def test_on_a_line_the_geometric_median_is_the_median() -> None:
    levels = (0.0, 1.0, 1.5, 40.0, 1e6)
    adapters = [{name: np.full(shape, level, np.float32) for name, shape in LAYOUT.items()} for level in levels]
    np.testing.assert_allclose(ruled("geometric-median", adapters).tensors[A], 1.5, rtol=1e-4)


def test_alike_clients_give_what_they_sent_and_two_their_middle() -> None:
    one, other = updates(2)
    for count in (1, 2, 5):
        assert flat(ruled("geometric-median", [one] * count).tensors) == pytest.approx(flat(one), rel=1e-6)
    found = flat(ruled("geometric-median", [one, other]).tensors)
    assert found == pytest.approx((flat(one) + flat(other)) / 2, rel=1e-6)


ROBUST = {"median": None, "trimmed-mean": 1, "clipped-mean": None, "krum": 1, "geometric-median": None}


@pytest.mark.parametrize(("rule", "outliers"), ROBUST.items())
@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_client_of_seven_that_sends_the_opposite_a_hundredfold_sways_the_mean_alone(
    rule: str, outliers: int | None, place: int
) -> None:
    honest = updates(6)
    poisoned = {name: THETA[name] - 100 * (honest[0][name] - THETA[name]) for name in LAYOUT}
    adapters = [*honest[:place], poisoned, *honest[place:]]
    wanted = np.mean([flat(adapter) for adapter in honest], axis=0) - flat(THETA)

    def agrees(found: Tensors) -> float:
        """The share of the honest update that is in what was found; below zero, it goes the other way."""
        return float(np.dot(flat(found) - flat(THETA), wanted) / np.dot(wanted, wanted))

    assert agrees(ruled("mean", adapters).tensors) < -10
    # Six honest sevenths less one shortened seventh is 0.71; the others leave the poisoned client out.
    assert agrees(ruled(rule, adapters, outliers=outliers).tensors) > (0.7 if rule == "clipped-mean" else 0.95)


def test_numbers_near_the_largest_stay_numbers() -> None:
    huge: Callable[[float], Tensors] = lambda sign: {  # noqa: E731
        name: np.full(shape, sign * 3e38, np.float32) for name, shape in LAYOUT.items()
    }
    for rule, outliers in ROBUST.items():
        found = ruled(rule, [huge(1), huge(1), huge(-1), huge(1), huge(1)], outliers=outliers).tensors
        assert all(np.isfinite(tensor).all() for tensor in found.values()), rule


def test_what_the_trimmed_mean_leaves_out_of_equal_numbers_is_by_the_order_of_clients() -> None:
    rng = np.random.default_rng(1)
    adapters = [
        {name: rng.integers(3, size=shape).astype(np.float32) for name, shape in LAYOUT.items()} for _ in "1234567"
    ]
    order = np.argsort(np.stack([flat(adapter) for adapter in adapters]), axis=0, kind="stable")
    ends = np.concatenate([order[:2], order[-2:]])
    expected = {f"left_out/client-{k + 1}": np.mean(np.sum(ends == k, axis=0)) for k in range(7)}
    expected["rule/trimmed-mean"] = 1.0
    assert ruled("trimmed-mean", adapters, outliers=2).metrics == pytest.approx(expected)


def test_krum_takes_the_first_of_equals() -> None:
    shared, *others = updates(4)
    assert (
        "chosen/client-2"
        in ruled("krum", [others[0], shared, others[1], shared, shared, others[2]], outliers=1).metrics
    )


def test_krum_tells_apart_what_inner_products_cannot() -> None:
    # As far from theta as float32 can go in steps of 1, from each other a few such steps: rounding in inner products is
    # as large as those squared, and many sums are equal.
    for seed in range(20):
        steps = np.random.default_rng(seed).integers(3, size=(9, 2, 6))
        adapters = [{A: np.float32(2**23) + step.astype(np.float32)} for step in steps]
        assert f"chosen/client-{krum(adapters, 2) + 1}" in ruled("krum", adapters, outliers=2).metrics


def test_krum_is_not_led_astray_by_one_update_that_is_a_billion_times_as_long() -> None:
    honest = updates(6)
    poisoned = {name: THETA[name] + np.float32(1e9) for name in LAYOUT}
    adapters = [*honest[:2], poisoned, *honest[2:]]
    assert f"chosen/client-{krum(adapters, 1) + 1}" in ruled("krum", adapters, outliers=1).metrics


@pytest.mark.parametrize(("rule", "outliers"), [("mean", None), *ROBUST.items()])
def test_the_order_in_which_tensors_are_read_changes_no_bit(rule: str, outliers: int | None) -> None:
    # safetensors gives them in another order in every process.
    adapters = updates(6)
    backwards = [dict(reversed(adapter.items())) for adapter in adapters]
    one, other = ruled(rule, adapters, outliers=outliers), ruled(rule, backwards, outliers=outliers)
    assert flat(one.tensors).tobytes() == flat(other.tensors).tobytes()
    assert one.metrics == other.metrics
