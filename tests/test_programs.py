"""The program that forks its commands is like the installed one: streams, exit code, folder, environment, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import edit
from processes import SECONDS_FOR_A_STEP
from programs import forking_fedcollm

PATIENCE_S = 120.0
TRAIN = ("client-train", "--round", "1", "--client", "2")


@pytest.fixture
def program() -> Iterator[Path]:
    with forking_fedcollm() as found:
        yield found


@pytest.fixture
def opened(workspace_folder: Path, program: Path) -> Path:
    """A workspace whose round 1 is open; training has 20 steps, and keeps a checkpoint after each."""
    edit(workspace_folder / "fedcollm.toml", "\nsteps = 6\n", "\nsteps = 20\n")
    (workspace_folder / "machine.toml").write_text("checkpoint_steps = 1\n")
    subprocess.run([program, "broadcast", "--round", "1"], cwd=workspace_folder, check=True, capture_output=True)
    return workspace_folder


def trains(program: Path, folder: Path, seconds_for_a_step: float) -> subprocess.Popen[bytes]:
    """The program at work, after its first checkpoint."""
    environment = os.environ | {SECONDS_FOR_A_STEP: str(seconds_for_a_step)}
    work = subprocess.Popen([program, *TRAIN], cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    until(lambda: any(folder.glob("private/client-2/round-0001/.client-train/*/checkpoint-*/complete")))
    assert work.poll() is None
    return work


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_it_says_and_its_exit_code_come_back(program: Path, opened: Path) -> None:
    def call(folder: Path) -> tuple[int, str, str]:
        command = [program, "broadcast", "--round", "1"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        return done.returncode, done.stdout, done.stderr

    code, out, err = call(opened)
    assert (code, out) == (0, "exchange/round-0001/broadcast\n")
    assert "already done" in err
    code, out, err = call(opened.parent)
    assert (code, out) == (2, "")
    assert "error: " in err


@pytest.mark.slow
def test_a_signal_to_it_reaches_the_command(program: Path, opened: Path) -> None:
    work = trains(program, opened, 0.5)
    work.send_signal(signal.SIGUSR1)
    assert work.wait(PATIENCE_S) == 75


@pytest.mark.slow
def test_who_kills_it_has_killed_the_command(program: Path, opened: Path) -> None:
    work = trains(program, opened, 2.0)
    work.kill()
    assert work.wait(PATIENCE_S) == -signal.SIGKILL

    def is_free() -> bool:
        done = subprocess.run([program, *TRAIN], cwd=opened, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 7), done.stderr  # 7: another process is at work there
        return done.returncode == 0

    started = time.monotonic()
    until(is_free)
    assert time.monotonic() - started < 20 * 2.0  # it had that long to go
