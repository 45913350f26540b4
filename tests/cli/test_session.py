"""What every command shares: one GPU of those that are there."""

from __future__ import annotations

import os

import pytest

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
