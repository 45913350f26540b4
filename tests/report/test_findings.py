"""What the report shows is what the files say, by arithmetic that is shown here."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest

from builders import edit
from stages.files import reading, writing
from stages.report import findings
from stages.study.variants import baseline, make_variant, replica
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


def write_result(workspace: Workspace, round: int | None, subject: str, right: str) -> None:
    """A result as evaluate leaves it, with these questions right."""
    tasks = {"colours": {"correct": {"acc": right}}}
    belongs = {"agreement_sha256": workspace.agreement_sha256, "tasks_sha256": workspace.tasks_sha256()}
    value = {"subject": subject, "tasks": tasks, **belongs}
    writing.write(workspace.result(round, subject), reading.json_bytes(value))


def write_log(path: Path, losses: list[dict[str, float]], wall_s: float = 1.0) -> None:
    writing.write_log(
        path, [{"inputs": {}}, *({"step": i} | loss for i, loss in enumerate(losses, 1)), {"wall_s": wall_s}]
    )


@pytest.fixture
def workspace(workspace_folder: Path) -> Workspace:
    return Workspace(workspace_folder)


# --- accuracy


def test_accuracy_is_the_mean_over_seeds_and_its_error_their_deviation(workspace: Workspace) -> None:
    other = make_variant(workspace, *replica(workspace, 8), made_by=Command("run"))
    write_result(workspace, None, "llm", "1000")
    write_result(workspace, 1, "llm", "1100")
    write_result(other, 1, "llm", "1110")
    base, first = findings.accuracies(workspace, "llm", "acc")
    assert base["method"] == "zero-shot"
    assert base["round"] == 0
    assert base["accuracy_percent"] == 25
    assert base["error_points"] == pytest.approx(100 * sqrt(0.25 * 0.75 / 4))
    assert (first["method"], first["round"], first["seeds"], first["error_of"]) == ("fedcollm", 1, 2, "seeds")
    assert first["accuracy_percent"] == 62.5  # 50 and 75
    assert first["error_points"] == pytest.approx(25 / sqrt(2))


def test_one_seed_has_the_binomial_error_of_its_questions(workspace: Workspace) -> None:
    write_result(workspace, 2, "slm", "1110")
    [row] = findings.accuracies(workspace, "slm", "acc")
    assert row["error_of"] == "questions"
    assert row["error_points"] == pytest.approx(100 * sqrt(0.75 * 0.25 / 4))


def test_the_clients_accuracy_is_their_mean_and_waits_for_all_of_them(workspace: Workspace) -> None:
    write_result(workspace, 2, "client-1", "1111")
    write_result(workspace, 2, "client-2", "1100")
    assert findings.accuracies(workspace, "clients", "acc") == []
    write_result(workspace, 2, "client-3", "0000")
    [row] = findings.accuracies(workspace, "clients", "acc")
    assert row["accuracy_percent"] == pytest.approx(50)


def test_every_method_is_read_where_it_lives_and_scored_as_what_it_makes(workspace: Workspace) -> None:
    fedavg = make_variant(workspace, *baseline(workspace, "fedavg"), made_by=Command("run"))
    centralized = make_variant(workspace, *baseline(workspace, "centralized"), made_by=Command("run"))
    write_result(fedavg, 1, "aggregate", "1000")
    write_result(centralized, 1, "client-1", "1100")
    assert [(row["method"], row["accuracy_percent"]) for row in findings.accuracies(workspace, "slm", "acc")] == [
        ("fedavg", 25)
    ]
    assert [(row["method"], row["accuracy_percent"]) for row in findings.accuracies(workspace, "llm", "acc")] == [
        ("centralized", 50)
    ]


def test_a_result_of_another_agreement_is_not_shown(workspace: Workspace) -> None:
    write_result(workspace, 1, "llm", "1111")
    edit(workspace.root / "fedcollm.toml", "steps = 6", "steps = 7")
    assert findings.accuracies(Workspace(workspace.root), "llm", "acc") == []


# --- losses and time


def test_long_logs_are_thinned_to_means_of_equal_groups_of_steps(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "MOST_POINTS", 3)
    write_log(workspace.log("client-train", 1, 2), [{"slm_ft": float(loss)} for loss in (8, 6, 4, 2, 9, 3, 0)])
    write_log(workspace.log("client-train", 2, 2), [{"slm_ft": float(loss)} for loss in (1, 1, 1, 5, 7)])
    monkeypatch.setattr(findings, "MOST_ROWS", 9)  # 3 for each of three clients, but no fewer than 12 points
    rows = findings.client_losses(workspace)
    assert [(row["round"], row["step"], row["steps"], row["loss"]) for row in rows] == [
        # 12 steps, at most 3 points a line: groups of 4; the second round's steps are counted on from 7
        (1, 4, 4, 5.0),
        (1, 7, 3, 4.0),
        (2, 11, 4, 2.0),
        (2, 12, 1, 7.0),
    ]
    assert {row["client"] for row in rows} == {"client 2"}


def test_short_logs_are_shown_step_by_step(workspace: Workspace) -> None:
    write_log(workspace.log("co-distill", 2), [{"slm_ft": 3.0, "slm_kd": 1.0, "llm_ft": 2.0, "llm_kd": 0.5}])
    assert findings.distillation_losses(workspace, "slm") == [
        {"term": "L_FT", "round": 2, "step": 1, "steps": 1, "loss": 3.0},
        {"term": "L_KD", "round": 2, "step": 1, "steps": 1, "loss": 1.0},
    ]
    assert [row["loss"] for row in findings.distillation_losses(workspace, "llm")] == [2.0, 0.5]


def test_a_log_that_was_cut_short_is_shown_as_far_as_it_goes(workspace: Workspace) -> None:
    log = workspace.log("client-train", 1, 1)
    write_log(log, [{"slm_ft": 3.0}, {"slm_ft": 2.0}])
    log.write_text(log.read_text()[:-30])
    assert [row["loss"] for row in findings.client_losses(workspace)] == [3.0]


def test_wall_times_are_those_of_the_logs(workspace: Workspace) -> None:
    write_log(workspace.log("client-train", 1, 3), [], wall_s=2.5)
    write_log(workspace.log("co-distill", 2), [], wall_s=4.0)
    assert findings.wall_times(workspace) == [
        {"stage": "client-train", "round": 1, "party": "client-3", "seconds": 2.5},
        {"stage": "co-distill", "round": 2, "party": "server", "seconds": 4.0},
    ]


# --- exchange, averages, data


def test_a_rounds_bytes_are_its_folders_sizes_the_broadcast_once_for_each_client(finished_once: Path) -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir())

    rows = findings.traffic(Workspace(finished_once))
    assert len(rows) == 4  # two rounds, two directions
    exchange = finished_once / "exchange" / "round-0002"
    by_direction = {row["direction"]: row for row in rows if row["round"] == 2}
    assert by_direction["to the clients"]["bytes"] == 3 * size(exchange / "broadcast")
    assert by_direction["to the server"]["bytes"] == sum(size(exchange / f"client-{k}") for k in (1, 2, 3))
    assert by_direction["to the server"]["adapters"] == 3


def test_cross_terms_are_the_aggregates_own_in_percent_under_short_names(finished_once: Path) -> None:
    workspace = Workspace(finished_once)
    manifest = json.loads((workspace.aggregate(2) / "manifest.json").read_text())
    [(_, expected)] = [item for item in manifest["metrics"].items() if item[0].startswith("cross_term/")]
    [first, second] = findings.lost_by_averaging(workspace)
    assert (first["round"], second["round"]) == (1, 2)
    assert second["layer"] == "attn.c_attn"
    assert second["lost_percent"] == pytest.approx(100 * expected)


def test_the_split_is_what_prepare_wrote_and_names_no_folder(workspace: Workspace) -> None:
    parties = {
        "client-1": {"labels": {"0": 3, "1": 1}, "sources": {"/home/someone/data/quiz": 4}},
        "server": {"labels": {"1": 2}, "sources": {"colours": 2}},
    }
    writing.write(workspace.split, reading.json_bytes({"parties": parties}))
    assert findings.data_split(workspace, "labels") == [
        {"party": "client-1", "label": "0", "rows": 3},
        {"party": "client-1", "label": "1", "rows": 1},
        {"party": "server", "label": "0", "rows": 0},
        {"party": "server", "label": "1", "rows": 2},
    ]
    assert [row["source"] for row in findings.data_split(workspace, "sources")] == [".../quiz", "colours"] * 2


EVERYTHING: list[Callable[[Workspace], list[findings.Row]]] = [
    lambda workspace: findings.accuracies(workspace, "llm", "acc"),
    findings.client_losses,
    lambda workspace: findings.distillation_losses(workspace, "slm"),
    findings.traffic,
    findings.lost_by_averaging,
    lambda workspace: findings.data_split(workspace, "labels"),
    findings.wall_times,
]


@pytest.mark.parametrize("find", EVERYTHING)
def test_a_workspace_in_which_nothing_has_run_has_nothing_to_show(
    find: Callable[[Workspace], list[findings.Row]], workspace: Workspace
) -> None:
    assert find(workspace) == []
