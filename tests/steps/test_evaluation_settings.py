"""evaluation.toml: who scores otherwise need not agree on it, and nothing that was trained is touched by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import TASK, Outcome

Command = Callable[..., Outcome]


def _result(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "results/round-0002/slm.json").read_bytes())
    assert isinstance(found, dict)
    return found


def _scores(outcome: Outcome) -> dict[str, str]:
    return {score["name"]: score["condition"] for score in json.loads(outcome.out)["scores"]}


def test_one_task_more_is_scored_without_a_word_to_others(finished: Path, fedcollm: Command) -> None:
    assert fedcollm("evaluate", "--round", 2, "-w", finished).code == 0
    agreed = _result(finished)
    assert "evaluation" not in agreed
    assert list(agreed["tasks"]) == ["colours"]  # type: ignore[call-overload]

    (finished / "tasks/shapes.yaml").write_text(TASK.replace("task: colours", "task: shapes"))
    assert _scores(fedcollm("status", "--json", "-w", finished))["slm"] == "done"  # no agreed task needs that file
    (finished / "evaluation.toml").write_text('tasks = ["colours", "shapes"]\nlimit = 5\n')
    told = fedcollm("status", "--json", "-w", finished)
    assert _scores(told)["slm"] == "missing"
    assert "it was scored by other settings of evaluation" in told.out
    assert not json.loads(told.out)["edited"]
    assert all(step["condition"] == "done" for one in json.loads(told.out)["rounds"] for step in one["steps"])

    assert fedcollm("evaluate", "--round", 2, "-w", finished).code == 0
    more = _result(finished)
    assert list(more["tasks"]) == ["colours", "shapes"]  # type: ignore[call-overload]
    assert more["evaluation"]["limit"] == more["limit"] == 5  # type: ignore[index]
    assert _scores(fedcollm("status", "--json", "-w", finished))["slm"] == "done"
    assert fedcollm("verify", "-w", finished).code == 0

    (finished / "evaluation.toml").unlink()
    assert _scores(fedcollm("status", "--json", "-w", finished))["slm"] == "missing"
    assert fedcollm("evaluate", "--round", 2, "-w", finished).code == 0
    assert _result(finished) == agreed


def test_the_same_settings_in_it_are_the_agreed_ones(finished: Path, fedcollm: Command) -> None:
    assert fedcollm("evaluate", "--round", 2, "-w", finished).code == 0
    before = (finished / "results/round-0002/slm.json").read_bytes()
    (finished / "evaluation.toml").write_text('# as agreed\ntasks = ["colours"]\nbatch_size = 8\n')
    outcome = fedcollm("evaluate", "--round", 2, "-w", finished)
    assert (outcome.code, (finished / "results/round-0002/slm.json").read_bytes()) == (0, before)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[evaluation]\nlimit = 5\n", "evaluation: unknown key"),
        ("limitt = 5\n", "limitt: unknown key; did you mean limit?"),
        ("limit = 0\n", "limit: "),
        ("limit\n", "evaluation.toml:1"),
    ],
)
def test_a_mistake_in_it_is_named(finished: Path, fedcollm: Command, text: str, said: str) -> None:
    (finished / "evaluation.toml").write_text(text)
    for command in ("evaluate --round 2", "status", "run"):
        outcome = fedcollm(*command.split(), "-w", finished)
        assert (outcome.code, said in outcome.err, "Traceback" in outcome.err) == (2, True, False), outcome.err
    if "unknown" in said:
        assert "fedcollm.toml, under [evaluation]" in outcome.err


def test_an_edit_of_the_agreement_that_is_of_scores_alone_says_where_it_could_stand(
    finished: Path, fedcollm: Command
) -> None:
    agreement = finished / "fedcollm.toml"
    agreement.write_text(agreement.read_text().replace("[evaluation]", "[evaluation]\nlimit = 3"))
    outcome = fedcollm("status", "-w", finished)
    assert "what evaluation.toml says instead need not be agreed on" in " ".join(outcome.out.split())
