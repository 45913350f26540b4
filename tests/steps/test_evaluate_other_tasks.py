"""evaluate --tasks and compare --tasks: scores of other tasks than the settings name, apart from those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import TASK, Outcome, adapters, edit, published, questions, scale
from stages.artefacts.records import read_result
from stages.report import own_tasks
from stages.workspace.paths import Workspace

Command = Callable[..., Outcome]
AGREED = "results/round-0002/slm.json"
OTHER = "results/own-tasks/shades+limit-7/round-0002/slm.json"


def with_shades(folder: Path) -> Path:
    """Another task beside the one that the agreement names, of questions of its own."""
    (folder / "tasks/shades.yaml").write_text(TASK.replace("colours", "shades").replace("test.jsonl", "shades.jsonl"))
    asked = [one | {"question": f"big {one['question']}"} for one in questions(12)]
    (folder / "data/shades.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    return folder


@pytest.fixture
def scored(finished: Path, fedcollm: Command) -> Path:
    """The server's SLM, scored as agreed and on the other task."""
    for words in ("", "--tasks shades --limit 7"):
        outcome = fedcollm("evaluate", "--round", 2, *words.split(), "-w", with_shades(finished))
        assert outcome.code == 0, outcome.err
    return finished


def test_they_are_what_the_settings_would_give_and_stand_apart(scored: Path, fedcollm: Command) -> None:
    found = read_result(scored / OTHER)
    assert found["tasks"].keys() == {"shades"}
    assert (found["tasks"]["shades"]["questions"], found["tasks"]["shades"]["questions_in_all"]) == (7, 12)
    assert read_result(scored / AGREED)["tasks"].keys() == {"colours"}
    (scored / "evaluation.toml").write_text('tasks = ["shades"]\nlimit = 7\nbatch_size = 8\n')
    assert fedcollm("evaluate", "--round", 2, "--overwrite", "-w", scored).code == 0
    assert read_result(scored / AGREED)["tasks"] == found["tasks"]


def test_a_limit_is_said_by_its_own_name(finished: Path, fedcollm: Command) -> None:
    outcome = fedcollm("evaluate", "--round", 2, "--tasks", "shades", "--limit", 7, "-w", with_shades(finished))
    assert "only the first 7 of 12 questions of shades count, by --limit" in " ".join(outcome.err.split())


def test_neither_status_nor_a_plain_compare_takes_them_for_the_agreed_scores(scored: Path, fedcollm: Command) -> None:
    before = fedcollm("status", "--json", "-w", scored).out
    (scored / AGREED).unlink()
    assert "slm" in fedcollm("status", "-w", scored).out
    assert fedcollm("evaluate", "--round", 2, "-w", scored).code == 0
    assert fedcollm("status", "--json", "-w", scored).out == before
    assert fedcollm("compare", "-w", scored).code == 3  # the agreed scores of other models are not there


def test_what_is_done_is_not_done_again_until_the_task_or_the_adapter_is_another(
    scored: Path, fedcollm: Command
) -> None:
    words = ("evaluate", "--round", 2, "--tasks", "shades", "--limit", 7, "-w", scored)
    before = (scored / OTHER).read_bytes()
    assert "already done" in fedcollm(*words).err
    assert (scored / OTHER).read_bytes() == before
    edit(scored / "tasks/shades.yaml", '"{{question}}"', '"small {{question}}"')
    assert fedcollm(*words).code == 0
    assert read_result(scored / OTHER)["tasks_sha256"] != json.loads(before)["tasks_sha256"]


