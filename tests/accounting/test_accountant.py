"""accounting: epsilon as a second library counts it, and the least noise that a budget allows."""

from __future__ import annotations

import math
import sys

import pytest

from stages.accounting.accountant import Charge, least_noise, total_epsilon
from stages.runtime.errors import UsageProblem

SPEC = Charge(1.0, 64 / 10_000, 1570)  # 10,000 rows, batches of 64, ten epochs


def by_dp_accounting(charges: list[Charge], delta: float) -> float:
    """Epsilon from privacy loss distributions, by dp-accounting."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    parts = [
        pld.from_gaussian_mechanism(noise, sampling_prob=rate, use_connect_dots=True).self_compose(steps)
        for noise, rate, steps in charges
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return float(whole.get_epsilon_for_delta(delta))


@pytest.mark.parametrize(
    ("charges", "delta"),
    [
        ([SPEC], 1e-5),
        ([Charge(0.6, 64 / 10_000, 1570)], 1e-5),
        ([Charge(1.0, 1 / 3, 12)], 1e-5),
        ([Charge(2.0, 1.0, 5)], 1e-5),  # every example in every step
        ([Charge(5.0, 0.1, 10)], 1e-3),
        ([Charge(1.0, 0.3, 6), Charge(1.3, 0.2, 9)], 1e-4),
        ([Charge(0.5, 1 / 3, 30)], 1e-6),
    ],
)
def test_epsilon_is_that_of_dp_accounting_within_a_percent(charges: list[Charge], delta: float) -> None:
    assert total_epsilon(charges, delta) == pytest.approx(by_dp_accounting(charges, delta), rel=0.01)


def test_a_federation_of_ten_rounds_costs_what_is_known_of_it() -> None:
    rounds = [Charge(1.0, 64 / 10_000, 157)] * 10
    assert total_epsilon(rounds, 1e-5) == total_epsilon([SPEC], 1e-5)
    assert total_epsilon(rounds, 1e-5) == pytest.approx(1.40, abs=0.01)


def test_nothing_costs_nothing_and_order_does_not_matter() -> None:
    one, other = Charge(1.0, 0.3, 6), Charge(1.3, 0.2, 9)
    assert total_epsilon([], 1e-5) == 0
    assert total_epsilon([one, other], 1e-5) == total_epsilon([other, one], 1e-5)
    assert total_epsilon([one, other], 1e-5) > total_epsilon([one], 1e-5)


def test_noise_that_protects_little_is_counted_quickly_and_from_above() -> None:
    found = total_epsilon([Charge(0.15, 0.3, 6)], 1e-5)
    assert by_dp_accounting([Charge(0.15, 0.3, 6)], 1e-5) < found < math.inf


@pytest.mark.parametrize("spent", [[], [Charge(2.0, 0.1, 20)]], ids=["at first", "after a round"])
def test_the_least_noise_keeps_to_the_budget_and_one_percent_less_does_not(spent: list[Charge]) -> None:
    noise = least_noise(spent, sample_rate=0.1, steps=60, epsilon=3.0, delta=1e-5)
    assert noise is not None
    assert total_epsilon([*spent, Charge(noise, 0.1, 60)], 1e-5) <= 3.0
    assert total_epsilon([*spent, Charge(0.99 * noise, 0.1, 60)], 1e-5) > 3.0


def test_no_noise_is_enough_once_the_budget_is_spent() -> None:
    assert total_epsilon([SPEC], 1e-5) > 1.4
    assert least_noise([SPEC], sample_rate=0.1, steps=60, epsilon=1.4, delta=1e-5) is None


def test_without_opacus_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UsageProblem, match="opacus, which is not installed") as caught:
        total_epsilon([Charge(1.0, 0.123, 7)], 1e-5)
    assert "pip install '.[dp]'" in str(caught.value.mend)
