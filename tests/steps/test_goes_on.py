"""What a federation meets on its way: real servers, quorums, bad checkpoints, changed data, misplaced folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import NO_NUMBERS, Outcome, edit
from stages.aggregate import aggregate
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.data.prepare import prepare
from stages.federation.run import run
from stages.progress.status import status
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event
from stages.workspace.paths import Workspace


def test_run_at_a_server_takes_the_updates_that_came_and_needs_no_client_data(finished: Path) -> None:
    for client in (1, 2, 3):
        shutil.rmtree(finished / "private" / f"client-{client}")
    shutil.rmtree(finished / "private" / "server" / "round-0002")
    run(Workspace(finished), scores=False)
    assert Workspace(finished).slm(2).exists()


def test_run_goes_on_after_a_round_that_did_without_a_client(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", "[aggregation]\nmin_clients = 2\n\n[evaluation]")
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    for client in (1, 2):
        client_train(workspace, client=client, round=1)
    aggregate(workspace, round=1)
    co_distill(workspace, round=1)
    run(workspace, scores=False)
    assert not workspace.client_update(1, 3).exists()
    assert workspace.client_update(2, 3).exists()
    assert workspace.slm(2).exists()


def test_a_damaged_update_is_waited_for_to_be_made_again(finished: Path) -> None:
    shutil.rmtree(finished / "private" / "server" / "round-0001")
    for client in (1, 2, 3):
        shutil.rmtree(finished / "private" / f"client-{client}")
    (finished / "exchange" / "round-0001" / "client-3" / "adapter_model.safetensors").write_bytes(bytes(9999))
    found = status(Workspace(finished))
    assert found.next_command is None
    assert found.waiting_for.startswith("a sound update: client-3 of round 1 is damaged")


def test_status_sees_that_a_folder_is_of_another_client(finished: Path) -> None:
    exchange = finished / "exchange" / "round-0001"
    shutil.rmtree(exchange / "client-2")
    shutil.copytree(exchange / "client-1", exchange / "client-2")
    step = next(step for step in status(Workspace(finished)).rounds[0].steps if step.name == "client-2")
    assert (step.condition, step.reason) == (
        "damaged",
        "is round-0001/client-1, here it should be round-0001/client-2",
    )


def test_checkpoints_are_gone_when_a_loss_became_nan_so_that_the_mend_works(workspace_folder: Path) -> None:
    (workspace_folder / "machine.toml").write_text("checkpoint_steps = 1\n")
    edit(workspace_folder / "fedcollm.toml", "learning_rate = 1e-2\n\n[distill", f"{NO_NUMBERS}\n\n[distill")
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    with pytest.raises(BadNumbers, match="became"):
        client_train(workspace, client=1, round=1)
    assert not workspace.unfinished("client-train", 1, 1).exists()


@pytest.mark.parametrize("changed", ["overwrite", "another LLM"])
def test_a_stopped_stage_begins_anew_when_told_to_or_when_the_base_is_another(
    workspace_folder: Path, base_models: Path, tmp_path: Path, changed: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    (workspace_folder / "machine.toml").write_text("checkpoint_steps = 1\n")
    run_until_co_distill(workspace := Workspace(workspace_folder))

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        co_distill(workspace, round=1, report=stop)
    assert list(workspace.unfinished("co-distill", 1).glob("*/checkpoint-*"))
    if changed == "another LLM":
        other = shutil.copytree(base_models / "llm", tmp_path / "other")
        torch.manual_seed(99)
        AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(other).config).save_pretrained(other)
        (workspace_folder / "machine.toml").write_text(f'checkpoint_steps = 1\n[models]\nllm = "{other}"\n')
    seen: list[int] = []
    co_distill(
        Workspace(workspace_folder),
        round=1,
        overwrite=changed == "overwrite",
        report=lambda event: seen.append(event.step) if event.kind == "step" else None,
    )
    assert seen == [1, 2, 3, 4, 5]


def run_until_co_distill(workspace: Workspace) -> None:
    broadcast(workspace, round=1)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    aggregate(workspace, round=1)


def test_a_score_is_made_anew_when_the_questions_or_the_base_change(
    finished: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    assert fedcollm("evaluate", "--zero-shot", "-w", finished).code == 0
    questions = finished / "data" / "test.jsonl"
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[:5]))
    again = fedcollm("evaluate", "--zero-shot", "--json", "-w", finished)
    assert json.loads(again.out)["tasks"]["colours"]["questions"] == 5
    (finished / "models").unlink()
    (finished / "models").mkdir()
    (finished / "models" / "slm").symlink_to(base_models / "llm")
    third = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert "already done" not in third.err


def test_a_metric_that_lm_eval_does_not_know_is_no_score(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    edit(finished / "tasks" / "colours.yaml", "metric: acc,", "metric: accc,")
    outcome = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert outcome.code == 5  # lm-eval would fetch a program of that name
    assert "metric: accc, which lm-eval does not know" in outcome.err
    assert not list(finished.rglob("results/**/*.json"))


def test_files_of_one_name_in_several_folders_are_several_sources(workspace_folder: Path) -> None:
    rows = (workspace_folder / "private" / "client-1" / "train.jsonl").read_text().splitlines(keepends=True)
    shutil.rmtree(workspace_folder / "private")
    names = []
    for number, folder in enumerate("abc"):
        (workspace_folder / folder).mkdir()
        (workspace_folder / folder / "train.jsonl").write_text("".join(rows[4 * number : 4 * number + 4]))
        names.append(f"{folder}/train.jsonl")
    data = f'[data]\nfiles = {json.dumps(names)}\nsplit = "by-task"\nauxiliary_share = 0.2\n\n[evaluation]'
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", data)
    summary = prepare(Workspace(workspace_folder))
    owners = [set(summary["parties"][f"client-{k}"]["sources"]) for k in (1, 2, 3)]
    assert owners == [{"a/train"}, {"b/train"}, {"c/train"}]


def test_embeddings_cannot_be_adapted(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[slm.lora]\nr = 4", '[slm.lora]\ntarget_modules = ["wte"]\nr = 4')
    with pytest.raises(UsageProblem, match="no linear layer but Embedding"):
        broadcast(Workspace(workspace_folder), round=1)


def test_a_completion_right_against_its_prompt_is_warned_of(workspace_folder: Path) -> None:
    data = workspace_folder / "private" / "client-1" / "train.jsonl"
    data.write_text(data.read_text().replace('"completion": " ', '"completion": "', 1))
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    told: list[str] = []
    client_train(
        workspace,
        client=1,
        round=1,
        report=lambda event: told.append(event.text) if event.kind == "warning" else None,
    )
    assert told[0].startswith("1 of 12 completions")
