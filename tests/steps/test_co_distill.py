"""co-distill: both models' two losses of every step, against references; and the LLM's chain through the rounds."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import adapters, edit, sign, write_rows
from stages.artefacts.manifest import Manifest
from stages.co_distill import co_distill
from stages.federation.run import run
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Report, ignore
from stages.workspace.paths import Workspace

STEPS = 5  # builders.AGREEMENT
LOSSES = ("slm_ft", "slm_kd", "llm_ft", "llm_kd")
SERVER = "private/server/round-000"


def metrics_of(folder: Path, round: int, role: str = "slm") -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / f"{SERVER}{round}/{role}/manifest.json").read_text())["metrics"]
    return found


def answer_logits(base: Path, adapter: Path, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict each row's one answer token, and those tokens, by transformers and PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ids = [tokenizer.encode(row["prompt"] + row["completion"]) for row in rows]
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([one])).logits[0, -2] for one in ids])
    return logits, torch.tensor([one[-1] for one in ids])


def test_the_losses_are_those_of_torch_on_the_published_adapters(finished_once: Path) -> None:
    rows = [json.loads(line) for line in (finished_once / "private/server/auxiliary.jsonl").read_text().splitlines()]
    slm, labels = answer_logits(finished_once / "models/slm", finished_once / f"{SERVER}1/slm", rows)
    llm, _ = answer_logits(finished_once / "models/llm", finished_once / f"{SERVER}1/llm", rows)
    log_slm, log_llm = slm.log_softmax(-1), llm.log_softmax(-1)
    expected = {
        "slm_ft": F.cross_entropy(slm, labels),
        "slm_kd": F.kl_div(log_slm, log_llm, log_target=True, reduction="batchmean"),  # KL(LLM || SLM)
        "llm_ft": F.cross_entropy(llm, labels),
        "llm_kd": F.kl_div(log_llm, log_slm, log_target=True, reduction="batchmean"),  # KL(SLM || LLM)
    }
    metrics = metrics_of(finished_once, 1)
    for name, value in expected.items():
        assert math.isclose(metrics[f"{name}_after"], float(value), rel_tol=1e-4), name


def test_both_losses_of_both_models_are_recorded_for_every_step_and_fall(finished_once: Path) -> None:
    for round in (1, 2):
        log = finished_once / f"{SERVER}{round}/co-distill.jsonl"
        first, *steps, last = [json.loads(line) for line in log.read_text().splitlines()]
        assert set(first["inputs"]) == {"agreement", "data", "aggregate", "slm_base", "llm_base", "dtype"} | (
            {"llm"} if round == 2 else set()
        )
        assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
        assert all(math.isfinite(line[name]) for line in steps for name in LOSSES)
        assert last["wall_s"] > 0
        metrics = metrics_of(finished_once, round)
        assert metrics["slm_ft_after"] < metrics["slm_ft_before"]
        assert metrics["llm_ft_after"] < metrics["llm_ft_before"]


def test_in_round_one_the_llm_starts_as_its_base(finished_once: Path) -> None:
    rows = [json.loads(line) for line in (finished_once / "private/server/auxiliary.jsonl").read_text().splitlines()]
    # B = 0: the broadcast's adapter has it, and so the base alone is what an adapter of zeros gives.
    base = finished_once / "models/llm"
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    ids = [tokenizer.encode(row["prompt"] + row["completion"]) for row in rows]
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([one])).logits[0, -2] for one in ids])
    expected = F.cross_entropy(logits, torch.tensor([one[-1] for one in ids]))
    assert math.isclose(metrics_of(finished_once, 1)["llm_ft_before"], float(expected), rel_tol=1e-4)


def test_in_round_two_the_llm_starts_where_round_one_left_it(finished_once: Path) -> None:
    earlier = finished_once / f"{SERVER}1/llm/manifest.json"
    manifest = json.loads((finished_once / f"{SERVER}2/llm/manifest.json").read_text())
    assert manifest["parents"]["llm"] == hashlib.sha256(earlier.read_bytes()).hexdigest()
    # The same auxiliary rows: the loss that round 1 ended with is the loss that round 2 begins with.
    left, begun = metrics_of(finished_once, 1)["llm_ft_after"], metrics_of(finished_once, 2)["llm_ft_before"]
    assert math.isclose(left, begun, rel_tol=1e-5)


def test_the_two_adapters_name_their_parents_and_the_slm_the_llm_made_with_it(finished_once: Path) -> None:
    def digest(name: str) -> str:
        return hashlib.sha256((finished_once / f"{SERVER}{name}/manifest.json").read_bytes()).hexdigest()

    def parents(name: str) -> dict[str, str]:
        found: dict[str, str] = json.loads((finished_once / f"{SERVER}{name}/manifest.json").read_text())["parents"]
        return found

    before = {"aggregate": digest("2/aggregate"), "llm": digest("1/llm")}
    assert parents("2/llm") == before
    assert parents("2/slm") == before | {"llm-after": digest("2/llm")}
    assert parents("1/llm") == {"aggregate": digest("1/aggregate")}


def test_one_model_as_slm_and_llm_is_two_models(workspace_folder: Path, tmp_path: Path) -> None:
    """It ends where a copy of its folder ends as the LLM: each has an adapter of its own."""
    twin = shutil.copytree(workspace_folder, tmp_path / "twin", symlinks=True)
    shutil.copytree(twin / "models/slm", twin / "copy")  # models/ leads to what all tests share
    for folder, model in ((workspace_folder, "models/slm"), (twin, "copy")):
        edit(folder / "fedcollm.toml", 'model = "models/llm"', f'model = "{model}"')
        run(Workspace(folder), rounds=range(1, 2), scores=False)
    made = [
        {role: (folder / f"{SERVER}1/{role}/adapter_model.safetensors").read_bytes() for role in ("slm", "llm")}
        for folder in (workspace_folder, twin)
    ]
    assert made[0] == made[1]
    assert made[0]["slm"] != made[0]["llm"]


def test_half_of_a_result_is_made_again_without_overwrite(finished: Path) -> None:
    before = adapters(finished)
    shutil.rmtree(finished / f"{SERVER}2/slm")  # the LLM's is published first: so a run ends that is stopped between
    co_distill(Workspace(finished), round=2)
    assert adapters(finished) == before


def distilled(folder: Path, *changes: str, report: Report = ignore) -> Manifest:
    """Round 1's co-distill once more, under an agreement with these lines in [distillation]."""
    edit(folder / "fedcollm.toml", "[distillation]", "\n".join(["[distillation]", *changes]))
    agreement = hashlib.sha256((folder / "fedcollm.toml").read_bytes()).hexdigest()
    sign(folder / f"{SERVER}1/aggregate", agreement_sha256=agreement)
    return co_distill(Workspace(folder), round=1, overwrite=True, report=report)


