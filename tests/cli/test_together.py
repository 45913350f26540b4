"""One command as several processes, as torchrun starts them: what one would have done, told once, ended alike."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders import NO_NUMBERS, Outcome, drafts, edit, published, sign
from fedcollm_cli.torchrun import launched
from processes import SLOWLY, Command, start, start_together
from programs import forking_fedcollm
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.runtime.errors import UsageProblem
from stages.workspace.paths import Workspace

ADAPTERS = {
    "client-train": ["exchange/round-0001/client-2"],
    "co-distill": ["private/server/round-0001/llm", "private/server/round-0001/slm"],
}
WORDS = {"client-train": ["--round", 1, "--client", 2], "co-distill": ["--round", 1]}


def without(finished: Path, folder: Path, command: str) -> Path:
    """A copy of a finished workspace without what this command made."""
    copy = shutil.copytree(finished, folder, symlinks=True)
    for name in ADAPTERS[command]:
        shutil.rmtree(copy / name)
    return copy


def all_end(commands: list[Command]) -> tuple[list[int], str]:
    """Every process's exit code, and what they said together."""
    ends = [command.end() for command in commands]
    return [code for code, _ in ends], "".join(said for _, said in ends)


def assert_equal(one: Path, other: Path, command: str) -> None:
    """The same adapters within 1e-5, and the same manifests but for digests and the last digits of metrics."""
    for name in ADAPTERS[command]:
        ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for folder in (one, other))
        assert ours.keys() == theirs.keys()
        assert max(np.abs(ours[key] - theirs[key]).max() for key in ours) < 1e-5
        mine, its = (json.loads((folder / name / "manifest.json").read_text()) for folder in (one, other))
        assert mine.pop("metrics") == pytest.approx(its.pop("metrics"), rel=1e-4)
        for manifest in (mine, its):
            manifest["files"] = sorted(manifest["files"])
            manifest["parents"].pop("llm-after", None)
        assert mine == its


def steps(folder: Path) -> list[dict[str, float]]:
    (log,) = folder.glob("private/*/round-0001/co-distill.jsonl")
    return [line for line in map(json.loads, log.read_text().splitlines()) if "step" in line]


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one_and_only_the_first_writes_and_talks(
    finished: Path, tmp_path: Path
) -> None:
    for command, words in WORDS.items():
        two = without(finished, tmp_path / command, command)
        first, second = (one.end() for one in start_together(2, command, *words, "-w", two))
        assert (first[0], second) == (0, (0, ""))
        assert first[1].count("\n") == len(first[1].splitlines())
        assert ADAPTERS[command][-1] in first[1]
        assert_equal(two, finished, command)
        assert published(two).keys() == published(finished).keys()
        assert not list(two.glob("private/*/*/.c*"))
        again = [one.end() for one in start_together(2, command, *words, "-w", two)]
        assert [code for code, _ in again] == [0, 0]
        assert "already done" in again[0][1]
        if command == "co-distill":
            for mine, its in zip(steps(two), steps(finished), strict=True):
                assert mine == pytest.approx(its, rel=1e-4)


@pytest.mark.slow
def test_two_processes_attack_what_one_does(finished: Path, tmp_path: Path) -> None:
    two, words = shutil.copytree(finished, tmp_path / "two", symlinks=True), ("--round", 1, "--attack", 0.3)
    one = start("evaluate", *words, "-w", finished).end()
    first, second = (one.end() for one in start_together(2, "evaluate", *words, "-w", two))
    assert (one[0], first[0], second) == (0, 0, (0, ""))
    ours, theirs = (json.loads((folder / "results/round-0001/slm.json").read_text()) for folder in (finished, two))
    assert ours["tasks"]["colours"]["correct"] == theirs["tasks"]["colours"]["correct"]
    assert "robust_acc" in ours["tasks"]["colours"]["correct"]


