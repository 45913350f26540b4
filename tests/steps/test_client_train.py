"""client-train: what was learned is measured, logged and in the file that travels; or else nothing is published."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import NO_NUMBERS, Outcome, contents, edit, published, rows, write_rows
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.runtime.events import Event
from stages.workspace.paths import Workspace

STEPS, BATCH = 6, 4  # builders.AGREEMENT
UPDATE = "exchange/round-0001/client-2"


def manifest_of(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((folder / UPDATE / "manifest.json").read_text())
    return found


def loss_of(base: Path, adapter: Path, data: Path) -> float:
    """The mean cross-entropy of the completions, row by row, by transformers and PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    total, tokens = 0.0, 0
    for row in map(json.loads, data.read_text().splitlines()):
        ids = torch.tensor([tokenizer.encode(row["prompt"] + row["completion"])])
        answer = len(tokenizer.encode(row["completion"]))
        with torch.no_grad():
            logits = model(ids).logits[0, -answer - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, -answer:], reduction="sum"))
        tokens += answer
    return total / tokens


def test_the_loss_falls_and_is_the_one_that_peft_measures_on_the_published_folder(finished_once: Path) -> None:
    metrics = manifest_of(finished_once)["metrics"]
    base, data = finished_once / "models/slm", finished_once / "private/client-2/train.jsonl"
    before = loss_of(base, finished_once / "exchange/round-0001/broadcast", data)
    after = loss_of(base, finished_once / UPDATE, data)
    assert math.isclose(metrics["slm_ft_before"], before, rel_tol=1e-4)
    assert math.isclose(metrics["slm_ft_after"], after, rel_tol=1e-4)
    assert after < before


def test_what_was_seen_is_counted(finished_once: Path) -> None:
    manifest = manifest_of(finished_once)
    assert manifest["steps"] == STEPS
    assert manifest["examples"] == STEPS * BATCH
    assert manifest["tokens"] == STEPS * BATCH  # one answer token a row: a colour


def test_the_private_log_has_its_inputs_a_line_for_each_step_and_an_end(finished_once: Path) -> None:
    log = finished_once / "private/client-2/round-0001/client-train.jsonl"
    first, *steps, last = [json.loads(line) for line in log.read_text().splitlines()]
    assert set(first["inputs"]) == {"agreement", "data", "broadcast", "slm_base", "dtype"}
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["slm_ft"]) for line in steps)
    assert last["wall_s"] > 0


