"""spending: a ledger that counts before anything is spent, and that shows when somebody had his hands on it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from builders import edit, sign
from stages.accounting.accountant import Charge, total_epsilon
from stages.accounting.budget import check, claim, finish, reserve, reset
from stages.accounting.ledger import charges, read_ledger
from stages.runtime.errors import BadNumbers, Damaged, Refused, UsageProblem
from stages.workspace.paths import Workspace

ROWS, STEPS, RATE = 12, 6, 4 / 12  # builders.AGREEMENT: batches of 4


@pytest.fixture
def federation(workspace_folder: Path) -> Path:
    """Two rounds with noise 1, and a budget that allows more than two."""
    return privately(workspace_folder, "noise_multiplier = 1.0\nepsilon = 12.0")


def privately(folder: Path, settings: str) -> Path:
    toml = folder / "fedcollm.toml"
    toml.write_text(f"{toml.read_text()}\n[privacy]\ndelta = 1e-5\n{settings}\n")
    return folder


def spend(folder: Path, round: int, attempt: str, step: int = 0) -> Charge:
    return reserve(Workspace(folder), 1, round, ROWS, attempt=attempt, step=step)


def ledger(folder: Path) -> Path:
    return folder / "private/client-1/privacy-ledger.jsonl"


def test_a_reservation_is_on_the_disk_with_what_it_comes_to(federation: Path) -> None:
    assert spend(federation, 1, "a") == Charge(1.0, RATE, STEPS)
    assert spend(federation, 2, "b") == Charge(1.0, RATE, STEPS)
    entries = [json.loads(line)["entry"] for line in ledger(federation).read_text().splitlines()]
    assert [(entry["kind"], entry["round"], entry["attempt"]) for entry in entries] == [
        ("reserved", 1, "a"),
        ("reserved", 2, "b"),
    ]
    assert [entry["epsilon"] for entry in entries] == [
        total_epsilon([Charge(1.0, RATE, count)], 1e-5) for count in (STEPS, 2 * STEPS)
    ]
    public = claim(Workspace(federation), 1)
    assert public is not None
    assert not public.reset
    assert entries[-1]["epsilon"] <= public.epsilon < entries[-1]["epsilon"] + 1e-4


def test_a_run_that_goes_on_spends_nothing_more_and_is_noted(federation: Path) -> None:
    first = spend(federation, 1, "a")
    assert spend(federation, 1, "a", 4) == first
    entries = [line.entry for line in read_ledger(ledger(federation))]
    assert [entry.kind for entry in entries] == ["reserved", "resumed"]
    assert charges(read_ledger(ledger(federation))) == [first]


def test_a_run_that_begins_anew_spends_again_until_the_budget_ends(federation: Path) -> None:
    within = max(n for n in range(1, 10) if total_epsilon([Charge(1.0, RATE, n * STEPS)], 1e-5) <= 12.0)
    assert within > 1
    for number in range(within):
        spend(federation, 1, f"attempt-{number}")
    before = ledger(federation).read_bytes()
    with pytest.raises(BadNumbers, match="round 1 would bring client 1 to epsilon") as caught:
        spend(federation, 1, "one more")
    assert ledger(federation).read_bytes() == before
    assert "privacy.epsilon" in str(caught.value.mend)


def test_the_noise_is_the_least_for_all_rounds_and_stays_the_same(workspace_folder: Path) -> None:
    privately(workspace_folder, "epsilon = 8.0")
    first, second = spend(workspace_folder, 1, "a"), spend(workspace_folder, 2, "b")
    assert first == second
    assert 7.9 < total_epsilon([first, second], 1e-5) <= 8.0


@pytest.mark.slow
def test_after_a_round_that_was_spent_twice_the_rest_takes_more_noise_and_keeps_to_the_budget(
    workspace_folder: Path,
) -> None:
    privately(workspace_folder, "epsilon = 8.0")
    once, twice = spend(workspace_folder, 1, "a"), spend(workspace_folder, 1, "b")
    assert once.noise_multiplier < twice.noise_multiplier
    assert total_epsilon([once, twice, twice], 1e-5) <= 8.0  # with the second round


def test_where_too_much_is_spent_already_no_noise_is_tried(workspace_folder: Path) -> None:
    privately(workspace_folder, "noise_multiplier = 1.0")
    spend(workspace_folder, 1, "a")
    edit(workspace_folder / "fedcollm.toml", "noise_multiplier = 1.0", "epsilon = 2.0")
    with pytest.raises(BadNumbers, match=r"client 1 has spent epsilon 6\.\d+ of 2; no noise makes round 2"):
        spend(workspace_folder, 2, "b")


def test_noise_that_protects_nothing_is_refused(workspace_folder: Path) -> None:
    privately(workspace_folder, "noise_multiplier = 1e-4")
    with pytest.raises(BadNumbers, match="protects nothing: epsilon is infinite"):
        check(Workspace(workspace_folder), client=1, round=1, examples=ROWS)


def test_without_an_epsilon_noise_is_counted_and_never_refused(workspace_folder: Path) -> None:
    privately(workspace_folder, "noise_multiplier = 0.5")
    for attempt in "abcd":
        spend(workspace_folder, 1, attempt)
    public = claim(Workspace(workspace_folder), 1)
    assert public is not None
    expected = total_epsilon([Charge(0.5, RATE, 4 * STEPS)], 1e-5)
    assert public.epsilon == math.ceil(expected * 1e4) / 1e4


def test_small_data_is_taken_whole(workspace_folder: Path) -> None:
    privately(workspace_folder, "noise_multiplier = 1.0")
    assert reserve(Workspace(workspace_folder), 1, 1, 3, attempt="a", step=0).sample_rate == 1.0


def edited(text: str) -> str:
    return text.replace('"steps": 6', '"steps": 1', 1)


def last_edited(text: str) -> str:
    start = text.rindex('"steps": 6')
    return text[:start] + edited(text[start:])


def swapped(text: str) -> str:
    first, second, *rest = text.splitlines(keepends=True)
    return "".join([second, first, *rest])


DAMAGE = {
    "a line edited": (edited, "line 1 of privacy-ledger.jsonl has been changed"),
    "the last line edited": (last_edited, "line 3 of privacy-ledger.jsonl has been changed"),
    "two lines swapped": (swapped, "line 1 of privacy-ledger.jsonl has been changed, or does not follow"),
    "the first line gone": (lambda text: text.partition("\n")[2], "does not follow the line before"),
    "a line cut short": (lambda text: text[:-40], "line 3 of privacy-ledger.jsonl is not a line"),
    "the end of the last line gone": (lambda text: text[:-1], "ends in the middle of a line"),
    "something else": (lambda text: "{}\n" + text, "line 1 of privacy-ledger.jsonl is not a line"),
    "emptied": (lambda text: "", "line 1 of privacy-ledger.jsonl is not a line"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_ledger_that_was_tampered_with_is_refused(name: str, federation: Path) -> None:
    change, told = DAMAGE[name]
    for attempt in "abc":
        spend(federation, 1, attempt)
    ledger(federation).write_text(change(ledger(federation).read_text()))
    before = ledger(federation).read_bytes()
    with pytest.raises(Damaged, match=told) as caught:
        spend(federation, 2, "d")
    assert "--i-understand-reset" in str(caught.value.mend)
    assert ledger(federation).read_bytes() == before


def test_what_a_client_of_fedmkt_tells_anchors_its_ledger(equal: Path) -> None:
    privately(equal, "noise_multiplier = 1.0")
    spend(equal, 1, "a")
    [line] = read_ledger(ledger(equal))
    claimed = {"unit": "example", "epsilon": 1.0, "delta": 1e-5, "ledger_sha256": line.sha256}
    sign(equal / "exchange/round-0001/client-1", privacy=claimed)
    check(Workspace(equal), client=1, round=2, examples=ROWS)
    ledger(equal).unlink()
    with pytest.raises(Damaged, match="it lacks the line that exchange/round-0001/client-1 was made after"):
        check(Workspace(equal), client=1, round=2, examples=ROWS)


def test_a_checkpoint_that_the_ledger_does_not_know_is_no_licence(federation: Path) -> None:
    spend(federation, 1, "a")
    with pytest.raises(Damaged, match="does not know the run that was stopped here"):
        spend(federation, 1, "b", 4)


def test_a_finished_run_goes_on_with_its_own_adapter_alone(federation: Path) -> None:
    first, (own, other) = spend(federation, 1, "a"), ("1" * 64, "2" * 64)
    for _ in range(2):  # a crash while publishing
        finish(Workspace(federation), 1, 1, attempt="a", adapter=own)
        assert reserve(Workspace(federation), 1, 1, ROWS, attempt="a", step=STEPS, adapter=own) == first
    before = ledger(federation).read_bytes()
    for step, adapter in ((STEPS, other), (4, other), (4, own), (0, other)):
        with pytest.raises(Refused, match=f"this run has finished; its checkpoint of step {step} ") as caught:
            reserve(Workspace(federation), 1, 1, ROWS, attempt="a", step=step, adapter=adapter)
        assert "--overwrite, which trains and spends anew" in str(caught.value.mend)
    assert ledger(federation).read_bytes() == before
    assert [line.entry.kind for line in read_ledger(ledger(federation))] == ["reserved", "finished"] + ["resumed"] * 2


def test_a_reset_counts_from_zero_and_is_on_record(federation: Path) -> None:
    spend(federation, 1, "a")
    reset(Workspace(federation), 1)
    spend(federation, 2, "b")
    first, second = (line.entry for line in read_ledger(ledger(federation)))
    assert (first.kind, second.kind) == ("reset", "reserved")
    public = claim(Workspace(federation), 1)
    assert public is not None
    assert public.reset
    assert charges(read_ledger(ledger(federation))) == [Charge(1.0, RATE, STEPS)]


def test_gradient_checkpointing_is_refused_before_anything_else(federation: Path) -> None:
    (federation / "machine.toml").write_text("gradient_checkpointing = true\n")
    with pytest.raises(UsageProblem, match="hides the gradient of each example") as caught:
        check(Workspace(federation), client=1, round=1, examples=ROWS)
    assert str(caught.value.where).endswith("machine.toml")


def test_a_run_whose_line_is_gone_or_that_another_process_has_ended_publishes_nothing(federation: Path) -> None:
    spend(federation, 1, "a")
    with pytest.raises(Damaged, match="does not know the run"):
        finish(Workspace(federation), 1, 1, attempt="b", adapter="1" * 64)
    finish(Workspace(federation), 1, 1, attempt="a", adapter="1" * 64)
    finish(Workspace(federation), 1, 1, attempt="a", adapter="1" * 64)
    with pytest.raises(Refused, match="has finished with another adapter"):
        finish(Workspace(federation), 1, 1, attempt="a", adapter="2" * 64)
    assert [line.entry.kind for line in read_ledger(ledger(federation))] == ["reserved", "finished"]
