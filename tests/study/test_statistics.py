"""statistics: SciPy's own tests on the seeds' part, sums by hand on the rest, and no winner by accident."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy import stats

from stages.study.statistics import difference, estimate

BY_HAND = np.array([[1, 1, 1, 0], [1, 0, 1, 0]])
OTHERS = np.array([[1, 0, 0, 0], [1, 0, 0, 0]])


def answers(seeds: int, questions: int, *, seed: int, right: float = 0.6) -> np.ndarray:
    return np.random.default_rng(seed).binomial(1, right, (seeds, questions))


def test_an_estimate_by_hand() -> None:
    found = estimate(BY_HAND)
    # The seeds score 3/4 and 2/4: mean 0.625, deviation 0.25 / sqrt(2); binomial sqrt(0.625 x 0.375 / 4).
    assert found.mean == 0.625
    assert found.deviation == pytest.approx(0.25 / sqrt(2))
    assert found.binomial == pytest.approx(sqrt(0.625 * 0.375 / 4))


def test_a_difference_by_hand() -> None:
    found = difference(BY_HAND, OTHERS)
    # By seed 2/4 and 1/4; by question, mean over seeds, 0, 1/2, 1, 0.
    assert found.mean == 0.375
    assert found.seeds_error == pytest.approx(0.125)
    squares = (0.375**2 + 0.125**2 + 0.625**2 + 0.375**2) / 3
    assert found.questions_error == pytest.approx(sqrt(squares / 4))
    # Student's t with one degree of freedom is 12.706, the normal quantile 1.960.
    width = sqrt((12.7062 * 0.125) ** 2 + (1.95996 * found.questions_error) ** 2)
    assert found.half_width == pytest.approx(width, 1e-5)
    assert not found.is_supported


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_the_seeds_error_is_that_of_scipys_paired_t_test(seeds: int) -> None:
    ours, theirs = answers(seeds, 50, seed=1), answers(seeds, 50, seed=2)
    found = difference(ours, theirs)
    paired = stats.ttest_rel(ours.mean(axis=1), theirs.mean(axis=1))
    assert found.mean / found.seeds_error == pytest.approx(paired.statistic)
    low, high = paired.confidence_interval(0.95)
    seeds_half = sqrt(found.half_width**2 - (stats.norm.ppf(0.975) * found.questions_error) ** 2)
    assert found.mean - seeds_half == pytest.approx(low)
    assert found.mean + seeds_half == pytest.approx(high)


def test_the_questions_error_is_that_of_the_mean_over_questions() -> None:
    ours, theirs = answers(3, 50, seed=1), answers(3, 50, seed=2)
    assert difference(ours, theirs).questions_error == pytest.approx(stats.sem((ours - theirs).mean(axis=0)))


def test_the_interval_is_never_narrower_than_that_of_the_seeds_or_of_the_questions_alone() -> None:
    found = difference(answers(3, 50, seed=1), answers(3, 50, seed=2))
    assert found.half_width > stats.t.ppf(0.975, 2) * found.seeds_error
    assert found.half_width > stats.norm.ppf(0.975) * found.questions_error


def test_one_seed_supports_nothing_however_large_the_difference() -> None:
    found = difference(np.ones((1, 1000)), np.zeros((1, 1000)))
    assert found.mean == 1.0
    assert found.seeds_error is None
    assert found.half_width is None
    assert not found.is_supported
    assert estimate(np.ones((1, 1000))).deviation is None


def test_one_question_supports_nothing() -> None:
    assert not difference(np.ones((5, 1)), np.zeros((5, 1))).is_supported


def test_a_score_without_seeds_stands_for_each_of_them() -> None:
    ours, base = answers(4, 30, seed=1), answers(1, 30, seed=2)
    assert difference(ours, base) == difference(ours, np.repeat(base, 4, axis=0))


def test_equal_answers_are_no_difference() -> None:
    ours = answers(3, 40, seed=1)
    found = difference(ours, ours)
    assert (found.mean, found.half_width) == (0.0, 0.0)
    assert not found.is_supported


def test_a_difference_is_the_others_with_its_sign_turned() -> None:
    ours, theirs = answers(3, 400, seed=1, right=0.9), answers(3, 400, seed=2, right=0.2)
    found, turned = difference(ours, theirs), difference(theirs, ours)
    assert found.is_supported
    assert turned.is_supported
    assert (turned.mean, turned.half_width) == pytest.approx((-found.mean, found.half_width))


@pytest.mark.parametrize(("seeds", "questions"), [(2, 40), (3, 200), (10, 100)])
@pytest.mark.parametrize("seed_spread", [0.0, 0.1])
def test_where_there_is_no_difference_at_most_one_in_twenty_is_said_to_be(
    seeds: int, questions: int, seed_spread: float
) -> None:
    # Two methods equal on average: questions of unequal difficulty, seeds of unequal luck with each method.
    rng = np.random.default_rng(0)
    trials = 2000
    supported = 0
    for _ in range(trials):
        difficulty = rng.uniform(0.2, 0.8, questions)

        def asked(difficulty: np.ndarray = difficulty) -> np.ndarray:
            luck = rng.normal(0, seed_spread, (seeds, 1))
            return rng.binomial(1, np.clip(difficulty + luck, 0, 1))

        supported += difference(asked(), asked()).is_supported
    # 5 % of 2000 is 100 with a standard deviation of 10.
    assert supported <= 130
