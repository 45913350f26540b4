"""sweep: a grid of whole workspaces, gone on with after a stop, and one table of means over seeds."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from builders import Outcome, edit, make_study, rewrite, rows, write_rows
from command_line import give
from stages.artefacts.reading import read_manifest
from stages.data.prepare import prepare
from stages.federation.run import run
from stages.federation.settings_in_words import in_words, parse_setting
from stages.federation.sweep import Swept, point_name, sweep
from stages.report import swept
from stages.runtime.errors import UsageProblem
from stages.workspace.paths import Workspace

WORDS = ("sweep", "--set", "distillation.lambda_slm=0.0,4.0", "--set", "federation.seed=7,8", "-w")
POINTS = [f"lambda_slm={value},seed={seed}" for value in ("0.0", "4.0") for seed in (7, 8)]


@pytest.fixture(scope="module")
def swept_once(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Path:
    """A study of one round whose rows `prepare` dealt, swept over a strength of distillation and two seeds."""
    folder = make_study(tmp_path_factory.mktemp("swept") / "study", base_models)
    for party in ("client-1/train", "client-2/train", "server/auxiliary"):
        (folder / f"private/{party}.jsonl").unlink()
    write_rows(folder / "data/all.jsonl", rows(24))
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\nfiles = ["data/all.jsonl"]\n')
    prepare(Workspace(folder))
    assert give(*WORDS, folder, "--quiet") == 0
    return folder


@pytest.fixture(scope="module")
def table(swept_once: Path) -> Swept:
    from stages.federation.sweep import sweep

    return sweep(Workspace(swept_once), grid={"distillation.lambda_slm": [0.0, 4.0], "federation.seed": [7, 8]})


def test_the_report_has_a_table_of_it_with_the_same_figures(swept_once: Path, table: Swept) -> None:
    [shown] = swept.tables(Workspace(swept_once), "acc")
    assert shown.columns == ["Settings", "Seeds", "the LLM, %", "the server's SLM, %", "clients' own SLMs, %"]
    expected = []
    for row in table.rows:
        of_models = [row.scores[model] for model in ("llm", "slm", "clients")]
        cells = [f"{100 * one.mean:.1f} ± {100 * (one.deviation or 0):.1f}" for one in of_models]
        expected.append([f"distillation.lambda_slm = {row.settings['distillation.lambda_slm']}", "7, 8", *cells])
    assert shown.rows == expected


def test_accuracy_under_attack_is_swept_if_all_points_were_measured_under_one(
    swept_once: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = shutil.copytree(swept_once, tmp_path / "study", symlinks=True)
    attack = {"radius": 0.1, "steps": 5, "step_size": None}
    for path in folder.rglob("results/*/*.json"):
        result = json.loads(path.read_text())
        correct = result["tasks"]["colours"]["correct"]
        correct["robust_acc"] = correct["acc"]
        rewrite(path, {**result, "attack": attack})
    words = (*WORDS, folder, "--collect", "--json", "--metric")
    plain, robust = (json.loads(fedcollm(*words, metric).out) for metric in ("acc", "robust_acc"))
    assert robust["rows"] == plain["rows"]
    assert robust["remarks"] == ["robust_acc: under attack, radius 0.1, steps 5", *plain["remarks"]]
    for path in folder.glob("sweeps/lambda_slm=4.0*/results/*/*.json"):
        rewrite(path, {**json.loads(path.read_text()), "attack": attack | {"radius": 0.2}})
    refused = fedcollm(*words, "robust_acc")
    assert refused.code == 5
    assert "was measured under another attack than the rest: radius 0.2, steps 5, not radius 0.1" in refused.err


def accuracy(folder: Path, point: str, subject: str) -> float:
    path = folder / f"sweeps/{point}/results/round-0001/{subject}.json"
    return float(json.loads(path.read_text())["tasks"]["colours"]["metrics"]["acc"])


def test_every_combination_is_a_workspace_named_by_what_is_set(swept_once: Path) -> None:
    assert sorted(path.name for path in (swept_once / "sweeps").iterdir()) == POINTS
    for point in POINTS:
        agreement = Workspace(swept_once / "sweeps" / point).agreement
        words = f"lambda_slm={agreement.distillation.lambda_slm},seed={agreement.federation.seed}"
        assert words == point


def test_a_row_is_the_mean_over_the_seeds_of_lm_evals_own_accuracies(table: Swept, swept_once: Path) -> None:
    assert table.axes == ["distillation.lambda_slm"]
    assert table.seeds == [7, 8]
    assert [row.settings for row in table.rows] == [
        {"distillation.lambda_slm": 0.0},
        {"distillation.lambda_slm": 4.0},
    ]
    for row in table.rows:
        value = row.settings["distillation.lambda_slm"]
        for subject in ("slm", "llm"):
            by_seed = [accuracy(swept_once, f"lambda_slm={value},seed={seed}", subject) for seed in (7, 8)]
            assert row.scores[subject].mean == pytest.approx(np.mean(by_seed))
            assert row.scores[subject].deviation == pytest.approx(np.std(by_seed, ddof=1))


def test_each_row_is_paired_with_the_first(table: Swept, swept_once: Path) -> None:
    assert table.rows[0].minus_first is None
    assert "minus_first" not in table.as_json()["rows"][0]
    each = [
        accuracy(swept_once, f"lambda_slm=4.0,seed={seed}", "slm")
        - accuracy(swept_once, f"lambda_slm=0.0,seed={seed}", "slm")
        for seed in (7, 8)
    ]
    found = table.rows[1].minus_first["slm"]
    assert found.mean == pytest.approx(np.mean(each))
    assert found.seeds_error == pytest.approx(stats.sem(each))
    assert found.is_supported == (abs(found.mean) > found.half_width)


def test_rows_are_dealt_anew_for_another_seed_and_shared_for_another_lambda(swept_once: Path) -> None:
    for name in ("private/client-1/train.jsonl", "private/server/auxiliary.jsonl"):
        own = swept_once / name
        assert own.samefile(swept_once / "sweeps" / "lambda_slm=0.0,seed=8" / name) is False
        one, other = (swept_once / f"sweeps/lambda_slm={value},seed=8/{name}" for value in (0.0, 4.0))
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes() != own.read_bytes()
        assert (swept_once / f"sweeps/lambda_slm=0.0,seed=7/{name}").read_bytes() == own.read_bytes()


def test_what_the_setting_does_not_touch_is_the_same_to_the_byte(swept_once: Path) -> None:
    one, other = (Workspace(swept_once / f"sweeps/lambda_slm={value},seed=8") for value in (0.0, 4.0))
    for place in ("broadcast", "aggregate"):
        first, second = (getattr(point, place)(1) / "adapter_model.safetensors" for point in (one, other))
        assert first.read_bytes() == second.read_bytes()
    assert read_manifest(one.slm(1))[0].files != read_manifest(other.slm(1))[0].files


def test_a_point_is_what_a_workspace_of_those_settings_gives_by_itself(swept_once: Path, tmp_path: Path) -> None:
    own = Workspace(swept_once)
    run(own, scores=False)
    point = Workspace(swept_once / "sweeps/lambda_slm=0.0,seed=7")
    for client in (1, 2):
        ours, theirs = (one.client_update(1, client) / "adapter_model.safetensors" for one in (own, point))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_same_command_again_trains_nothing_and_says_the_same(
    swept_once: Path, table: Swept, fedcollm: Callable[..., Outcome]
) -> None:
    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (swept_once / "sweeps").rglob("*") if path.is_file()}

    before = everything()
    for words in ([], ["--collect"]):
        outcome = fedcollm(*WORDS, swept_once, "--json", *words)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out) == json.loads(json.dumps(table.as_json()))
    assert everything() == before


def test_the_figures_of_a_sweep_are_rows_of_a_csv_file_and_a_table_in_latex(
    swept_once: Path, table: Swept, fedcollm: Callable[..., Outcome]
) -> None:
    lines = list(csv.DictReader(io.StringIO(fedcollm(*WORDS, swept_once, "--collect", "--csv").out)))
    told = {
        (line["distillation.lambda_slm"], line["table"], line["minus"], line["figure"]): float(line["value"])
        for line in lines
    }
    assert len(told) == len(lines)
    first, second = table.rows
    assert told["0.0", "llm", "", "mean"] == pytest.approx(first.scores["llm"].mean, abs=1e-6)
    assert told["4.0", "slm", "", "deviation"] == pytest.approx(second.scores["slm"].deviation, abs=1e-6)
    minus = (second.minus_first or {})["clients"]
    assert told["4.0", "clients", "the first", "mean"] == pytest.approx(minus.mean, abs=1e-6)
    assert told["4.0", "clients", "the first", "high"] == pytest.approx(minus.mean + (minus.half_width or 0), abs=1e-6)
    latex = fedcollm(*WORDS, swept_once, "--collect", "--latex").out
    assert "lambda\\_slm & the LLM & clients' own SLMs & the server's SLM \\\\" in latex


def test_a_sweep_that_was_stopped_makes_what_is_missing(swept_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    gone = swept_once / "sweeps/lambda_slm=4.0,seed=8"
    update = gone / "exchange/round-0001/client-2/adapter_model.safetensors"
    before = update.read_bytes()
    shutil.rmtree(gone)
    outcome = fedcollm(*WORDS, swept_once, "--markdown")
    assert outcome.code == 0, outcome.err
    assert update.read_bytes() == before
    rows = [line.split("|")[1].strip() for line in outcome.out.splitlines() if line.startswith(("| 0.0", "| 4.0"))]
    assert rows == ["0.0", "4.0", "4.0"], "the scores of both, and the second's difference from the first"


def test_clients_can_go_without_scores(swept_once: Path, table: Swept, fedcollm: Callable[..., Outcome]) -> None:
    scored = [swept_once / f"sweeps/{point}/results/round-0001" for point in POINTS]
    kept = {path: path.read_bytes() for folder in scored for path in folder.glob("client-*.json")}
    assert len(kept) == 2 * len(POINTS)
    for path in (*kept, scored[0] / "slm.json"):
        path.unlink()
    outcome = fedcollm(*WORDS, swept_once, "--json", "--no-client-scores")
    assert outcome.code == 0, outcome.err
    for found, whole in zip(json.loads(outcome.out)["rows"], table.as_json()["rows"], strict=True):
        assert found["scores"] == {table: json.loads(json.dumps(whole["scores"][table])) for table in ("llm", "slm")}
    assert (scored[0] / "slm.json").exists()
    assert not any(path.exists() for path in kept)
    outcome = fedcollm(*WORDS, swept_once, "--collect")
    assert outcome.code == 3
    assert "client-1" in outcome.err
    for path, text in kept.items():
        path.write_bytes(text)


@pytest.mark.parametrize("option", ["--no-client-scores", "--last-round"])
def test_jobs_score_all_so_that_options_that_leave_scores_out_are_refused(
    option: str, swept_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm(*WORDS, swept_once, "--slurm", option)
    assert outcome.code == 2
    assert f"{option} is for what runs here" in outcome.err
    assert not (swept_once / "slurm").exists()


def test_a_combination_whose_rows_cannot_be_dealt_is_told_and_leaves_no_folder(
    swept_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("sweep", "--set", 'data.auxiliary_sources=["nobody"],["data/all"]', "-w", swept_once)
    assert outcome.code == 2
    assert "data.auxiliary_sources names 'nobody', which no row is of" in outcome.err
    assert "mend  rows are of 'data/all'" in outcome.err
    assert sorted(path.name for path in (swept_once / "sweeps").iterdir()) == POINTS


def test_an_edit_of_the_parent_is_refused_with_the_command_that_sweeps_anew(
    swept_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(swept_once / "fedcollm.toml", 'name = "tiny"', 'name = "tinier"')
    outcome = fedcollm(*WORDS, swept_once)
    edit(swept_once / "fedcollm.toml", 'name = "tinier"', 'name = "tiny"')
    assert outcome.code == 5
    assert "sweeps/lambda_slm=0.0,seed=7 is of another agreement" in outcome.err
    again = "fedcollm sweep --set distillation.lambda_slm=0.0,4.0 --set federation.seed=7,8 --overwrite"
    assert f"mend  undo the edit of fedcollm.toml, or {again}" in outcome.err


def test_overwrite_sweeps_anew(swept_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    words = ("sweep", "--set", "federation.seed=7", "-w", swept_once)
    assert fedcollm(*words).code == 0
    edit(swept_once / "fedcollm.toml", 'name = "tiny"', 'name = "tinier"')
    assert fedcollm(*words).code == 5
    outcome = fedcollm(*words, "--overwrite")
    edit(swept_once / "fedcollm.toml", 'name = "tinier"', 'name = "tiny"')
    assert outcome.code == 0, outcome.err
    assert Workspace(swept_once / "sweeps/seed=7").agreement.federation.name == "tinier"


def test_a_value_that_makes_no_agreement_is_named_beside_the_file_that_is_in_order(workspace_folder: Path) -> None:
    with pytest.raises(UsageProblem) as caught:
        sweep(Workspace(workspace_folder), grid={"client_training.proximal": [0, 0.1], "federation.seed": [2]})
    changed = "client_training.proximal = 0, federation.seed = 2"
    assert caught.value.where == f"{workspace_folder / 'fedcollm.toml'}, changed by {changed}"


@pytest.mark.parametrize(
    ("words", "message", "mend"),
    [
        ([], "nothing to vary", "such as --set distillation.lambda_slm=0,0.5,1"),
        (
            ["distillation.lambda_slmm=1"],
            "distillation.lambda_slmm: unknown key; did you mean lambda_slm?",
            "every key",
        ),
        (
            ["distillation.lambda_slm="],
            "no value for distillation.lambda_slm",
            "such as --set distillation.lambda_slm=",
        ),
        (["distillation.lambda_slm"], "is not KEY=VALUE,VALUE", "such as --set"),
        (["=1"], "is not KEY=VALUE,VALUE", "such as --set"),
        (["federation.method=fedavg"], "federation.method is not for a sweep", "for other methods: fedcollm compare"),
        (["federation.name=b"], "federation.name is not for a sweep", "leave it out"),
        (["federation.seed.x=1"], "there is no setting federation.seed.x: seed has no keys", "leave .x out"),
        (["federation.seed=1.5"], "federation.seed: Input should be a valid integer, found 1.5", "every key"),
        (["distillation.lambda_slm=0,-1"], "distillation.lambda_slm: Input should be greater", "every key"),
        (["evaluation.limit=5,10"], "evaluation.limit decides the questions", "leave evaluation.limit out"),
        (["evaluation={limit=5},{limit=10}"], "evaluation is a table", "name the settings in it that vary"),
        (["slm={model='models/llm'}"], "slm is a table, and a sweep varies settings", "name the settings in it"),
        (["data={seed=1},{seed=2}"], "data is a table, and a sweep varies settings", "name the settings in it"),
        (["federation.seed=1", "federation.seed=2"], "--set names a key twice", "give all its values at once"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_made(
    words: list[str], message: str, mend: str, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before = sorted(workspace_folder.rglob("*"))
    outcome = fedcollm("sweep", *(part for word in words for part in ("--set", word)), "-w", workspace_folder)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert f"mend  {mend}" in outcome.err
    assert sorted(workspace_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=0,0.5,1", [0, 0.5, 1]),
        ("k=1e-3", [1e-3]),
        ("k=alternating,simultaneous", ["alternating", "simultaneous"]),
        ('k="a","b"', ["a", "b"]),
        ('k=["c_attn"],["c_attn","c_proj"]', [["c_attn"], ["c_attn", "c_proj"]]),
        ("k=models/slm", ["models/slm"]),
        ("k=", []),
        ("k=off,0.01", [None, 0.01]),
        ('k="off",off', ["off", None]),
    ],
)
def test_values_are_read_as_toml_or_else_as_text(text: str, values: list[Any]) -> None:
    assert parse_setting(text) == ("k", values)


def test_off_takes_a_key_out(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    edit(workspace_folder / "fedcollm.toml", "[client_training]", "[client_training]\nproximal = 0.25")
    words = ["--set", "client_training.proximal=off,0.5"]
    assert fedcollm("sweep", *words, "--slurm", "-w", workspace_folder).code == 0
    found = {name: Workspace(workspace_folder / "sweeps" / name).agreement for name in ("proximal=off", "proximal=0.5")}
    assert [one.client_training.proximal for one in found.values()] == [None, 0.5]
    outcome = fedcollm("sweep", "--set", "federation.clients=off,2", "--set", "slm.model=off", "-w", workspace_folder)
    assert outcome.code == 2
    assert "slm.model = off" in " ".join(outcome.err.split())


def test_a_folder_is_named_by_what_is_set_and_by_the_table_only_where_it_must() -> None:
    assert point_name({"slm.lora.r": 4, "federation.seed": 2}) == "r=4,seed=2"
    assert point_name({"slm.lora.r": 4, "llm.lora.r": 8}) == "slm.lora.r=4,llm.lora.r=8"
    assert point_name({"slm.model": "../models/other one"}) == "model=..-models-other-one"


def test_a_name_that_file_systems_would_refuse_is_cut_and_stays_its_own() -> None:
    one, other = ({"slm.model": "a" * 300 + end} for end in "bc")
    assert point_name(one).startswith("model=aaa")
    assert len(point_name(one)) < 255
    assert point_name(one) != point_name(other)


@pytest.mark.parametrize(
    "values",
    [
        *([True, False], ["a,b", "c"], ["8", "true"], [8, 0.5], [["c_attn"], ["c_attn", "c_proj"]]),
        *([{"r": 4, "alpha": 8}], [None, 0.5], ["off", 0.5], [None, "off"]),
    ],
    ids=str,
)
def test_a_command_that_is_named_in_a_mend_sets_the_same_values(values: list[Any]) -> None:
    found = parse_setting(in_words("k", values))
    assert found == ("k", values)
    assert [type(value) for value in found[1]] == [type(value) for value in values]


def test_scores_of_a_point_that_was_trained_on_other_rows_are_not_compared(
    swept_once: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(swept_once, folder, symlinks=True)
    words = ("sweep", "--set", "distillation.lambda_slm=0.5", "-w", folder, "--quiet")
    assert fedcollm(*words).code == 0
    rows_of_1 = folder / "private/client-1/train.jsonl"
    content = rows_of_1.read_bytes()
    rows_of_1.unlink()  # it may be one file with those of the points
    rows_of_1.write_bytes(b"".join(content.splitlines(keepends=True)[1:]))
    outcome = fedcollm(*words, "--collect")
    assert outcome.code == 5
    assert "private/client-1/train.jsonl has other rows than private has now" in outcome.err
    assert "put those rows back, or fedcollm sweep --set distillation.lambda_slm=0.5 --overwrite" in outcome.err
    rows_of_1.write_bytes(content)
    assert fedcollm(*words, "--collect").code == 0
    own = folder / "sweeps/lambda_slm=4.0,seed=8/private/client-1/train.jsonl"
    own.write_bytes(own.read_bytes() + b"\n")
    outcome = fedcollm(*WORDS, folder, "--collect")
    assert outcome.code == 5
    assert "lambda_slm=4.0,seed=8/private/client-1/train.jsonl is not what was trained on in round 1" in outcome.err
    assert "fedcollm run --workspace sweeps/lambda_slm=4.0,seed=8 --overwrite" in outcome.err


def test_two_combinations_never_share_a_folder(swept_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("sweep", "--set", "llm.model=a/llm,a-llm", "-w", swept_once)
    assert outcome.code == 2
    assert "two combinations would have the same folder: sweeps/model=a-llm" in outcome.err
    assert not (swept_once / "sweeps/model=a-llm").exists()


def test_the_deal_of_rows_that_prepare_has_not_dealt_is_not_for_a_sweep(
    studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("sweep", "--set", "data.unlabelled_share=0.1,0.9", "-w", studied_once)
    assert outcome.code == 2
    assert "data.unlabelled_share changes nothing here: prepare has not dealt the rows" in outcome.err
    assert not (studied_once / "sweeps").exists()
