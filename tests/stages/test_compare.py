"""compare: every figure is that of the result files, with equal budgets, and no winner without error bars."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from builders import QUESTIONS, Outcome, edit, make_study, published, rows, write_rows
from stages.compare import compare
from stages.parts.budgets import spent
from stages.parts.paper import tables
from stages.parts.workspace import Workspace
from stages.run import run

SEEDS = {7: "", 8: "seeds/seed-8"}


def result(folder: Path, seed: int, method: str, place: str) -> dict[str, Any]:
    home = folder / SEEDS[seed] / ("" if method == "fedcollm" else f"baselines/{method}")
    found: dict[str, Any] = json.loads((home / f"results/{place}.json").read_text())
    return found


def accuracies(folder: Path, method: str, subjects: list[str]) -> list[float]:
    """By seed, the mean over the subjects of what lm-eval wrote down."""
    return [
        float(
            np.mean(
                [
                    result(folder, seed, method, f"round-0002/{one}")["tasks"]["colours"]["metrics"]["acc"]
                    for one in subjects
                ]
            )
        )
        for seed in SEEDS
    ]


ROWS = {
    ("llm", "centralized"): ["client-1"],
    ("llm", "fedavg-aux"): ["llm"],
    ("llm", "fedcollm"): ["llm"],
    ("clients", "standalone"): ["client-1", "client-2"],
    ("clients", "fedavg"): ["client-1", "client-2"],
    ("clients", "fedavg-aux"): ["client-1", "client-2"],
    ("clients", "fedcollm"): ["client-1", "client-2"],
    ("slm", "fedavg"): ["aggregate"],
    ("slm", "fedavg-aux"): ["slm"],
    ("slm", "fedcollm"): ["slm"],
}


@pytest.fixture(scope="module")
def compared(studied_once: Path) -> dict[str, Any]:
    return compare(Workspace(studied_once))


def test_the_tables_have_the_rows_of_the_paper(compared: dict[str, Any]) -> None:
    found = {(table, row) for table, rows in compared["tables"].items() for row in rows}
    assert found == {*ROWS, ("llm", "zero-shot"), ("clients", "zero-shot"), ("slm", "zero-shot")}
    assert compared["seeds"] == [7, 8]
    assert compared["absent"] == []


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_a_row_is_the_mean_and_the_deviation_of_lm_evals_own_accuracies(
    table: str, row: str, compared: dict[str, Any], studied_once: Path
) -> None:
    by_seed = accuracies(studied_once, row, ROWS[table, row])
    for task in ("colours", "all"):
        found = compared["tables"][table][row][task]
        assert found["by_seed"] == pytest.approx(by_seed)
        assert found["mean"] == pytest.approx(np.mean(by_seed))
        assert found["deviation"] == pytest.approx(np.std(by_seed, ddof=1))
        assert found["binomial"] == pytest.approx(np.sqrt(np.mean(by_seed) * (1 - np.mean(by_seed)) / QUESTIONS))
        assert found["questions"] == QUESTIONS


def test_zero_shot_is_the_bases_own_score_and_has_no_deviation(compared: dict[str, Any], studied_once: Path) -> None:
    for table, role in {"llm": "llm", "clients": "slm", "slm": "slm"}.items():
        written = result(studied_once, 7, "fedcollm", f"zero-shot/{role}")["tasks"]["colours"]["metrics"]["acc"]
        found = compared["tables"][table]["zero-shot"]["colours"]
        assert (found["by_seed"], found["deviation"]) == ([pytest.approx(written)], None)


@pytest.mark.parametrize(("table", "row"), [key for key in ROWS if key[1] != "fedcollm"])
def test_a_difference_is_fedcollms_score_minus_the_others_paired_by_seed(
    table: str, row: str, compared: dict[str, Any], studied_once: Path
) -> None:
    own = {"llm": ["llm"], "clients": ["client-1", "client-2"], "slm": ["slm"]}[table]
    ours, theirs = accuracies(studied_once, "fedcollm", own), accuracies(studied_once, row, ROWS[table, row])
    found = compared["differences"][table][row]["colours"]
    assert found["mean"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found["seeds_error"] == pytest.approx(stats.sem(np.subtract(ours, theirs)))
    assert found["is_supported"] == (abs(found["mean"]) > found["half_width"])


def test_the_questions_are_paired_too(compared: dict[str, Any], studied_once: Path) -> None:
    def right(method: str) -> np.ndarray:
        return np.array(
            [
                [
                    int(digit)
                    for digit in result(studied_once, seed, method, "round-0002/llm")["tasks"]["colours"]["correct"][
                        "acc"
                    ]
                ]
                for seed in SEEDS
            ]
        )

    each = right("fedcollm") - right("fedavg-aux")
    assert each.any(), "nothing would be shown if all answers were the same"
    found = compared["differences"]["llm"]["fedavg-aux"]["colours"]
    assert found["questions_error"] == pytest.approx(stats.sem(each.mean(axis=0)))


def test_the_budgets_are_equal_and_those_of_the_settings(compared: dict[str, Any]) -> None:
    # Two rounds of one epoch in steps of 4: 11 rows are 3 steps, 5 rows 2, 7 auxiliary rows 2. One token an answer.
    def budget(steps: int) -> dict[str, int]:
        return {"steps": 2 * steps, "examples": 8 * steps, "tokens": 8 * steps}

    clients = {"client-1": budget(3), "client-2": budget(2)}
    assert compared["budgets"] == {
        "fedcollm": clients | {"server": budget(2)},
        "fedavg": clients,
        "fedavg-aux": clients | {"server": budget(2)},
        "standalone": clients,
        "centralized": {"client-1": budget(2)},
    }


def test_one_seed_never_names_a_winner(studied_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    found = compare(Workspace(studied_once), seeds=[8], collect=True)
    assert found["seeds"] == [8]
    for by_row in found["differences"].values():
        for by_task in by_row.values():
            assert all(one["half_width"] is None and not one["is_supported"] for one in by_task.values())
    said = fedcollm("compare", "--seeds", 8, "--collect", "--markdown", "-w", studied_once).out
    assert "(one seed)" in said
    assert "no error bar" in said
    assert "*" not in said.replace("**", "").replace("; * where it excludes zero]", "")


def test_a_winner_is_named_where_every_seed_and_question_says_so(
    studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    for home in (studied, studied / "seeds/seed-8"):
        for place, answers in {"": "1" * 19 + "0", "baselines/fedavg-aux": "0" * 20}.items():
            path = home / place / "results/round-0002/llm.json"
            value = json.loads(path.read_text())
            value["tasks"]["colours"]["correct"]["acc"] = answers
            path.write_text(json.dumps(value))
    said = fedcollm("compare", "--markdown", "-w", studied).out
    # 19 of 20 more, both seeds alike: the questions' error is 1/20, the half width 1.96 times that.
    assert "| FedAvg + D^a | +95.0 [85.2, 104.8]* |" in said


# --- what is printed


def test_json_csv_and_markdown_say_the_same(
    compared: dict[str, Any], studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before = published(studied_once)
    found = json.loads(fedcollm("compare", "--json", "-w", studied_once).out)
    assert found == json.loads(json.dumps(compared))
    lines = list(csv.DictReader(io.StringIO(fedcollm("compare", "--csv", "-w", studied_once).out)))
    by_seed = {
        (table, row, task): one["by_seed"]
        for table, rows in found["tables"].items()
        for row, by_task in rows.items()
        for task, one in by_task.items()
    }
    told: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        told.setdefault((line["table"], line["method"], line["task"]), []).append(float(line["acc"]))
        assert line["seed"] in (("",) if line["method"] == "zero-shot" else ("7", "8"))
        assert int(line["questions"]) == QUESTIONS
    assert told == {key: pytest.approx(values, abs=1e-6) for key, values in by_seed.items()}
    markdown = fedcollm("compare", "--markdown", "-w", studied_once).out
    for labels in (("llm", "FedCoLLM", "fedcollm"), ("clients", "Standalone", "standalone")):
        one = found["tables"][labels[0]][labels[2]]["colours"]
        assert f"| {labels[1]} | {100 * one['mean']:.1f} ± {100 * one['deviation']:.1f} |" in markdown
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert published(studied_once) == before


def test_only_one_form_of_output_at_a_time(studied_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("compare", "--json", "--csv", "-w", studied_once)
    assert outcome.code == 2
    assert "--json, --markdown and --csv exclude each other" in outcome.err


def test_the_papers_figures_stand_beside_a_task_of_the_paper(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = make_study(tmp_path / "study", base_models)
    for name in ("fedcollm.toml", "tasks/colours.yaml"):
        (folder / name).write_text((folder / name).read_text().replace("colours", "arc_easy"))
    (folder / "tasks/colours.yaml").rename(folder / "tasks/arc_easy.yaml")
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    run(Workspace(folder))
    # Tables 1 and 2 of the paper, setting S1, ARC-E.
    said = fedcollm("compare", "--paper", "s1", "--markdown", "-w", folder).out
    assert "| method | arc_easy | arc_easy, paper |" in said
    paper = json.loads(fedcollm("compare", "--paper", "s1", "--json", "-w", folder).out)["paper"]
    for table, model in {"llm": "llm", "clients": "slm"}.items():
        for row, by_task in paper["tables"][table].items():
            figure = tables()["accuracy"][model]["arc_easy"].get(row, {}).get("s1")
            assert by_task == ({} if figure is None else {"arc_easy": figure})
    assert paper["tables"]["llm"]["fedcollm"]
    lines = csv.DictReader(io.StringIO(fedcollm("compare", "--paper", "s1", "--csv", "-w", folder).out))
    figures = {(line["table"], line["method"]): line["paper"] for line in lines if line["task"] == "arc_easy"}
    assert figures["llm", "fedcollm"] == str(paper["tables"]["llm"]["fedcollm"]["arc_easy"])
    assert figures["slm", "fedcollm"] == ""


def test_a_task_that_the_paper_does_not_have_is_no_paper(studied_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("compare", "--paper", "s1", "-w", studied_once)
    assert outcome.code == 2
    assert "the paper has no task of this workspace: colours" in outcome.err
    assert "the paper's are: " in outcome.err


# --- running what is missing


def test_a_study_that_is_complete_trains_nothing_again(studied: Path, fedcollm: Callable[..., Outcome]) -> None:
    def everything() -> dict[Path, bytes]:
        made = [path for path in studied.rglob("*") if path.suffix in (".json", ".safetensors", ".toml", ".jsonl")]
        return {path: path.read_bytes() for path in made}

    before = everything()
    outcome = fedcollm("compare", "--seeds", "7,8", "--json", "-w", studied)
    assert outcome.code == 0, outcome.err
    assert everything() == before
    stages = re.findall(r"^  \S.*  \d+\.\d s$", outcome.err, flags=re.MULTILINE)
    assert len(stages) > 100
    assert outcome.err.count("already done") == len(stages)


def test_seeds_that_leave_out_the_workspaces_own_are_compared_all_the_same(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = make_study(tmp_path / "study", base_models)
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    outcome = fedcollm("compare", "--seeds", 9, "--methods", "standalone", "--json", "-w", folder)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert (found["seeds"], found["methods"]) == ([9], ["standalone"])
    assert found["tables"]["clients"].keys() == {"zero-shot", "standalone"}
    assert not (folder / "exchange").exists()


# --- what is refused


@pytest.fixture
def refuses(studied: Path, fedcollm: Callable[..., Outcome]) -> Callable[..., str]:
    """refuses(code, mend, words...): compare fails with that code, and the mend is a command that works."""

    def call(code: int, mend: str, *words: str) -> str:
        outcome = fedcollm("compare", *words, "-w", studied)
        assert outcome.code == code, outcome.err
        assert f"  mend  {mend}" in outcome.err, outcome.err
        assert outcome.out == ""
        return outcome.err

    return call


def give(folder: Path, command: str, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    outcome = fedcollm(*command.split()[1:])
    assert outcome.code == 0, outcome.err
    outcome = fedcollm("compare")
    assert outcome.code == 0, outcome.err


def test_seeds_that_have_not_been_run_are_named(refuses: Callable[..., str]) -> None:
    said = refuses(3, "fedcollm compare --seeds 7,9", "--seeds", "7,9", "--collect")
    assert "seeds/seed-9 is not there" in said


def test_a_method_that_has_not_been_run_is_named(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(studied / "seeds/seed-8/baselines/standalone")
    mend = "fedcollm run --method standalone --workspace seeds/seed-8"
    assert "baselines/standalone is not there" in refuses(3, mend)
    give(studied, mend, fedcollm, monkeypatch)


@pytest.mark.parametrize(
    ("home", "gone"),
    [
        ("", "private/server/round-0002"),
        ("baselines/fedavg", "private/server/round-0002"),
        ("baselines/fedavg-aux", "private/server/round-0002"),
        ("baselines/standalone", "exchange/round-0002/client-2"),
        ("seeds/seed-8/baselines/centralized", "exchange/round-0002"),
    ],
)
def test_a_half_finished_federation_is_gone_on_with(
    home: str,
    gone: str,
    studied: Path,
    refuses: Callable[..., str],
    fedcollm: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree(studied / home / gone)
    mend = "fedcollm run" + (f" --workspace {home}" if home else "")
    assert "a federation is not finished: " in refuses(3, mend)
    give(studied, mend, fedcollm, monkeypatch)


def test_a_client_that_missed_a_round_makes_budgets_differ(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_study(tmp_path / "study", base_models)
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[aggregation]\nmin_clients = 1\n")
    run(Workspace(folder))
    data = folder / "private/client-2/train.jsonl"
    kept = data.rename(tmp_path / "kept")
    run(Workspace(folder), method="fedavg", rounds=range(1, 2))
    shutil.copy(kept, data)
    # Client 2 is back in round 2, which goes on from an average that did without it.
    run(Workspace(folder), method="fedavg")
    outcome = fedcollm("compare", "-w", folder)
    assert outcome.code == 6
    assert "fedavg gave client-2 2 steps, 8 examples, 8 tokens; fedcollm gave it 4 steps, 16 examples" in outcome.err
    mend = "fedcollm run --workspace baselines/fedavg --overwrite"
    assert f"  mend  {mend}; or leave one of them out with --methods" in outcome.err
    assert fedcollm("compare", "--methods", "fedcollm", "-w", folder).code == 0
    give(folder, mend, fedcollm, monkeypatch)
    ledger = spent(Workspace(folder / "baselines/fedavg"))
    assert ledger == {party: done for party, done in spent(Workspace(folder)).items() if party != "server"}


def test_an_llm_that_was_trained_longer_is_not_compared(studied: Path, refuses: Callable[..., str]) -> None:
    for round in (1, 2):
        path = studied / f"baselines/fedavg-aux/private/server/round-{round:04d}/llm/manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 9, "examples": 36}))
    said = refuses(6, "fedcollm run --overwrite; or leave one of them out with --methods")
    assert "budgets differ: fedavg-aux gave the LLM 18 steps, 72 examples" in said


def test_an_agreement_that_was_edited_since_is_refused_until_it_is_undone(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    edit(studied / "fedcollm.toml", 'name = "tiny"', 'name = "tinier"')
    either = "undo the edit of fedcollm.toml, or "
    refuses(5, f"{either}fedcollm run --method fedavg --overwrite")
    refuses(5, f"{either}fedcollm compare --seeds 8 --overwrite", "--seeds", "8", "--collect")
    edit(studied / "fedcollm.toml", 'name = "tinier"', 'name = "tiny"')
    assert fedcollm("compare", "-w", studied).code == 0


def test_an_agreement_that_was_edited_since_is_run_anew_with_overwrite(
    studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(studied / "fedcollm.toml", "learning_rate = 0.3\n\n[dist", "learning_rate = 0.4\n\n[dist")
    words = ("compare", "--seeds", "7,8", "--methods", "fedcollm,standalone", "--json", "-w", studied)
    assert fedcollm(*words).code == 5
    outcome = fedcollm(*words, "--overwrite")
    assert outcome.code == 0, outcome.err
    assert Workspace(studied / "seeds/seed-8/baselines/standalone").agreement.client_training.learning_rate == 0.4
    assert json.loads(fedcollm(*words, "--collect").out) == json.loads(outcome.out)


@pytest.mark.parametrize("words", [(), ("--seeds", "7", "--collect")])
def test_overwrite_without_anything_to_run_is_refused(
    words: tuple[str, ...], studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("compare", *words, "--overwrite", "-w", studied_once)
    assert outcome.code == 2
    assert "mend  fedcollm compare --seeds 1,2,3 --overwrite" in outcome.err


def test_a_result_of_another_agreement_is_refused(studied: Path, refuses: Callable[..., str]) -> None:
    path = studied / "baselines/standalone/results/round-0002/client-2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"agreement_sha256": "0" * 64}))
    mend = "undo the edit of fedcollm.toml, or fedcollm run --workspace baselines/standalone --overwrite"
    assert f"{path.relative_to(studied)} is a result of another agreement" in refuses(5, mend)


def test_a_result_of_an_adapter_that_was_made_again_is_refused(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = studied / "baselines/fedavg-aux/private/server/round-0002/llm/manifest.json"
    place.write_text(place.read_text() + "\n")
    mend = "fedcollm evaluate --round 2 --model llm --workspace baselines/fedavg-aux"
    assert "is of another adapter than baselines/fedavg-aux/private/server/round-0002/llm is now" in refuses(5, mend)
    give(studied, mend, fedcollm, monkeypatch)


def test_a_result_of_an_earlier_version_is_made_again(
    studied: Path, refuses: Callable[..., str], fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = studied / "baselines/fedavg/results/round-0002/client-1.json"
    value = json.loads(path.read_text())
    del value["tasks"]["colours"]["correct"]
    path.write_text(json.dumps(value))
    mend = "fedcollm evaluate --round 2 --client 1 --workspace baselines/fedavg --overwrite"
    assert "does not say which questions were right" in refuses(5, mend)
    give(studied, mend, fedcollm, monkeypatch)


def test_a_result_of_other_questions_is_made_again(studied: Path, refuses: Callable[..., str]) -> None:
    questions = studied / "data/test.jsonl"
    questions.write_text("\n".join(questions.read_text().splitlines()[:15]) + "\n")
    said = refuses(5, "fedcollm evaluate --zero-shot --model llm")
    assert "results/zero-shot/llm.json is of other questions" in said


def test_rows_that_were_changed_since_training_are_refused(studied: Path, refuses: Callable[..., str]) -> None:
    data = studied / "private/client-2/train.jsonl"
    data.unlink()
    write_rows(data, rows(5))
    said = refuses(5, "put those rows back, or fedcollm run --overwrite")
    assert "private/client-2/train.jsonl is not what was trained on in round 1" in said


def test_a_metric_that_is_not_right_or_wrong_is_named_with_those_that_are(refuses: Callable[..., str]) -> None:
    said = refuses(2, "--metric with one of its metrics: acc", "--metric", "f1")
    assert "does not say which questions of colours were right by f1" in said


@pytest.mark.parametrize(
    ("words", "message", "mend"),
    [
        (("--seeds", "1;2"), "--seeds '1;2' is not a list of seeds", "such as --seeds 1,2,3"),
        (("--seeds", ""), "--seeds '' is not a list of seeds", "such as --seeds 1,2,3"),
        (("--methods", "fedavg,fedprox"), "there is no method 'fedprox'", "there are: fedcollm, fedavg, fedavg-aux"),
    ],
)
def test_lists_that_are_none_are_refused(words: tuple[str, ...], message: str, mend: str, refuses: Any) -> None:
    assert message in refuses(2, mend, *words)


def test_a_folder_that_is_no_seed_is_passed_over(studied: Path, fedcollm: Callable[..., Outcome]) -> None:
    shutil.copytree(studied / "seeds/seed-8", studied / "seeds/seed-old", symlinks=True)
    (studied / "seeds/seed-9").mkdir()
    outcome = fedcollm("compare", "--json", "-w", studied)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["seeds"] == [7, 8]


def test_centralized_needs_every_partys_data_here(studied: Path, fedcollm: Callable[..., Outcome]) -> None:
    shutil.rmtree(studied / "baselines/centralized")
    (studied / "private/client-2/train.jsonl").unlink()
    outcome = fedcollm("run", "--method", "centralized", "-w", studied)
    assert outcome.code == 2
    assert (
        "centralized needs every party's data on this machine; private/client-2/train.jsonl is not here" in outcome.err
    )
    assert "leave it out" in outcome.err
