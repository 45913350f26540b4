"""What every command shares: one GPU of those that are there, and an end when it is told to stop."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from fedcollm_cli import session
from fedcollm_cli.console import Console
from fedcollm_cli.session import show_one_gpu
from stages.runtime.errors import Damaged
from stages.runtime.events import Event


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("auto", None, "0"),
        ("cuda:1", None, "1"),
        ("auto", "4,5", "4"),  # as Slurm gives them to a job
        ("cuda:1", "4,5", "5"),
        ("cuda:2", "4,5", ""),  # there is no third: CUDA sees none, and the command says so
        ("cpu", "4,5", "4,5"),
    ],
)
def test_cuda_sees_the_chosen_gpu_alone(
    device: str, visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    show_one_gpu(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_a_signal_within_code_that_is_executed_from_text_is_75_too() -> None:
    program = """
import os, signal, sys, time, typer
from fedcollm_cli import session
from fedcollm_cli.console import Console
try:
    with session.guarded(Console(quiet=True, as_json=False)):
        exec("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)")
except typer.Exit as end:
    sys.exit(end.exit_code)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 75


def test_a_signal_whose_exception_a_library_drops_is_heeded_a_little_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "HEEDED_WITHIN_S", 1)

    def work() -> None:
        with session.guarded(Console(quiet=False, as_json=False)):
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            time.sleep(30)

    with pytest.raises(typer.Exit) as stopped:
        work()
    assert stopped.value.exit_code == 75
    assert "interrupted" in capfd.readouterr().err


def test_what_libraries_print_while_a_command_runs_reaches_nobody_and_its_own_words_do(
    capfd: pytest.CaptureFixture[str],
) -> None:
    console = Console(quiet=False, as_json=True)
    with session.guarded(console):
        print("a notice")
        os.write(1, b"a line from C\n")
        subprocess.run(["sh", "-c", "echo a program; echo of a library >&2"], check=True)
        logging.getLogger("some.library").addHandler(kept := logging.StreamHandler())
        logging.getLogger("some.library").warning("a warning")
        console.report(Event("warning", "three rows are left out"))
        console.result({"rows": 3}, "3 rows")
    logging.getLogger("some.library").warning("later, by what was made meanwhile")
    logging.getLogger("some.library").removeHandler(kept)
    assert capfd.readouterr() == ('{\n  "rows": 3\n}\n', "warning: three rows are left out\n")


def test_a_result_is_written_before_the_failure_that_comes_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=False, as_json=False)

    def work() -> None:
        with session.guarded(console):
            console.result(["A1"], "A1 FAIL")
            raise Damaged("one check failed", where="exchange", mend="copy it again")

    with pytest.raises(typer.Exit) as ended:
        work()
    assert ended.value.exit_code == 4
    found = capfd.readouterr()
    assert found.out == "A1 FAIL\n"
    assert found.err.startswith("error: one check failed\n")


def test_programs_that_libraries_would_fetch_from_the_hub_are_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.py").write_text("raise AssertionError('it would fetch now')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with session.guarded(Console(quiet=True, as_json=False)):
        assert importlib.util.find_spec("kernels") is None
        with pytest.raises(ImportError):
            importlib.import_module("kernels")
