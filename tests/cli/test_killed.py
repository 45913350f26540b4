"""Stopped, killed, out of disk or out of memory: nothing is half written, and the same command goes on."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import fedcollm_cli.console
from builders import Outcome, adapters, drafts, edit, published, sign
from processes import SLOWLY, start
from stages.progress.status import status
from stages.workspace.paths import Workspace

COMMANDS = {"client-train": ["--round", 1, "--client", 2], "co-distill": ["--round", 1]}


def ready(folder: Path) -> None:
    """Take the results of both training stages out of a finished workspace's round 1.

    What they were made from is signed anew, as if it had been made under the agreement as it is now.
    """
    shutil.rmtree(folder / "exchange/round-0001/client-2")
    for role in ("llm", "slm"):
        shutil.rmtree(folder / "private/server/round-0001" / role)
    agreement = hashlib.sha256((folder / "fedcollm.toml").read_bytes()).hexdigest()
    for made in ("exchange/round-0001/broadcast", "private/server/round-0001/aggregate"):
        sign(folder / made, agreement_sha256=agreement)


def lengthen(folder: Path, steps: int, *, checkpoint_steps: int) -> None:
    """As ready, with so many steps in both stages."""
    edit(folder / "fedcollm.toml", "\nsteps = 6\n", f"\nsteps = {steps}\n")
    edit(folder / "fedcollm.toml", "\nsteps = 5\n", f"\nsteps = {steps}\n")
    (folder / "machine.toml").write_text(f"checkpoint_steps = {checkpoint_steps}\n")
    ready(folder)


def has_checkpoint(folder: Path, least: int = 1) -> bool:
    """Whether there is a whole one of that step or a later."""
    found = folder.glob("private/*/round-0001/.*/*/checkpoint-*/complete")
    return any(int(path.parent.name.rpartition("-")[2]) >= least for path in found)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_in_training_exits_75_and_leaves_nothing_half_written(
    command: str, number: signal.Signals, finished: Path
) -> None:
    lengthen(finished, 100_000, checkpoint_steps=5)
    before = published(finished)
    work = start(command, *COMMANDS[command], "-w", finished)
    work.wait_until(lambda: has_checkpoint(finished))
    code, said = work.stop(number)
    assert code == 75, said
    if number == signal.SIGINT:
        assert "interrupted: nothing is half written; the same command goes on from here" in said
    else:
        assert re.search(r"stopped after step \d+ of 100000: the same command goes on from there\n", said)
    assert "Traceback" not in said
    assert published(finished) == before
    assert drafts(finished) == []
    [begun] = status(Workspace(finished)).unfinished
    assert (begun.stage, begun.of) == (command, 100_000)
    assert begun.steps >= 5
    assert number == signal.SIGINT or f"stopped after step {begun.steps} of" in said


FORKS = """
import os, sys
import stages.training.training
from fedcollm_cli.main import app

folders, children = sys.argv[1:], []
for folder in folders:
    if not (child := os.fork()):
        sys.stderr.flush()
        os.dup2(os.open(f"{folder}.err", os.O_WRONLY | os.O_CREAT), 2)
        app(["client-train", "--round", "1", "--client", "2", "-w", folder])
    children.append(child)
print(*children, flush=True)
sys.stdin.readline()
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
"""Forks a command for each folder, which ends as any Python does, and tells their ids and, when asked, their codes."""