def test_the_report_shows_them_and_says_what_has_become_another(scored: Path, fedcollm: Command) -> None:
    assert fedcollm("evaluate", "--zero-shot", "--tasks", "shades", "-w", scored).code == 0
    [table] = own_tasks.tables(Workspace(scored))
    assert [row[:4] for row in table.rows] == [
        ["slm", "base", "shades", "12"],
        ["slm", "2", "shades", "the first 7 of 12"],
    ]
    accuracy = read_result(scored / OTHER)["tasks"]["shades"]["metrics"]["acc"]
    assert table.rows[1][4].startswith(f"acc {100 * accuracy:.1f} ± ")
    scale(Workspace(scored).slm(2), 3)
    assert own_tasks.tables(Workspace(scored))[0].rows[1][2] == "shades (of another adapter)"
    edit(scored / "tasks/shades.yaml", '"{{question}}"', '"small {{question}}"')
    assert [row[2] for row in own_tasks.tables(Workspace(scored))[0].rows] == ["shades (of other questions)"] * 2
    assert fedcollm("report", "-w", scored).code == 0
    assert "Tasks beside those of the settings" in (scored / "results/report/index.html").read_text()


def test_a_changed_score_is_noticed(scored: Path, fedcollm: Command) -> None:
    edit(scored / OTHER, '"subject": "slm"', '"subject": "llm"')
    outcome = fedcollm("status", "--verify", "-w", scored)
    assert outcome.code == 4
    assert OTHER in outcome.out


def test_methods_are_compared_by_them_and_nothing_is_trained_for_it(studied: Path, fedcollm: Command) -> None:
    with_shades(studied)
    outcome = fedcollm("compare", "--tasks", "shades", "-w", studied)
    assert outcome.code == 3
    assert "fedcollm compare --seeds 7,8 --methods" in outcome.err
    assert "--tasks shades" in outcome.err
    words = ("--seeds", 7, "--methods", "fedavg,fedcollm", "--tasks", "shades", "--limit", 9)
    trained, agreed = adapters(studied / "exchange"), published(studied / "results/round-0002")
    outcome = fedcollm("compare", *words, "--json", "-w", studied)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["tables"]["slm"]["fedavg"].keys() == {"shades", "all tasks"}
    assert found["tables"]["slm"]["fedavg"]["shades"]["questions"] == 9
    assert found["differences"]["slm"].keys() == {"zero-shot", "fedavg"}
    assert (adapters(studied / "exchange"), published(studied / "results/round-0002")) == (trained, agreed)
    told = " ".join(fedcollm("compare", *words, "--collect", "-w", studied).out.split())
    assert "of tasks that a command named, not of those that the settings name" in told
    assert "only the first questions count, by --limit: 9 of 12 of shades" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate --round 2 --tasks colors", "no task named 'colors', here or in lm-eval"),
        ("evaluate --round 2 --limit 3", "--limit is for --tasks"),
        ("evaluate --round 2 --tasks colours,", "--tasks 'colours,' is not a list of tasks"),
        ("evaluate --round 2 --tasks colours,colours", "is not a list of tasks"),
        ("evaluate --round 2 --tasks colours --rows x.jsonl", "--tasks and --limit are of questions, not of --rows"),
        ("compare --seeds 7 --tasks colours --slurm", "--tasks is for what runs here"),
        ("compare --limit 3", "--limit is for --tasks"),
    ],
)
def test_what_cannot_be_is_refused(words: str, message: str, finished: Path, fedcollm: Command) -> None:
    before = sorted(finished.rglob("*"))
    outcome = fedcollm(*words.split(), "-w", finished)
    assert outcome.code == 2, outcome.err
    assert message in " ".join(outcome.err.split())
    assert sorted(finished.rglob("*")) == before


def test_a_folder_is_named_by_tasks_and_limit(tmp_path: Path) -> None:
    assert Workspace(tmp_path).asking(["arc_easy"], None).scores == tmp_path / "results/own-tasks/arc_easy"
    assert Workspace(tmp_path).asking(["a", "b"], 20).scores.name == "a+b+limit-20"


def test_names_that_are_no_folders_names_have_one_each(tmp_path: Path) -> None:
    places = [Workspace(tmp_path).asking([name], None).scores for name in ("../up", "a/b", "a:b", "x" * 300, ".hidden")]
    assert {place.parent for place in places} == {tmp_path / "results/own-tasks"}
    assert len(set(places)) == 5
    assert all(len(place.name) < 200 and place.name[0] != "." for place in places)