def test_every_step_is_reported_with_its_loss(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    events: list[Event] = []
    client_train(workspace, client=2, round=1, report=events.append)
    steps = [event for event in events if event.kind == "step"]
    assert [(event.step, event.total) for event in steps] == [(step, STEPS) for step in range(1, STEPS + 1)]
    log = (workspace_folder / "private/client-2/round-0001/client-train.jsonl").read_text().splitlines()
    assert [event.values["slm_ft"] for event in steps] == [json.loads(line)["slm_ft"] for line in log[1:-1]]


def test_the_update_moved_from_the_broadcast_by_the_norm_that_it_states(finished_once: Path) -> None:
    from safetensors.numpy import load

    before, after = (
        load((finished_once / "exchange/round-0001" / name / "adapter_model.safetensors").read_bytes())
        for name in ("broadcast", "client-2")
    )
    metrics = manifest_of(finished_once)["metrics"]
    moved = math.sqrt(sum(float(((after[name] - before[name]) ** 2).sum()) for name in after))
    size_b = math.sqrt(sum(float((after[name] ** 2).sum()) for name in after if "lora_B" in name))
    assert math.isclose(metrics["update_norm"], moved, rel_tol=1e-5)
    assert math.isclose(metrics["lora_b_norm"], size_b, rel_tol=1e-5)
    assert 0 < size_b < moved


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            "learning_rate = 1e-46",
            "the trained adapter's B is all zero: it changes nothing",
        ),  # less than float32 can hold
        (NO_NUMBERS, "slm_ft became nan"),
    ],
)
def test_an_adapter_that_learned_nothing_or_broke_is_not_published(
    settings: str, told: str, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(workspace_folder / "fedcollm.toml", "\nlearning_rate = 1e-2", f"\n{settings}")
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    before = published(workspace_folder)
    outcome = fedcollm("client-train", "--round", 1, "--client", 1, "-w", workspace_folder)
    assert outcome.code == 6
    assert told in outcome.err
    assert "mend  " in outcome.err
    assert "learning rate" in outcome.err
    assert published(workspace_folder) == before


def test_a_loss_that_rose_is_warned_of(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    # One step much too long: the loss goes from 3.45 to 3.64, and no rounding adds up over steps to change that.
    edit(workspace_folder / "fedcollm.toml", "\nlearning_rate = 1e-2", "\nlearning_rate = 1.0")
    edit(workspace_folder / "fedcollm.toml", "steps = 6\nbatch_size = 4", "steps = 1\nbatch_size = 1")
    data = [row | {"completion": " blue" if i else " red"} for i, row in enumerate(rows(12))]
    write_rows(workspace_folder / "private/client-1/train.jsonl", data)
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    outcome = fedcollm("client-train", "--round", 1, "--client", 1, "-w", workspace_folder)
    assert outcome.code == 0
    assert "warning: client 1's loss rose in training" in outcome.err


def test_an_adapter_that_ran_away_is_not_published(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    """Adam's first step moves each weight by the learning rate, whatever the gradient: no rounding decides this.

    Taken for the one red row of all, it makes the loss of the others rise.
    """
    edit(workspace_folder / "fedcollm.toml", "\nlearning_rate = 1e-2", "\nlearning_rate = 300.0")
    edit(workspace_folder / "fedcollm.toml", "steps = 6\nbatch_size = 4", "steps = 1\nbatch_size = 1")
    data = [row | {"completion": " blue" if i else " red"} for i, row in enumerate(rows(12))]
    write_rows(workspace_folder / "private/client-1/train.jsonl", data)
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    before = published(workspace_folder)
    outcome = fedcollm("client-train", "--round", 1, "--client", 1, "-w", workspace_folder)
    assert outcome.code == 6
    assert "the SLM's adapter has moved a weight by 300 while its loss rose: more than 100" in outcome.err
    assert "mend  lower the learning rate" in outcome.err
    assert published(workspace_folder) == before


def test_a_client_trains_under_attack_by_one_setting_and_says_both_losses(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    attack = "[client_training.adversarial]\nradius = 0.2\nsteps = 2\n"
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", f"{attack}[evaluation]")
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    words = ("client-train", "--round", 1, "--client", 2, "-w", workspace_folder)
    assert fedcollm(*words).code == 0
    made, metrics = contents(workspace_folder / UPDATE), manifest_of(workspace_folder)["metrics"]
    base, data = workspace_folder / "models/slm", workspace_folder / "private/client-2/train.jsonl"
    assert math.isclose(metrics["slm_ft_after"], loss_of(base, workspace_folder / UPDATE, data), rel_tol=1e-4)
    assert metrics["slm_ft_before"] < metrics["slm_adv_before"] > metrics["slm_adv_after"] > metrics["slm_ft_after"]
    log = (workspace_folder / "private/client-2/round-0001/client-train.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, log) if "step" in line]
    assert all(line.keys() == {"step", "slm_ft", "slm_adv"} for line in steps)
    shutil.rmtree(workspace_folder / UPDATE)
    assert fedcollm(*words).code == 0
    assert contents(workspace_folder / UPDATE) == made  # the same bytes again


def test_an_attack_beside_differential_privacy_is_refused_at_the_first_command(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    both = "[client_training.adversarial]\nradius = 0.2\n[privacy]\nepsilon = 8.0\n"
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", f"{both}[evaluation]")
    refused = fedcollm("broadcast", "--round", 1, "-w", workspace_folder)
    assert refused.code == 2
    assert "client_training.adversarial is not for the training of differential privacy: choose one" in refused.err


def test_a_micro_batch_changes_memory_and_not_the_numbers(finished: Path) -> None:
    before = manifest_of(finished)["metrics"]
    (finished / "machine.toml").write_text("micro_batch = 1\n")
    metrics = client_train(Workspace(finished), client=2, round=1, overwrite=True).metrics
    assert math.isclose(metrics["slm_ft_after"], before["slm_ft_after"], rel_tol=1e-4)


def test_an_epoch_is_a_pass_over_the_rows_filled_up_to_whole_batches(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "steps = 6", "epochs = 1.0")
    write_rows(workspace_folder / "private/client-1/train.jsonl", rows(10))
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    manifest = client_train(workspace, client=1, round=1)
    assert manifest.steps == 3  # ten rows in batches of four
    assert manifest.examples == 12


@pytest.mark.parametrize("privacy", ["", "\n[privacy]\nnoise_multiplier = 1.0\nmax_grad_norm = 1.0\ndelta = 1e-3\n"])
def test_numbers_that_were_none_before_any_step_are_not_blamed_on_the_learning_rate(
    privacy: str, workspace_folder: Path, base_models: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    base = shutil.copytree(base_models / "slm", tmp_path / "huge")
    weights = load_file(base / "model.safetensors")
    weights["transformer.ln_f.weight"].fill_(3e38)  # finite, as each weight is; what it multiplies is not
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (workspace_folder / "machine.toml").write_text(f"[models]\nslm = {json.dumps(str(base))}\n")
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + privacy)
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    outcome = fedcollm("client-train", "--round", 1, "--client", 1, "-w", workspace_folder)
    assert outcome.code == 6, outcome.err
    said = outcome.err.replace("\n", " ")
    assert "slm_ft is nan before any step" in said
    assert "take another base" in said
    assert "lower the learning rate" not in said
    assert not list((workspace_folder / "private/client-1").glob("**/checkpoint-*"))


def test_a_base_with_another_configuration_than_the_broadcasts_is_refused(
    workspace_folder: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    (workspace_folder / "models").unlink()
    shutil.copytree(base_models, workspace_folder / "models")
    config = workspace_folder / "models/slm/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_head": 4}))
    outcome = fedcollm("client-train", "--client", 1, "--round", 1, "-w", workspace_folder)
    assert outcome.code == 5
    assert "another configuration lies beside them" in outcome.err
    assert not (workspace_folder / "exchange/round-0001/client-1").exists()
