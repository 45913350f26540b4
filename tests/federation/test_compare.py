"""compare: every figure is that of the result files, with equal budgets, and no winner without error bars."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from builders import QUESTIONS, Outcome, edit, make_study, published, rewrite
from stages.artefacts.reading import read_manifest
from stages.federation.compare import compare
from stages.federation.run import run
from stages.paper.reported import tables
from stages.study.budgets import Spent
from stages.study.comparison import Comparison
from stages.workspace.paths import Workspace

SEEDS = {7: "", 8: "seeds/seed-8"}
KEYS = ("table", "method", "minus", "task", "model", "seed", "figure")
"""What tells one row of the CSV from all others."""


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
def compared(studied_once: Path) -> Comparison:
    return compare(Workspace(studied_once))


def test_the_tables_have_the_rows_of_the_paper(compared: Comparison) -> None:
    found = {(table, row) for table, rows in compared.tables.items() for row in rows}
    assert found == {*ROWS, ("llm", "zero-shot"), ("clients", "zero-shot"), ("slm", "zero-shot")}
    assert compared.seeds == [7, 8]
    assert compared.absent == []


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_a_row_is_the_mean_and_the_deviation_of_lm_evals_own_accuracies(
    table: str, row: str, compared: Comparison, studied_once: Path
) -> None:
    by_seed = accuracies(studied_once, row, ROWS[table, row])
    for task in ("colours", "all tasks"):
        found = compared.tables[table][row][task]
        assert found.by_seed == pytest.approx(by_seed)
        assert found.mean == pytest.approx(np.mean(by_seed))
        assert found.deviation == pytest.approx(np.std(by_seed, ddof=1))
        assert found.binomial == pytest.approx(np.sqrt(np.mean(by_seed) * (1 - np.mean(by_seed)) / QUESTIONS))
        assert found.questions == QUESTIONS


def test_zero_shot_is_the_bases_own_score_and_has_no_deviation(compared: Comparison, studied_once: Path) -> None:
    for table, role in {"llm": "llm", "clients": "slm", "slm": "slm"}.items():
        written = result(studied_once, 7, "fedcollm", f"zero-shot/{role}")["tasks"]["colours"]["metrics"]["acc"]
        found = compared.tables[table]["zero-shot"]["colours"]
        assert (found.by_seed, found.deviation) == ([pytest.approx(written)], None)


@pytest.mark.parametrize(("table", "row"), [key for key in ROWS if key[1] != "fedcollm"])
def test_a_difference_is_fedcollms_score_minus_the_others_paired_by_seed(
    table: str, row: str, compared: Comparison, studied_once: Path
) -> None:
    own = {"llm": ["llm"], "clients": ["client-1", "client-2"], "slm": ["slm"]}[table]
    ours, theirs = accuracies(studied_once, "fedcollm", own), accuracies(studied_once, row, ROWS[table, row])
    found = compared.differences[table][row]["colours"]
    assert found.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.seeds_error == pytest.approx(stats.sem(np.subtract(ours, theirs)))
    assert found.is_supported == (abs(found.mean) > found.half_width)


def test_the_questions_are_paired_too(compared: Comparison, studied_once: Path) -> None:
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
    found = compared.differences["llm"]["fedavg-aux"]["colours"]
    assert found.questions_error == pytest.approx(stats.sem(each.mean(axis=0)))


def test_the_budgets_are_equal_and_those_of_the_settings(compared: Comparison) -> None:
    # Two rounds of one epoch in steps of 4: 11 rows are 3 steps, 5 rows 2, 7 auxiliary rows 2. One token an answer.
    def budget(steps: int) -> Spent:
        return Spent(steps=2 * steps, examples=8 * steps, tokens=8 * steps)

    clients = {"client-1": budget(3), "client-2": budget(2)}
    assert compared.budgets == {
        "fedcollm": clients | {"server": budget(2)},
        "fedavg": clients,
        "fedavg-aux": clients | {"server": budget(2)},
        "standalone": clients,
        "centralized": {"client-1": budget(2)},
    }


def test_one_seed_never_names_a_winner(studied_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    found = compare(Workspace(studied_once), seeds=[8], collect=True)
    assert found.seeds == [8]
    for by_row in found.differences.values():
        for by_task in by_row.values():
            assert all(one.half_width is None and not one.is_supported for one in by_task.values())
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
            rewrite(path, value)
    said = fedcollm("compare", "--markdown", "-w", studied).out
    # 19 of 20 more, both seeds alike: the questions' error is 1/20, the half width 1.96 times that.
    assert "| FedAvg + D^a | +95.0 [85.2, 104.8]* |" in said


# --- what is printed


def test_json_csv_and_markdown_say_the_same(
    compared: Comparison, studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before = published(studied_once)
    found = json.loads(fedcollm("compare", "--json", "-w", studied_once).out)
    assert found == json.loads(json.dumps(asdict(compared)))
    lines = list(csv.DictReader(io.StringIO(fedcollm("compare", "--csv", "-w", studied_once).out)))
    told = {tuple(line[key] for key in KEYS): float(line["value"]) for line in lines}
    assert len(told) == len(lines), "one row a figure"
    assert {line["metric"] for line in lines} == {"acc"}
    expected: dict[tuple[str, ...], float] = {}
    for table, by_row in found["tables"].items():
        for row, by_task in by_row.items():
            for task, one in by_task.items():
                models = one["by_subject"] | ({"mean": one["by_seed"]} if len(one["by_subject"]) > 1 else {})
                seeds = ("",) if row == "zero-shot" else ("7", "8")
                for model, values in models.items():
                    place = (table, row, "", task, model)
                    expected |= {(*place, seed, "score"): value for seed, value in zip(seeds, values, strict=True)}
                last = {"mean": one["mean"], "deviation": one["deviation"], "questions_error": one["binomial"]}
                expected |= {(*place, "", name): value for name, value in last.items() if value is not None}
        for row, by_task in found["differences"][table].items():
            for task, one in by_task.items():
                named = {name: one[name] for name in ("mean", "seeds_error", "questions_error", "is_supported")}
                named |= {"low": one["mean"] - one["half_width"], "high": one["mean"] + one["half_width"]}
                expected |= {(table, "fedcollm", row, task, "", "", name): value for name, value in named.items()}
    assert ("clients", "fedavg", "", "colours", "client-2", "8", "score") in expected
    assert told == {key: pytest.approx(float(value), abs=1e-6) for key, value in expected.items()}
    markdown = fedcollm("compare", "--markdown", "-w", studied_once).out
    for labels in (("llm", "FedCoLLM", "fedcollm"), ("clients", "Standalone", "standalone")):
        one = found["tables"][labels[0]][labels[2]]["colours"]
        assert f"| {labels[1]} | {100 * one['mean']:.1f} ± {100 * one['deviation']:.1f} |" in markdown
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert published(studied_once) == before


def test_only_one_form_of_output_at_a_time(studied_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    for words in (["compare"], ["sweep", "--set", "federation.seed=7"], ["evaluate", "--zero-shot"]):
        outcome = fedcollm(*words, "--json", "--csv", "-w", studied_once)
        assert outcome.code == 2
        assert "--json and --csv exclude each other" in outcome.err


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
    outcome = fedcollm("compare", "--paper", "s1", "--markdown", "-w", folder)
    assert "| method | arc_easy | arc_easy, paper |" in outcome.out
    others = "of other models: gpt2, not of models/slm; gpt2-large, not of models/llm\n"
    assert f"the paper's figures are {others}" in outcome.out
    assert f"warning: the paper's figures of s1 are {others}" in outcome.err
    paper = json.loads(fedcollm("compare", "--paper", "s1", "--json", "-w", folder).out)["paper"]
    for table, model in {"llm": "llm", "clients": "slm"}.items():
        for row, by_task in paper["tables"][table].items():
            figure = tables()["accuracy"][model]["arc_easy"].get(row, {}).get("s1")
            assert by_task == ({} if figure is None else {"arc_easy": figure})
    assert paper["tables"]["llm"]["fedcollm"]
    lines = csv.DictReader(io.StringIO(fedcollm("compare", "--paper", "s1", "--csv", "-w", folder).out))
    figures = {(line["table"], line["method"]): float(line["value"]) for line in lines if line["figure"] == "paper"}
    assert figures["llm", "fedcollm"] == pytest.approx(paper["tables"]["llm"]["fedcollm"]["arc_easy"] / 100)
    assert ("slm", "fedcollm") not in figures


def test_a_setting_of_fedmkt_stands_beside_with_its_own_source(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = make_study(tmp_path / "study", base_models)
    for name in ("fedcollm.toml", "tasks/colours.yaml"):
        (folder / name).write_text((folder / name).read_text().replace("colours", "arc_easy"))
    (folder / "tasks/colours.yaml").rename(folder / "tasks/arc_easy.yaml")
    edit(folder / "fedcollm.toml", "rounds = 2", 'rounds = 1\nmethod = "standalone"')
    run(Workspace(folder))
    # FedMKT's Table 3, setting S1, ARC-E: Standalone has 60.3; its table of the LLM has no such row.
    found = json.loads(fedcollm("compare", "--paper", "mkt-s1", "--json", "-w", folder).out)["paper"]
    assert found["tables"]["clients"] == {"zero-shot": {}, "standalone": {"arc_easy": 60.3}}
    assert (found["source"]["arxiv"], found["source"]["table"][:7]) == ("2406.02224", "Table 3")
    assert found["other_models"][1] == "meta-llama/Llama-2-7b-hf, not of models/llm"
    # Table 2 has no mean of its unlike clients, and the zero-shot figure of the LLM.
    found = json.loads(fedcollm("compare", "--paper", "mkt-heterogeneous", "--json", "-w", folder).out)["paper"]
    assert found["tables"] == {
        "llm": {"zero-shot": {"arc_easy": 69.3}},
        "clients": {"zero-shot": {}, "standalone": {}},
    }
    assert found["other_models"][0].startswith("gpt2-xl and facebook/opt-1.3b and ")


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


def test_a_study_whose_rows_only_training_can_count_begins_with_the_workspaces_own_method(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    """centralized trains for as many steps as co-distill did, which leaves out rows that are too long."""
    folder = make_study(tmp_path / "study", base_models)
    toml = folder / "fedcollm.toml"
    edit(toml, "rounds = 2", "rounds = 1")
    toml.write_text(toml.read_text() + '\n[data]\ntoo_long = "skip"\n')
    words = ("compare", "--seeds", "7", "--methods", "fedcollm,centralized", "-w", folder)
    for early in ((*words, "--slurm"), (*words, "--collect"), ("run", "--method", "centralized", "-w", folder)):
        found = fedcollm(*early)
        assert found.code == 3
        assert "error: how long centralized trains is known after round 1 alone" in found.err
        assert "mend  fedcollm run first; or leave centralized out with --methods" in found.err
        assert not (folder / "baselines").exists()
        assert not (folder / "slurm").exists()
    assert fedcollm(*words, "--quiet").code == 0
    own = read_manifest(Workspace(folder).llm(1))[0].steps
    assert Workspace(folder / "baselines/centralized").agreement.client_training.steps == own
