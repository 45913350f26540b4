"""What every command shares: one GPU of those that are there, and an end when it is told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
import typer

from fedcollm_cli import session
from fedcollm_cli.console import Console
from fedcollm_cli.session import show_one_gpu


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
