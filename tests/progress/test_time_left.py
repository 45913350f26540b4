"""status: how long the training that is left here will take, by the logs of what was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome
from stages.progress.status import status
from stages.progress.time_left import seconds_left
from stages.workspace.paths import Workspace


def took(log: Path, seconds: float) -> None:
    """Let a log say that its step took so long."""
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {"wall_s": seconds})]) + "\n")


def left_in(workspace: Workspace) -> float | None:
    return seconds_left(workspace, status(workspace).rounds)


@pytest.fixture
def half(finished: Path) -> Workspace:
    """Round 1 is done, in which clients took 100, 200 and 300 s, and the server 1000 s."""
    for folder in finished.glob("*/**/round-0002"):
        shutil.rmtree(folder)
    workspace = Workspace(finished)
    for k, seconds in ((1, 100), (2, 200), (3, 300)):
        took(workspace.log("client-train", 1, k), seconds)
    took(workspace.log("co-distill", 1), 1000)
    return workspace


def test_each_step_that_is_left_takes_as_long_as_it_took(half: Workspace, fedcollm: Callable[..., Outcome]) -> None:
    assert left_in(half) == pytest.approx(3 * 200 + 1000)
    assert "about 27 min of training left here" in fedcollm("status", "-w", half.root).out


def test_a_party_counts_its_own_steps(half: Workspace) -> None:
    for other in ("server", "client-1", "client-3"):
        shutil.rmtree(half.private / other)
    assert left_in(half) == pytest.approx(200)


def test_where_nothing_was_trained_nothing_is_told(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert left_in(Workspace(workspace_folder)) is None
    assert "of training left" not in fedcollm("status", "-w", workspace_folder).out


def test_where_nothing_is_left_nothing_is_told(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert left_in(Workspace(finished)) == 0
    assert "of training left" not in fedcollm("status", "-w", finished).out


@pytest.mark.parametrize("text", ["", "nothing", '{"wall_s": "x"}', "[1]"])
def test_a_log_that_says_nothing_is_passed_over(text: str, half: Workspace) -> None:
    half.log("client-train", 1, 3).write_text(text)
    assert left_in(half) == pytest.approx(3 * 150 + 1000)
