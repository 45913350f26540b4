"""The script of real input for FedMKT, on questions of ARC's form and tiny models of four tokenizers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from builders import ROOT, rows
from programs import forking_fedcollm

SCRIPT = ROOT / "tests" / "fedmkt_arc_easy.sh"
QUESTIONS = 24
COLOURS = ["red", "blue", "green"]


def write_questions(folder: Path) -> None:
    """The schema of the hub's dataset, with a rule to learn."""
    folder.mkdir(parents=True)
    for part, start in (("train", 0), ("validation", 100), ("test", 200)):
        asked = [
            {
                "id": str(number),
                "question": row["prompt"].removesuffix(" A :"),
                "choices": {"text": COLOURS, "label": ["A", "B", "C"]},
                "answerKey": "ABC"[COLOURS.index(row["completion"].strip())],
            }
            for number, row in enumerate(rows(QUESTIONS, start=start))
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))


@pytest.mark.slow
def test_the_script_goes_through_all_commands_and_every_client_ends_with_a_model_of_its_own(
    tmp_path: Path, unlike_models: Path
) -> None:
    write_questions(tmp_path / "data/datasets/arc_easy")
    with forking_fedcollm() as program:
        path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
        models = [unlike_models / name for name in ("llm", "slm-1", "slm-2", "slm-3")]
        command = ["bash", SCRIPT, tmp_path / "data", tmp_path / "study", str(QUESTIONS), str(QUESTIONS), "1", *models]
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "study/results"
    subjects = {"client-1", "client-2", "client-3", "llm"}
    assert {path.stem for path in (results / "round-0001").glob("*.json")} == subjects
    assert {path.stem for path in (results / "zero-shot").glob("*.json")} == {"slm", *subjects} - {"client-1"}
    made = [tmp_path / f"study/private/client-{client}/round-0001/slm/manifest.json" for client in (1, 2, 3)]
    losses = [json.loads(one.read_text())["metrics"] for one in made]
    # Of one client alone the rounding of bfloat16 may hide what a single step has won.
    assert sum(one["slm_ft_after"] for one in losses) < sum(one["slm_ft_before"] for one in losses)
