"""How long is left of several federations, by a clock that is set by hand."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcollm_cli.console import duration
from stages.federation.run import run
from stages.federation.time_left import TimeLeft, rounds_to_make
from stages.runtime.events import SECONDS_LEFT, Event
from stages.workspace.paths import Workspace


class Clock:
    """Seconds since it was made, as far as somebody has let pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def said() -> list[Event]:
    return []


def round_of(left: TimeLeft, clock: Clock, number: int, seconds: float) -> None:
    left.report(Event("round", "a round", step=number, total=9))
    left.report(Event("stage", "client-train"))
    clock.now += seconds


def told(said: list[Event]) -> Iterator[float | None]:
    return (event.values.get(SECONDS_LEFT) for event in said if event.kind == "round")


def test_rounds_of_a_kind_take_what_they_took_and_others_what_all_took(said: list[Event]) -> None:
    clock = Clock()
    left = TimeLeft([("a", {1, 2}), ("b", {1}), ("a", {1, 2})], said.append, clock)
    left.begin("the first")
    round_of(left, clock, 1, 10)
    round_of(left, clock, 2, 20)
    left.end()
    left.begin("the second")
    round_of(left, clock, 1, 60)
    left.end()
    left.begin("the third")
    round_of(left, clock, 1, 15)
    # Nothing is known at first. After a round of 10 s four are left. After 10 and 20 s a round takes 15: of three.
    # The round of 60 s is of another kind: two rounds of 15 s are left, though the mean of all is 30.
    assert list(told(said)) == [None, None, 40, 45, 45, 30, 30]
    assert next(event.text for event in said if event.kind == "round") == "the first"
    assert sum(event.kind == "stage" for event in said) == 4, "everything else is handed on"


def test_rounds_that_are_done_count_as_nothing(said: list[Event]) -> None:
    clock = Clock()
    left = TimeLeft([("", {3}), ("", {1, 2, 3})], said.append, clock)
    left.begin("the first")
    for number, seconds in ((1, 0.5), (2, 0.5), (3, 8)):
        round_of(left, clock, number, seconds)
    left.end()
    left.begin("the second")
    assert list(told(said)) == [None, None, None, None, 24]


def test_where_nothing_is_left_nothing_is_told(said: list[Event]) -> None:
    clock = Clock()
    left = TimeLeft([("", {1}), ("", set())], said.append, clock)
    left.begin("the first")
    round_of(left, clock, 1, 5)
    left.end()
    left.begin("the second")
    assert list(told(said)) == [None, None, None]


def test_run_tells_the_time_left_once_a_round_was_made(workspace_folder: Path, said: list[Event]) -> None:
    run(Workspace(workspace_folder), scores=False, report=said.append)
    first, second = told(said)
    assert first is None
    assert second is not None
    assert second > 0
    said.clear()
    run(Workspace(workspace_folder), scores=False, report=said.append)
    assert list(told(said)) == [None, None], "all is done already"


def test_what_is_to_be_made_of_a_workspace(finished: Path) -> None:
    workspace = Workspace(finished)
    assert rounds_to_make(finished, workspace, overwrite=False) == set()
    assert rounds_to_make(finished, workspace, overwrite=True) == {1, 2}
    assert rounds_to_make(finished / "nowhere", workspace, overwrite=False) == {1, 2}
    shutil.rmtree(finished / "private/server/round-0002")
    assert rounds_to_make(finished, workspace, overwrite=False) == {2}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(7.4, "7 s"), (119, "119 s"), (150, "2.5 min"), (1800, "30 min"), (9000, "2.5 h"), (3 * 86400, "3.0 days")],
)
def test_a_time_is_told_in_the_unit_that_one_plans_in(seconds: float, words: str) -> None:
    assert duration(seconds) == words