@pytest.mark.slow
def test_two_processes_train_under_attack_as_one_does(workspace_folder: Path, tmp_path: Path) -> None:
    attack = "[client_training.adversarial]\nradius = 0.2\nsteps = 2\n"
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", f"{attack}[evaluation]")
    broadcast(Workspace(workspace_folder), round=1)
    client_train(Workspace(workspace_folder), round=1, client=2)
    two = without(workspace_folder, tmp_path / "two", "client-train")
    first, second = (one.end() for one in start_together(2, "client-train", *WORDS["client-train"], "-w", two))
    assert (first[0], second) == (0, (0, ""))
    assert_equal(two, workspace_folder, "client-train")


@pytest.mark.slow
@pytest.mark.parametrize("command", WORDS)
def test_so_they_do_with_base_models_spread_over_them(command: str, finished: Path, tmp_path: Path) -> None:
    two = without(finished, tmp_path / "two", command)
    roles = '"slm"' if command == "client-train" else '"llm"'
    (two / "machine.toml").write_text(f"sharding = [{roles}]\nmicro_batch = 1\ngradient_checkpointing = true\n")
    codes, said = all_end(start_together(2, command, *WORDS[command], "-w", two))
    assert codes == [0, 0], said
    assert "FSDP2" not in said  # its warnings
    assert_equal(two, finished, command)


@pytest.mark.slow
def test_so_they_do_in_the_second_of_two_phases(finished: Path, tmp_path: Path) -> None:
    one = without(finished, tmp_path / "one", "co-distill")
    for role in ("llm", "slm"):
        words = ["--phase", "capture", "--model", role, "-w", one]
        assert start("co-distill", "--round", 1, *words).end()[0] == 0
    two = shutil.copytree(one, tmp_path / "two", symlinks=True)
    train = ["co-distill", "--round", 1, "--phase", "train", "-w"]
    assert start(*train, one).end()[0] == 0
    codes, said = all_end(start_together(2, *train, two))
    assert codes == [0, 0], said
    assert_equal(two, one, "co-distill")
    codes, said = all_end(start_together(2, *train, two))
    assert (codes, said.count("already done")) == ([0, 0], 2), said


@pytest.mark.slow
def test_so_they_do_in_alternating_order_in_small_micro_batches_with_clipping_and_warm_up(
    finished: Path, tmp_path: Path
) -> None:
    edit(
        finished / "fedcollm.toml",
        "[distillation]\n",
        '[distillation]\norder = "alternating"\nwarmup_steps = 3\nslm_max_grad_norm = 0.05\nllm_max_grad_norm = 0.05\n',
    )
    (finished / "machine.toml").write_text('micro_batch = 1\nsharding = ["llm"]\n')
    agreement = hashlib.sha256((finished / "fedcollm.toml").read_bytes()).hexdigest()
    sign(finished / "private/server/round-0001/aggregate", agreement_sha256=agreement)
    one, two = (without(finished, tmp_path / name, "co-distill") for name in ("one", "two"))
    assert start("co-distill", "--round", 1, "-w", one).end()[0] == 0
    codes, said = all_end(start_together(2, "co-distill", "--round", 1, "-w", two))
    assert codes == [0, 0], said
    assert_equal(two, one, "co-distill")
    for mine, its in zip(steps(two), steps(one), strict=True):
        assert mine == pytest.approx(its, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["", 'sharding = ["slm", "llm"]\n'], ids=["each whole", "spread"])