@pytest.mark.slow
def test_a_storm_of_signals_to_the_very_end_of_the_process_is_75(finished: Path, tmp_path: Path) -> None:
    lengthen(finished, 100_000, checkpoint_steps=5)
    storms = [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]]
    folders = [shutil.copytree(finished, tmp_path / str(storm), symlinks=True) for storm in range(len(storms))]
    command, pipe = [sys.executable, "-c", FORKS, *map(str, folders)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as work:
        assert work.stdin is not None
        assert work.stdout is not None
        children = dict(zip(map(int, work.stdout.readline().split()), map(itertools.cycle, storms), strict=True))
        deadline = time.monotonic() + 120
        while not all(map(has_ended, children)) and not all(map(has_checkpoint, folders)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while not all(map(has_ended, children)):
            for child, numbers in children.items():
                os.kill(child, next(numbers))
            time.sleep(0.001)
        codes = work.communicate("\n")[0].split()
    for code, folder in zip(codes, folders, strict=True):
        said = Path(f"{folder}.err").read_text()
        assert (code, "Traceback" in said) == ("75", False), said


def has_ended(child: int) -> bool:
    """Whether a process is one that only waits for its parent to look."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_stage_goes_on_from_its_checkpoint_to_the_very_bytes_of_an_uninterrupted_one(
    command: str,
    finished: Path,
    tmp_path: Path,
    fedcollm: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengthen(finished, 300, checkpoint_steps=20)
    whole = shutil.copytree(finished, tmp_path / "whole", symlinks=True)
    assert fedcollm(command, *COMMANDS[command], "-w", whole).code == 0

    before = published(finished)
    for least in (20, 100):  # in its first process, and in one that went on
        work = start(command, *COMMANDS[command], "-w", finished, environment=SLOWLY)
        work.wait_until(partial(has_checkpoint, finished, least))
        code, said = work.stop(signal.SIGKILL)
        assert code == -signal.SIGKILL, said
        assert published(finished) == before

    monkeypatch.setattr(fedcollm_cli.console, "PLAIN_INTERVAL_S", 0.0)  # every step, not one in ten seconds
    outcome = fedcollm(command, *COMMANDS[command], "-w", finished)
    assert outcome.code == 0, outcome.err
    steps = [int(step) for step in re.findall(r" (\d+)/300 ", outcome.err)]
    assert steps == list(range(steps[0], 301))
    assert steps[0] > 100
    assert (steps[0] - 1) % 20 == 0  # the step after a checkpoint
    assert adapters(finished) == adapters(whole)
    assert not has_checkpoint(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_bytes", "named"),
    [
        (
            100,
            r"private/client-2/round-0001/\.client-train/[^/]+/\.inputs\.json",
        ),  # not even the note of the inputs
        (5_000, "private/client-2/round-0001/.client-train"),  # a checkpoint
        (10_000, "private/client-2/round-0001/.client-train"),  # another file of it
    ],
)
def test_a_full_disk_exits_8_naming_the_file(file_bytes: int, named: str, finished: Path) -> None:
    (finished / "machine.toml").write_text("checkpoint_steps = 2\n")
    ready(finished)
    before = published(finished)
    code, said = start("client-train", *COMMANDS["client-train"], "-w", finished, file_bytes=file_bytes).end()
    assert code == 8, said
    assert re.search(rf"\n  in    {finished}/{named}", said), said
    assert "mend  free some space and give the same command again" in said
    assert published(finished) == before
    assert drafts(finished) == []


@pytest.mark.slow
def test_a_disk_that_fills_while_an_adapter_is_published_leaves_no_half_of_it(finished: Path) -> None:
    shutil.rmtree(finished / "private/server/round-0001/aggregate")
    before = published(finished)
    code, said = start("aggregate", "--round", 1, "-w", finished, file_bytes=1_000).end()
    assert code == 8, said
    assert "error: File too large" in said
    assert "adapter_model.safetensors" in said
    assert published(finished) == before
    assert drafts(finished) == []


@pytest.mark.slow
@pytest.mark.parametrize("file_bytes", [100, 2_000], ids=["config", "weights"])
def test_a_disk_that_fills_while_a_model_is_exported_leaves_no_half_of_it(file_bytes: int, finished: Path) -> None:
    before = published(finished)
    code, said = start("export", "--round", 2, "--merged", "-w", finished, file_bytes=file_bytes).end()
    assert code == 8, said
    assert "Traceback" not in said
    assert f"\n  in    {finished}/exports/" in said, said
    assert "mend  free some space and give the same command again" in said
    assert published(finished) == before
    assert drafts(finished) == []


@pytest.mark.slow
@pytest.mark.parametrize(("memory_mib", "batch_size"), [(0, 4), (64, 50_000)], ids=["loading", "training"])
def test_out_of_memory_exits_6_and_names_the_settings_that_need_less(
    memory_mib: int, batch_size: int, finished: Path
) -> None:
    edit(finished / "fedcollm.toml", "steps = 6\nbatch_size = 4", f"steps = 1\nbatch_size = {batch_size}")
    ready(finished)
    before = published(finished)
    words = ["client-train", *COMMANDS["client-train"], "--device", "cpu", "-w", finished]
    code, said = start(*words, memory_bytes=memory_mib << 20).end()
    assert code == 6, said
    assert "error: out of memory" in said
    for knob in ("micro_batch", "gradient_checkpointing", "--dtype bfloat16", "max_length", "machine.toml"):
        assert knob in said
    assert published(finished) == before
    assert drafts(finished) == []


def test_out_of_memory_on_a_gpu_is_told_alike(
    finished: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of")

    ready(finished)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
    outcome = fedcollm("client-train", *COMMANDS["client-train"], "-w", finished)
    assert outcome.code == 6
    assert "error: out of memory: CUDA out of memory. Tried to allocate 20.00 MiB." in outcome.err
    assert "micro_batch" in outcome.err
