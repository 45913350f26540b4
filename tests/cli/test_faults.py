"""Bad input of every kind but adapters: the message names file, found, expected and mend, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import Outcome, edit, published
from stages.client_train import client_train
from stages.progress.status import status
from stages.runtime.errors import Refused
from stages.runtime.events import Event
from stages.workspace.paths import Workspace

Refusal = Callable[..., str]


# --- where and by what agreement


def test_outside_any_workspace_a_command_says_how_to_make_one(tmp_path: Path, refused: Refusal) -> None:
    said = refused(tmp_path, 2, "broadcast", "--round", 1)
    assert "no fedcollm.toml in this folder or above it" in said
    assert str(tmp_path) in said
    assert "fedcollm init" in said


def test_all_mistakes_of_the_settings_are_named_at_once(workspace_folder: Path, refused: Refusal) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "learning_rate = 1e-2\n\n[distillation]", "learning_rat = 1e-2\n\n[distillation]")
    edit(toml, "rounds = 2", 'rounds = "two"')
    said = refused(workspace_folder, 2, "broadcast", "--round", 1)
    assert str(toml) in said
    assert "2 mistakes in the settings" in said
    assert "client_training.learning_rat: unknown key; did you mean learning_rate?" in said
    assert "federation.rounds: Input should be a valid integer, found 'two'" in said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("checkpoint_step = 5", "checkpoint_step: unknown key; did you mean checkpoint_steps?"),
        ('device = "gpu"', "device: "),
        ("device = ", "not valid TOML"),
    ],
)
def test_mistakes_in_machine_toml_are_named_too(
    text: str, found: str, workspace_folder: Path, refused: Refusal
) -> None:
    (workspace_folder / "machine.toml").write_text(text)
    said = refused(workspace_folder, 2, "broadcast", "--round", 1)
    assert found in said
    assert str(workspace_folder / "machine.toml") in said


@pytest.mark.parametrize("command", ["client-train --client 9 --round 1", "evaluate --client 9 --round 1"])
def test_a_client_that_the_agreement_does_not_have_is_refused(command: str, finished: Path, refused: Refusal) -> None:
    said = refused(finished, 2, *command.split())
    assert "there is no client 9: the agreement has clients 1 to 3" in said
    assert str(finished / "fedcollm.toml") in said


@pytest.mark.parametrize("stage", ["broadcast", "client-train --client 1", "aggregate", "co-distill", "evaluate"])
def test_a_round_that_the_agreement_does_not_have_is_refused(stage: str, finished: Path, refused: Refusal) -> None:
    said = refused(finished, 2, *stage.split(), "--round", 5)
    assert "there is no round 5: the agreement has rounds 1 to 2" in said
    assert str(finished / "fedcollm.toml") in said


# --- what is not there yet

NOT_YET = {
    "broadcast --round 2": ("private/server/round-0001/slm", "fedcollm co-distill --round 1"),
    "client-train --client 2 --round 1": ("exchange/round-0001/broadcast", "fedcollm broadcast --round 1"),
    "aggregate --round 1": ("exchange/round-0001/broadcast", "fedcollm broadcast --round 1"),
    "co-distill --round 1": ("private/server/round-0001/aggregate", "fedcollm aggregate --round 1"),
    "evaluate --round 1 --model slm": ("private/server/round-0001/slm", "fedcollm co-distill --round 1"),
    "evaluate --round 1 --model llm": ("private/server/round-0001/llm", "fedcollm co-distill --round 1"),
    "evaluate --round 1 --client 3": ("exchange/round-0001/client-3", "fedcollm client-train --client 3 --round 1"),
}


@pytest.mark.parametrize("command", NOT_YET)
def test_a_step_before_its_turn_exits_3_and_names_the_command_that_comes_first(
    command: str, workspace_folder: Path, refused: Refusal
) -> None:
    file, mend = NOT_YET[command]
    said = refused(workspace_folder, 3, *command.split())
    assert f"in    {workspace_folder / file}" in said
    assert mend in said


@pytest.mark.parametrize(
    ("file", "command"),
    [("client-2/train.jsonl", "client-train --client 2 --round 1"), ("server/auxiliary.jsonl", "co-distill --round 1")],
)
def test_a_party_without_data_is_told_where_to_put_it(
    file: str, command: str, finished: Path, refused: Refusal
) -> None:
    (finished / "private" / file).unlink()
    said = refused(finished, 3, *command.split())
    assert str(finished / "private" / file) in said
    assert "fedcollm prepare" in said


# --- data

GOOD = json.dumps({"prompt": "Q :", "completion": " red"}) + "\n"
LONG = json.dumps({"prompt": "red " * 64, "completion": " red"}) + "\n"  # 65 tokens, one for each word
BAD_DATA = {
    "an empty file": ("", "train.jsonl is empty"),
    "an empty line": (GOOD + "\n" + GOOD, "line 2 of train.jsonl: an empty line"),
    "no JSON": (GOOD + GOOD + "red\n", "line 3 of train.jsonl: not JSON"),
    "a list": (GOOD + "[1]\n", "line 2 of train.jsonl: a list"),
    "no prompt": (GOOD + '{"completion": "red"}\n', "line 2 of train.jsonl: no prompt"),
    "no completion": ('{"prompt": "Q", "answer": "x"}\n', "line 1 of train.jsonl: no completion"),
    "a number for a prompt": (GOOD + '{"prompt": 1, "completion": "x"}\n', "line 2 of train.jsonl: prompt is not text"),
    "a blank completion": ('{"prompt": "Q", "completion": " "}\n', "line 1 of train.jsonl: completion is not text, or"),
    "a row longer than the context": (GOOD + LONG, "line 2 of train.jsonl has 65 tokens; max_length is 512, the model"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_a_bad_row_is_named_by_its_line(kind: str, finished: Path, refused: Refusal) -> None:
    content, found = BAD_DATA[kind]
    for file, command in (
        ("client-2/train.jsonl", "client-train --client 2 --round 1 --overwrite"),
        ("server/auxiliary.jsonl", "co-distill --round 1 --overwrite"),
    ):
        path = finished / "private" / file
        path.write_text(content)
        said = refused(finished, 4, *command.split())
        assert found.replace("train.jsonl", path.name) in said
        assert f"in    {path}" in said


def test_data_that_is_not_utf_8_is_refused(answered: Path, refused: Refusal) -> None:
    (answered / "private/client-2/train.jsonl").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused(answered, 4, "client-train", "--client", 2, "--round", 1, "--overwrite")


@pytest.mark.parametrize("phases", [1, 2])
def test_rows_too_long_are_left_out_and_counted_where_the_agreement_says_skip(
    phases: int, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    here = workspace_folder
    edit(here / "fedcollm.toml", "[evaluation]", '[data]\ntoo_long = "skip"\n\n[evaluation]')
    server, auxiliary = here / "private/server", here / "private/server/auxiliary.jsonl"
    auxiliary.write_text(2 * LONG + auxiliary.read_text())
    (server / "held-out.jsonl").write_text(3 * LONG + auxiliary.read_text())
    path = here / "private/client-2/train.jsonl"
    path.write_text(LONG + path.read_text())
    told = {}
    steps = ["broadcast", "client-train --client 1", "client-train --client 2", "client-train --client 3"]
    steps += ["aggregate --gate 9"]
    phased = [f"co-distill --phase {one}" for one in ("capture --model llm", "capture --model slm", "train")]
    for step in [*steps, *(phased if phases == 2 else ["co-distill"])]:
        outcome = fedcollm(*step.split(), "--round", 1, "-w", here)
        assert outcome.code == 0, outcome.err
        told[step] = outcome.err
    assert "left out" not in told["client-train --client 1"]
    assert "1 of 13 rows of train.jsonl are too long and left out" in told["client-train --client 2"]
    assert "5 of 17 rows of held-out.jsonl are too long and left out" in told["aggregate --gate 9"]
    assert all("2 of 14 rows of auxiliary.jsonl are too long" in told[one] for one in told if "co-distill" in one)
    made = {"exchange/round-0001/client-2": 1.0, "private/server/round-0001/llm": 2.0}
    made |= {"private/server/round-0001/slm": 2.0, "exchange/round-0001/client-1": None}
    made |= {"private/server/round-0001/captured-slm": 2.0} if phases == 2 else {}
    for folder, count in made.items():
        metrics = json.loads((here / folder / "manifest.json").read_text())["metrics"]
        assert metrics.get("rows_left_out") == count, folder
    gated = json.loads((server / "round-0001/aggregate/manifest.json").read_text())["metrics"]
    assert gated["gate_rows_left_out"] == 5.0
    counts = {
        path: json.loads(path.read_text().partition("\n")[0]) for path in here.glob("private/*/round-0001/*.jsonl")
    }
    logged = {str(path.relative_to(here / "private")): line for path, line in counts.items()}
    assert logged["client-2/round-0001/client-train.jsonl"]["rows_left_out"] == 1
    assert logged["server/round-0001/co-distill.jsonl"]["rows_left_out"] == 2
    assert logged["server/round-0001/aggregate.jsonl"]["gate_rows_left_out"] == 5
    assert not status(Workspace(here), verify=True).changed


# --- models and tasks


def other_model(workspace: Path, role: str, **changes: int) -> Path:
    """A base model like that of the workspace, with other random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base, other = workspace / "models" / role, workspace / f"other-{role}"
    shutil.copytree(base, other)
    torch.manual_seed(99)
    config = AutoConfig.from_pretrained(base, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    (workspace / "machine.toml").write_text(f'[models]\n{role} = "{other.name}"\n')
    return other


def test_a_client_with_another_base_model_refuses_before_it_trains(answered: Path, refused: Refusal) -> None:
    other_model(answered, "slm")
    said = refused(answered, 5, "client-train", "--client", 1, "--round", 1, "--overwrite")
    assert "the SLM here is not the one of exchange/round-0001/broadcast: weights_sha256 is" in said
    events: list[Event] = []
    with pytest.raises(Refused):
        client_train(Workspace(answered), client=1, round=1, overwrite=True, report=events.append)
    assert [event.kind for event in events] == ["stage"]


def test_two_models_with_different_tokenizers_cannot_teach_each_other(finished: Path, refused: Refusal) -> None:
    tokenizer = other_model(finished, "llm") / "tokenizer.json"
    edit(tokenizer, '"red": 2,', '"crimson": 2,')
    shutil.rmtree(finished / "private/server/round-0001/slm")
    said = refused(finished, 2, "co-distill", "--round", 1)
    assert "the tokenizers differ: token 2 is 'red' for the SLM, 'crimson' for the LLM" in said


@pytest.mark.parametrize("words", [["broadcast", "--round", 1], ["plan"], ["run"]])
def test_nor_does_anybody_train_for_them_first(words: list[Any], workspace_folder: Path, refused: Refusal) -> None:
    edit(other_model(workspace_folder, "llm") / "tokenizer.json", '"red": 2,', '"crimson": 2,')
    said = refused(workspace_folder, 2, *words)
    assert "the tokenizers differ: token 2 is 'red' for the SLM, 'crimson' for the LLM" in said
    assert not (workspace_folder / "exchange/round-0001/broadcast").exists()


def test_target_modules_that_do_not_exist_are_refused_naming_those_that_do(
    workspace_folder: Path, refused: Refusal
) -> None:
    edit(workspace_folder / "fedcollm.toml", "[llm]", 'target_modules = ["q_proj"]\n\n[llm]')
    said = refused(workspace_folder, 2, "broadcast", "--round", 1)
    assert "target_modules ['q_proj'] do not fit gpt2" in said
    for name in ("c_attn", "c_fc", "c_proj"):  # the projections of a GPT-2 block
        assert name in said


def test_a_model_folder_that_is_not_there_is_named(workspace_folder: Path, refused: Refusal) -> None:
    (workspace_folder / "machine.toml").write_text('[models]\nslm = "elsewhere"\n')
    said = refused(workspace_folder, 3, "broadcast", "--round", 1)
    assert str(workspace_folder / "elsewhere") in said
    assert "models.slm in machine.toml" in said


def test_a_model_folder_without_a_model_is_named(workspace_folder: Path, refused: Refusal) -> None:
    (workspace_folder / "empty").mkdir()
    (workspace_folder / "machine.toml").write_text('[models]\nslm = "empty"\n')
    assert str(workspace_folder / "empty") in refused(workspace_folder, 2, "broadcast", "--round", 1)


def test_a_device_that_is_not_there_is_refused(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    outcome = fedcollm("broadcast", "--round", 1, "--device", missing, "-w", workspace_folder)
    assert outcome.code == 2
    assert f"there is no device {missing} here" in outcome.err
    assert "mend  give --device cpu" in outcome.err


@pytest.mark.slow  # the names that lm-eval ships are indexed before it is said that none fits
def test_an_unknown_task_is_refused_naming_those_of_the_workspace(finished: Path, refused: Refusal) -> None:
    edit(finished / "fedcollm.toml", 'tasks = ["colours"]', 'tasks = ["colors"]')
    said = refused(finished, 2, "evaluate", "--zero-shot")
    assert "no task named 'colors', here or in lm-eval" in said
    assert f"in    {finished / 'tasks'}" in said
    assert "known in this workspace: colours" in said


def test_the_data_file_of_a_task_that_is_not_there_is_named(finished: Path, refused: Refusal) -> None:
    (finished / "data" / "test.jsonl").unlink()
    said = refused(finished, 3, "evaluate", "--zero-shot")
    assert "test.jsonl" in said
    assert "data_files" in said


# --- held by another


def test_a_stage_that_another_process_is_doing_is_waited_for_and_said_so_once(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    import fcntl

    lock = finished / "private/client-1/round-0001/client-train.lock"
    with lock.open("a") as file:  # flock belongs to the open file: a second opening stands for another process
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.write_text("process 1234 on node7")
        threading.Timer(1.0, fcntl.flock, [file, fcntl.LOCK_UN]).start()
        outcome = fedcollm("client-train", "--client", 1, "--round", 1, "-w", finished)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("another process is doing this stage: waiting for it (process 1234 on node7)") == 1
    assert outcome.err.index("waiting for it") < outcome.err.index("already done")


def test_what_a_killed_publication_left_beside_the_place_disturbs_nobody(
    answered: Path, fedcollm: Callable[..., Outcome]
) -> None:
    exchange = answered / "exchange" / "round-0001"
    shutil.copytree(exchange / "client-2", exchange / f".client-2.{os.getpid() + 1}.partial")
    before = published(answered)
    assert fedcollm("aggregate", "--round", 1, "-w", answered).code == 0
    assert before.items() <= published(answered).items()
    assert fedcollm("status", "-w", answered).code == 0