def test_alternating_lets_the_llm_learn_from_the_slm_that_has_just_learned(finished: Path) -> None:
    log = finished / f"{SERVER}1/co-distill.jsonl"
    together = [json.loads(line) for line in log.read_text().splitlines()][1:-1]
    distilled(finished, 'order = "alternating"')
    in_turn = [json.loads(line) for line in log.read_text().splitlines()][1:-1]
    assert [line["step"] for line in in_turn] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line[name]) for line in in_turn for name in LOSSES)
    # In the first step the SLM's turn comes first and sees what it sees in `simultaneous`; so does the LLM's own loss.
    for name in ("slm_ft", "slm_kd", "llm_ft"):
        assert math.isclose(in_turn[0][name], together[0][name], rel_tol=1e-5)
    # But its teacher has changed.
    assert not math.isclose(in_turn[0]["llm_kd"], together[0]["llm_kd"], rel_tol=1e-5)


@pytest.mark.parametrize(
    "setting",
    [
        'divergence = "reverse"',
        'divergence = "jensen-shannon"',
        "min_confidence = 0.05",  # random weights, 28 words: the likeliest has a little more than 1/28
        "temperature = 2.0",
        'select = "min-ce"',
        "lambda_slm = 0.0",
        "lambda_llm = 0.0",
    ],
)
def test_each_setting_of_the_losses_changes_the_adapters(setting: str, finished: Path) -> None:
    before = adapters(finished)
    distilled(finished, setting)
    after = adapters(finished)
    changed = {role for role in ("slm", "llm") if after[weights(role)] != before[weights(role)]}
    # A weight of one model's loss changes the other too, from the second step on: it is taught by the changed one.
    assert changed == {"slm", "llm"}


def weights(role: str) -> str:
    return f"{SERVER}1/{role}/adapter_model.safetensors"


def test_without_distillation_each_model_learns_from_the_data_alone(finished: Path) -> None:
    distilled(finished, "lambda_slm = 0.0", "lambda_llm = 0.0")
    alone = adapters(finished)
    edit(finished / "fedcollm.toml", "lambda_llm = 0.0", "lambda_llm = 0.0\ntemperature = 3.0")
    distilled(finished)
    # The temperature is in the distillation terms only; with their weights at zero it moves nothing.
    for role in ("slm", "llm"):
        assert adapters(finished)[weights(role)] == alone[weights(role)]


# --- unlabelled rows