def test_two_processes_score_as_one_does(machine: str, finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    (finished / "machine.toml").write_text(machine)
    words = ["evaluate", "--round", 1, "--json", "-w", finished]
    one = json.loads(fedcollm(*words).out)
    first, second = (command.end() for command in start_together(2, *words, "--overwrite"))
    assert (first[0], second) == (0, (0, "")), first
    assert json.loads(first[1][first[1].index("{") :]) == one
    assert len(one["tasks"]["colours"]["correct"]["acc"]) == 12


@pytest.mark.slow
def test_a_problem_is_told_once_and_ends_all_with_its_exit_code(finished: Path, tmp_path: Path) -> None:
    codes, said = all_end(start_together(2, "co-distill", "--round", 9, "-w", finished))
    assert (codes, said.count("error: ")) == ([2, 2], 1), said

    broken = without(finished, tmp_path / "broken", "client-train")
    shutil.rmtree(broken / "exchange/round-0001/broadcast")
    codes, said = all_end(start_together(2, "client-train", *WORDS["client-train"], "-w", broken))
    assert (codes, said.count("error: ")) == ([3, 3], 1), said

    wild = without(finished, tmp_path / "wild", "client-train")
    edit(wild / "fedcollm.toml", "learning_rate = 1e-2\n\n[distill", f"{NO_NUMBERS}\n\n[distill")
    for name in ("broadcast", "client-1", "client-3"):
        shutil.rmtree(wild / "exchange/round-0001" / name)
    assert start("broadcast", "--round", 1, "-w", wild).end()[0] == 0
    codes, said = all_end(start_together(2, "client-train", *WORDS["client-train"], "-w", wild))
    assert (codes, said.count("error: ")) == ([6, 6], 1), said
    assert "became" in said
    assert drafts(wild) == []

    edit(wild / "fedcollm.toml", "[evaluation]", "[privacy]\nnoise_multiplier = 1.0\n\n[evaluation]")
    shutil.rmtree(wild / "exchange/round-0001/broadcast")
    assert start("broadcast", "--round", 1, "-w", wild).end()[0] == 0
    codes, said = all_end(start_together(2, "client-train", *WORDS["client-train"], "-w", wild))
    assert (codes, said.count("error: differentially private training")) == ([2, 2], 1), said

    (wild / "machine.toml").write_text("micro_batch = 1\n")
    edit(wild / "fedcollm.toml", "[privacy]\nnoise_multiplier = 1.0\n", "")
    edit(wild / "fedcollm.toml", "steps = 6\nbatch_size = 4", "steps = 6\nbatch_size = 1")
    shutil.rmtree(wild / "exchange/round-0001/broadcast")
    assert start("broadcast", "--round", 1, "-w", wild).end()[0] == 0
    codes, said = all_end(start_together(2, "client-train", *WORDS["client-train"], "-w", wild))
    assert (codes, said.count("error: a step's 1 rows in micro-batches of 1 cannot be shared")) == ([2, 2], 1), said


@pytest.mark.slow
def test_a_masked_update_that_the_first_cannot_send_ends_all_with_its_exit_code(enrolled: Path) -> None:
    workspace = Workspace(enrolled)
    broadcast(workspace, round=1)
    client_train(workspace, client=2, round=1)
    for sent in (workspace.client_update(1, 2), workspace.masked_update(1, 2)):
        shutil.rmtree(sent)
    for taken in ("already trained", "slm_ft"):
        codes, said = all_end(start_together(2, "client-train", *WORDS["client-train"], "-w", enrolled))
        assert (codes, said.count("error: "), taken in said) == ([5, 5], 1, True), said
        shutil.rmtree(workspace.client_adapter(1, 2))


def long(finished: Path, folder: Path) -> Path:
    """A workspace in which the client's training of round 1 has 150 steps to do, a checkpoint after each 10th."""
    copy = without(finished, folder, "client-train")
    edit(copy / "fedcollm.toml", "\nsteps = 6\n", "\nsteps = 150\n")
    (copy / "machine.toml").write_text("checkpoint_steps = 10\n")
    shutil.rmtree(copy / "exchange")
    assert start("broadcast", "--round", 1, "-w", copy).end()[0] == 0
    return copy


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("private/client-2/round-0001/.client-train/*/checkpoint-*/complete"))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_one_step_and_they_go_on_to_the_same_bytes(
    finished: Path, tmp_path: Path
) -> None:
    folder = long(finished, tmp_path / "work")
    whole = shutil.copytree(folder, tmp_path / "whole", symlinks=True)
    words = ["client-train", *WORDS["client-train"], "-w"]
    assert all_end(start_together(2, *words, whole))[0] == [0, 0]
    working = start_together(2, *words, folder, environment=SLOWLY)
    working[0].wait_until(lambda: has_checkpoint(folder))
    code, said = working[1].stop(signal.SIGUSR1)
    ended = working[0].end()
    assert (code, ended[0]) == (75, 75), said + ended[1]
    assert len(re.findall(r"stopped after step \d+ of 150: the same command goes on", said + ended[1])) == 1
    alone = shutil.copytree(folder, tmp_path / "alone", symlinks=True)
    assert start(*words, alone).end()[0] == 0  # another number of processes may go on
    assert_equal(alone, whole, "client-train")
    assert all_end(start_together(2, *words, folder))[0] == [0, 0]
    weights = "exchange/round-0001/client-2/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.slow
