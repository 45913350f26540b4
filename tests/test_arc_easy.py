"""Real input: tests/arc_easy.sh on a slice of ARC-Easy, with two really trained models."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from builders import SHARED_DATA
from programs import forking_fedcollm

SCRIPT = Path(__file__).with_name("arc_easy.sh")
QUESTIONS = 160


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real data is not beside the checkout")
def test_a_slice_of_arc_easy_goes_through_all_commands_and_every_loss_falls(tmp_path: Path) -> None:
    with forking_fedcollm() as program:
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", SCRIPT, SHARED_DATA, tmp_path / "study", str(QUESTIONS), "1"]
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "everything is done" in done.stdout

    study = tmp_path / "study"
    split = json.loads((study / "private" / "split.json").read_text())
    assert sum(party["rows"] for party in split["parties"].values()) == QUESTIONS - split["duplicates_dropped"]
    round = "round-0001"
    for client in (1, 2, 3, 4):
        manifest = study / "exchange" / round / f"client-{client}" / "manifest.json"
        metrics = json.loads(manifest.read_text())["metrics"]
        assert metrics["slm_ft_after"] < metrics["slm_ft_before"]
    metrics = json.loads((study / "private" / "server" / round / "slm" / "manifest.json").read_text())["metrics"]
    for model in ("slm", "llm"):
        assert metrics[f"{model}_ft_after"] < metrics[f"{model}_ft_before"]
    for subject in ("slm", "llm"):
        scores = json.loads((study / "results" / round / f"{subject}.json").read_text())["tasks"]["arc_easy"]
        assert scores["questions"] == QUESTIONS
        assert 0.0 <= scores["metrics"]["acc"] <= 1.0