def unlabel(folder: Path, *, keep: int) -> list[dict[str, str]]:
    """Take the completions from all auxiliary rows but the first so many. Returns the rows as they were."""
    data = folder / "private/server/auxiliary.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    write_rows(data, rows[:keep] + [{"prompt": row["prompt"]} for row in rows[keep:]])
    return rows


@pytest.mark.parametrize("keep", [4, 0])
def test_unlabelled_rows_teach_by_distillation_alone(keep: int, finished: Path) -> None:
    rows = unlabel(finished, keep=keep)
    told: list[str] = []
    manifest = co_distill(Workspace(finished), round=1, overwrite=True, report=lambda event: told.append(event.text))
    assert f"{12 - keep} of 12 auxiliary rows are unlabelled: distillation alone" in told
    # Every completion is one token, and so the position after each prompt is where it was.
    slm, labels = answer_logits(finished / "models/slm", finished / f"{SERVER}1/slm", rows)
    llm, _ = answer_logits(finished / "models/llm", finished / f"{SERVER}1/llm", rows)
    log_slm, log_llm = slm.log_softmax(-1), llm.log_softmax(-1)
    expected = {
        "slm_ft": F.cross_entropy(slm[:keep], labels[:keep]) if keep else 0.0,
        "slm_kd": F.kl_div(log_slm, log_llm, log_target=True, reduction="batchmean"),
        "llm_ft": F.cross_entropy(llm[:keep], labels[:keep]) if keep else 0.0,
        "llm_kd": F.kl_div(log_llm, log_slm, log_target=True, reduction="batchmean"),
    }
    for name, value in expected.items():
        assert math.isclose(manifest.metrics[f"{name}_after"], float(value), rel_tol=1e-4), name
    assert manifest.metrics["slm_kd_after"] < manifest.metrics["slm_kd_before"]
    assert keep <= manifest.tokens <= 2 * keep  # five steps of four rows see each of twelve once or twice
    steps = [json.loads(line) for line in (finished / f"{SERVER}1/co-distill.jsonl").read_text().splitlines()][1:-1]
    assert all(math.isfinite(line[name]) for line in steps for name in LOSSES)


# --- selected rows


@pytest.mark.parametrize("keep", [12, 8])
def test_of_selected_rows_log_and_manifest_tell_who_taught_how_many(keep: int, finished: Path) -> None:
    rows = unlabel(finished, keep=keep)
    told: list[str] = []
    manifest = distilled(finished, 'select = "min-ce"', report=lambda event: told.append(event.text))
    says = f"{12 - keep} of 12 auxiliary rows are unlabelled and teach nothing"
    assert any(text.startswith(says) for text in told) == (keep < 12)
    slm, labels = answer_logits(finished / "models/slm", finished / f"{SERVER}1/slm", rows)
    llm, _ = answer_logits(finished / "models/llm", finished / f"{SERVER}1/llm", rows)
    # Every completion is one token: a row's loss is that token's.
    of_slm, of_llm = (F.cross_entropy(one[:keep], labels[:keep], reduction="none") for one in (slm, llm))
    assert manifest.metrics["slm_taught_after"] == pytest.approx(float((of_llm < of_slm).sum()) / 12)
    assert manifest.metrics["llm_taught_after"] == pytest.approx(float((of_slm < of_llm).sum()) / 12)
    steps = [json.loads(line) for line in (finished / f"{SERVER}1/co-distill.jsonl").read_text().splitlines()][1:-1]
    assert all(0 <= line["slm_taught"] + line["llm_taught"] <= 1 for line in steps)


def test_rows_without_any_answer_cannot_be_selected(finished: Path) -> None:
    unlabel(finished, keep=0)
    (finished / "models").unlink()
    with pytest.raises(UsageProblem, match="nothing would teach: no auxiliary row has a completion") as caught:
        distilled(finished, 'select = "min-ce"')
    assert caught.value.where == finished / "private/server/auxiliary.jsonl"


@pytest.mark.parametrize("role", ["slm", "llm"])
def test_a_model_that_nothing_would_teach_is_refused_before_a_model_is_loaded(role: str, finished: Path) -> None:
    unlabel(finished, keep=0)
    (finished / "models").unlink()
    with pytest.raises(UsageProblem, match=f"nothing would teach the {role.upper()}: no auxiliary row") as caught:
        distilled(finished, f"lambda_{role} = 0.0")
    assert f"distillation.lambda_{role}" in str(caught.value.mend)
    assert caught.value.where == finished / "private/server/auxiliary.jsonl"


def test_one_label_is_enough_to_learn_without_distillation(finished: Path) -> None:
    unlabel(finished, keep=1)
    manifest = distilled(finished, "lambda_slm = 0.0")
    assert manifest.metrics["slm_ft_after"] < manifest.metrics["slm_ft_before"]
