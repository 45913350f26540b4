"""The benchmarks' own claims: peers compute what client-train computes, and figures are shown as said."""

from __future__ import annotations

from typing import Any

import pytest

from builders import examples, tuned
from stages.training import schedule
from stages.workspace.budgets import ClientTraining
from tests.benchmarks import client_train, co_distill, repeats, trainers
from tests.benchmarks import gpt2_on_arc as arc

ROWS = examples([(3 + i % 5, 1 + i % 3) for i in range(32)])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The rows of client-train's steps, with a tiny model in place of GPT-2's shape."""
    monkeypatch.setattr(arc, "model", lambda role, layers, **_: tuned(role))
    monkeypatch.setattr(arc, "PAD", 1)
    plan = schedule.schedule(len(ROWS), ClientTraining(steps=client_train.STEPS, batch_size=arc.BATCH), seed=1)
    return [[ROWS[i] for i in step] for step in plan]


@pytest.mark.parametrize("peer", [trainers.padded, trainers.flattened, trainers.sft])
def test_each_peer_has_the_losses_of_client_train(steps: list[list[Any]], peer: Any) -> None:
    if peer is trainers.sft and not (trainers.has_trl() and arc.available()):
        pytest.skip("trl, or the tokenizer that it asks for, is not here")
    ours, theirs = client_train.ours(ROWS, autocast=False), peer(steps, 2, client_train.RATE, bfloat16=False)
    assert len(theirs.losses) == client_train.STEPS
    assert client_train.difference(ours, theirs) < 1e-5
    assert ours.losses[0]["slm_ft"] - ours.losses[-1]["slm_ft"] != 0


def test_mutual_distillation_as_people_write_it_has_the_losses_of_co_distill(
    steps: list[list[Any]],
) -> None:
    plan = schedule.schedule(len(ROWS), co_distill.SETTINGS, seed=1)
    ours = co_distill.ours(list(ROWS), ("slm", "llm"), autocast=False)
    theirs = co_distill.usual(list(ROWS), plan, autocast=False)
    sums = [sum(step[name] for name in ("slm_ft", "slm_kd", "llm_ft", "llm_kd")) for step in ours.losses]
    assert [step["loss"] for step in theirs.losses] == pytest.approx(sums, abs=1e-4)


def test_the_median_is_shown_between_the_smallest_and_the_largest() -> None:
    assert repeats.shown([3.0, 1.0, 2.25]) == "2.25 (1.00 to 3.00)"
    assert repeats.shown([1.001, 1.002]) == "1.00"


def test_what_cannot_run_here_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arc, "precisions", lambda: ["float32"])
    monkeypatch.setattr(trainers, "has_trl", lambda: False)
    names = ("ours", "matmuls", client_train.FLATTENED, client_train.PADDED)
    clocks = {f"{name} float32": [arc.Clock([0.0, second]) for second in (1.0, 2.0)] for name in names}
    for lap in (lap for laps in clocks.values() for lap in laps):
        lap.losses = [{"slm_ft": 1.0}]
    rows = client_train.rows_of(clocks, tokens=100)
    assert arc.NO_BFLOAT16 in rows
    assert client_train.NO_TRL in rows
    assert not any("SFTTrainer" in what for what, measured, _ in rows if measured != "-")