def test_when_one_is_killed_the_others_end_soon(finished: Path, tmp_path: Path) -> None:
    folder = long(finished, tmp_path / "work")
    working = start_together(2, "client-train", *WORDS["client-train"], "-w", folder, environment=SLOWLY)
    working[0].wait_until(lambda: has_checkpoint(folder))
    started = time.monotonic()
    assert working[1].stop(signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = working[0].end()
    assert code == 75, said
    assert "another process of this stage was killed: the same command goes on" in said
    assert "Traceback" not in said
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_torchrun_itself_starts_them(finished: Path, tmp_path: Path) -> None:
    two = without(finished, tmp_path / "two", "co-distill")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    with forking_fedcollm() as program:
        words = [program, "co-distill", "--round", "1", "--processes", "2", "-w", two]
        done = subprocess.run([*torchrun, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "private/server/round-0001/slm\n"
    assert_equal(two, finished, "co-distill")


# --- what is refused


def test_a_command_for_one_process_refuses_to_be_several(finished: Path) -> None:
    codes, said = all_end(start_together(2, "aggregate", "--round", 1, "-w", finished))
    assert (codes, said.count("error: this command is for one process, torchrun has started 2")) == ([2, 2], 1)


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def test_how_a_process_was_launched_is_read_from_its_environment() -> None:
    assert launched({}, expected=None, together=False) == (0, 0, 1)
    assert launched({}, expected=1, together=True) == (0, 0, 1)
    assert launched(TORCHRUN, expected=2, together=True) == (1, 0, 2)
    assert launched(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}, expected=None, together=True) == (1, 0, 2)
    assert launched({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, expected=None, together=True) == (0, 0, 1)
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}, expected=None, together=False) == (0, 0, 1)
    assert launched({}, expected=4, together=False) == (0, 0, 1)  # machine.toml is for those that can be several


@pytest.mark.parametrize(
    ("environment", "expected", "told"),
    [
        ({}, 2, "2 processes are asked for, here is 1"),  # accelerate launch --cpu --num_processes 2
        (TORCHRUN, 4, "4 processes are asked for, here is 2"),
        (
            {"SLURM_STEP_NUM_TASKS": "3", "WORLD_SIZE": "3"},
            None,
            r"3 copies of this command were started \(SLURM_STEP_NUM_TASKS\)",
        ),
        ({"SLURM_STEP_NUM_TASKS": "3"}, None, "3 copies of this command were started"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, "2 copies of this command were started"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None, "process 1 of 2 by RANK and WORLD_SIZE, and no MASTER_ADDR is set"),
        ({"PMI_SIZE": "2"}, None, "2 copies of this command were started"),
    ],
)
def test_another_number_of_processes_than_was_asked_for_is_refused(
    environment: dict[str, str], expected: int | None, told: str
) -> None:
    with pytest.raises(UsageProblem, match=told):
        launched(environment, expected=expected, together=True)


@pytest.mark.parametrize("where", ["machine.toml", "option"])
def test_the_number_asked_for_comes_from_machine_toml_or_the_command(
    where: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    if where == "machine.toml":
        (finished / "machine.toml").write_text("processes = 2\n")
    outcome = fedcollm("co-distill", "--round", 1, *(["--processes", 2] if where == "option" else []), "-w", finished)
    assert outcome.code == 2
    assert "2 processes are asked for, here is 1" in outcome.err
    assert "torchrun --nproc-per-node 2" in outcome.err
