"""audit of differential privacy: public claims, and the ledger that they must come from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import edit, sign
from damages import problems
from stages.accounting.accountant import Charge, total_epsilon
from stages.accounting.ledger import Line, Reserved, Reset
from stages.audit.audit import audit

DELTA, CHARGE = 1e-5, Charge(noise_multiplier=2.0, sample_rate=0.25, steps=6)
EPSILON = [total_epsilon([CHARGE] * rounds, DELTA) for rounds in (1, 2)]
LEDGER = "private/client-2/privacy-ledger.jsonl"


def claimed(epsilon: float, *, reset: bool = False) -> dict[str, object]:
    return {"unit": "example", "epsilon": math.ceil(epsilon * 1e4) / 1e4, "delta": DELTA, "reset": reset}


def write(folder: Path, *epsilons: float, reset: bool = False) -> None:
    """Client 2's ledger, which says these epsilons after rounds 1, 2, ..."""
    entries: list[Reserved | Reset] = [
        Reserved(round=round, attempt="x", delta=DELTA, epsilon=epsilon, **CHARGE._asdict())
        for round, epsilon in enumerate(epsilons, 1)
    ]
    put(folder, [*entries, RESET] if reset else entries)


def put(folder: Path, entries: list[Reserved | Reset]) -> None:
    lines: list[Line] = []
    for entry in entries:
        lines.append(Line.after(lines, entry))
    (folder / LEDGER).write_text("".join(json.dumps(line.model_dump(), sort_keys=True) + "\n" for line in lines))


@pytest.fixture
def private(finished: Path) -> Path:
    """A workspace whose clients claim what two rounds of DP-SGD with this noise come to; client 2's ledger is here."""
    edit(finished / "fedcollm.toml", "[distillation]", "[privacy]\nepsilon = 8.0\n[distillation]")
    for round, epsilon in enumerate(EPSILON, 1):
        for client in (1, 2, 3):
            sign(finished / f"exchange/round-000{round}/client-{client}", privacy=claimed(epsilon))
    write(finished, *EPSILON)
    return finished


def told(folder: Path) -> list[str]:
    return [line for line in problems(audit([folder])) if line.startswith("A10")]


def test_claims_that_the_ledger_bears_out_are_in_order(private: Path) -> None:
    assert told(private) == []
    [found] = [one for one in audit([private]) if one.id == "A10"]
    assert found.text == "6 claims within the budget, 1 ledger on this machine composed"


TWO = "exchange/round-0002/client-2"
FALSE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a ledger that says less": (lambda f: write(f, EPSILON[0], EPSILON[0]), f"{LEDGER}: line 2 says epsilon"),
    "a line changed": (lambda f: edit(f / LEDGER, '"round": 2', '"round": 3'), f"{LEDGER}: line 2 of privacy-ledger"),
    "a reset": (lambda f: write(f, *EPSILON, reset=True), f"{LEDGER}: line 3: somebody chose to count from zero"),
    "a claim of less": (lambda f: sign(f / TWO, privacy=claimed(1.0)), f"{TWO}: claims epsilon 1.0000; expected"),
    "a reset that is claimed": (lambda f: sign(f / TWO, privacy=claimed(3.0, reset=True)), f"{TWO}: epsilon 3 since a"),
    "less than before": (lambda f: sign(f / TWO, privacy=claimed(0.5)), f"{TWO}: epsilon 0.5, after"),
    "no claim": (lambda f: sign(f / TWO, privacy=None), f"{TWO}: claims no privacy"),
    "over the budget": (lambda f: sign(f / TWO, privacy=claimed(9.0)), f"{TWO}: epsilon 9; expected at most 8"),
    "another delta": (lambda f: sign(f / TWO, privacy=claimed(EPSILON[1]) | {"delta": 0.1}), f"{TWO}: delta 0.1; exp"),
}


@pytest.mark.parametrize("kind", FALSE)
def test_what_is_claimed_falsely_is_found(kind: str, private: Path) -> None:
    harm, expected = FALSE[kind]
    harm(private)
    assert any(line.partition(" ")[2].partition(" ")[2].startswith(expected) for line in told(private)), told(private)


def test_a_round_that_was_trained_again_after_a_later_one_is_no_reset(private: Path) -> None:
    thrice = total_epsilon([CHARGE] * 3, DELTA)
    again = Reserved(round=1, attempt="again", delta=DELTA, epsilon=thrice, **CHARGE._asdict())
    lines = [
        Reserved(round=round, attempt="x", delta=DELTA, epsilon=EPSILON[round - 1], **CHARGE._asdict())
        for round in (1, 2)
    ]
    put(private, [*lines, again])
    for client in (2, 3):
        sign(private / f"exchange/round-0001/client-{client}", privacy=claimed(thrice))
    [found] = told(private)  # of client 3 there is no ledger here
    assert "round-0002/client-3: epsilon" in found
    assert "was trained again since, or the ledger was begun anew and does not say so" in found


RESET = Reset(rounds=[1, 2], replaced_sha256=None)
SPENT = Reserved(round=2, attempt="y", delta=DELTA, epsilon=EPSILON[0], **CHARGE._asdict())
AFTER: dict[str, tuple[list[Reserved | Reset], dict[str, object] | None, str]] = {
    "nothing was trained since": ([RESET], None, ""),
    "a round trained since": ([RESET, SPENT], claimed(EPSILON[0], reset=True), ""),
    "a round trained since, not yet published": ([RESET, SPENT], None, ""),
    "a claim of less since": (
        [RESET, SPENT],
        claimed(0.5, reset=True),
        "claims epsilon 0.5000 since a reset",
    ),
    "a reset kept quiet": ([RESET.model_copy(update={"rounds": [1]}), SPENT], claimed(EPSILON[0]), "claims epsilon"),
    "a round that was not given up": ([RESET.model_copy(update={"rounds": [1]})], None, "claims epsilon"),
}


@pytest.mark.parametrize("kind", AFTER)
def test_after_a_reset_what_came_before_it_is_not_held_against_the_ledger(kind: str, private: Path) -> None:
    entries, claim, expected = AFTER[kind]
    put(private, entries)
    if claim:
        sign(private / TWO, privacy=claim)
    failed = [one for one in audit([private]) if one.id == "A10" and one.level == "FAIL"]
    assert [one.where.endswith(TWO) for one in failed] == [True] * bool(expected)
    assert all(one.found.startswith(expected) for one in failed)
