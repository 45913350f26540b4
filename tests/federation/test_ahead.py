"""run --dry-run: lines that can be pasted, and that leave what run leaves."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit, published
from programs import forking_fedcollm


def lines(fedcollm: Callable[..., Outcome], folder: Path, *words: object) -> list[str]:
    """What --dry-run prints, a line each; the same as JSON."""
    outcome = fedcollm("run", "--dry-run", *words, "-w", folder)
    assert outcome.code == 0, outcome.err
    found: list[str] = json.loads(fedcollm("run", "--dry-run", "--json", *words, "-w", folder).out)
    assert outcome.out == "".join(f"{line}\n" for line in found or ["nothing is left to do"])
    ending = f" --workspace {shlex.quote(str(folder))}"
    assert all(ending in line for line in found)
    return [line.replace(ending, "").removeprefix("fedcollm ") for line in found]


ROUND_1 = [
    "broadcast --round 1",
    *(f"client-train --client {k} --round 1" for k in (1, 2, 3)),
    "aggregate --round 1",
    "co-distill --round 1",
]


def test_a_round_is_its_steps_and_its_scores(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    before = published(workspace_folder)
    assert lines(fedcollm, workspace_folder, "--round", 1) == [
        *("evaluate --zero-shot --model slm", "evaluate --zero-shot --model llm"),
        *ROUND_1,
        *("evaluate --round 1 --model slm", "evaluate --round 1 --model llm"),
        *(f"evaluate --round 1 --client {k}" for k in (1, 2, 3)),
    ]
    both = lines(fedcollm, workspace_folder, "--no-scores")
    assert both == [*ROUND_1, *(line.replace("--round 1", "--round 2") for line in ROUND_1)]
    assert lines(fedcollm, workspace_folder, "--no-client-scores", "--last-round")[2:] == [
        *both,
        *("evaluate --round 2 --model slm", "evaluate --round 2 --model llm"),
    ]
    assert published(workspace_folder) == before


def test_what_is_done_is_left_out_and_overwrite_lists_it_again(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    assert lines(fedcollm, finished, "--no-scores") == []
    again = lines(fedcollm, finished, "--no-scores", "--overwrite", "--round", 1)
    assert again == [f"{line} --overwrite" for line in ROUND_1]
    assert fedcollm("evaluate", "--round", 2, "--model", "llm", "-w", finished).code == 0
    left = lines(fedcollm, finished, "--no-client-scores", "--round", 2)
    assert left == [
        *("evaluate --zero-shot --model slm", "evaluate --zero-shot --model llm"),
        "evaluate --round 2 --model slm",
    ]


@pytest.mark.parametrize("kind", ["workspace", "unlike", "equal"])
def test_the_lines_leave_the_very_bytes_of_run(
    kind: str, request: pytest.FixtureRequest, fedcollm: Callable[..., Outcome]
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    for line in lines(fedcollm, folder, "--no-scores"):
        outcome = fedcollm(*shlex.split(line), "-w", folder)
        assert outcome.code == 0, outcome.err
    once = request.getfixturevalue("finished_once" if kind == "workspace" else f"{kind}_once")
    weights = [path for path in once.rglob("*.safetensors") if "round-" in str(path)]
    assert len(weights) > 10
    for path in weights:
        assert path.read_bytes() == (folder / path.relative_to(once)).read_bytes(), path
    assert lines(fedcollm, folder, "--no-scores") == []


@pytest.mark.slow
def test_the_lines_of_a_secure_round_are_a_script_that_ends_well(
    workspace_folder: Path, own_secrets: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(workspace_folder / "fedcollm.toml", "[distillation]", '[aggregation]\nmode = "secure"\n\n[distillation]')
    words = ("run", "--dry-run", "--round", 1, "--no-client-scores", "-w", workspace_folder)
    script = fedcollm(*words).out
    assert script.index("fedcollm keys --client 3") < script.index("fedcollm enroll") < script.index("fedcollm join")
    assert script.count("fedcollm aggregate --round 1") == 2
    with forking_fedcollm() as program:
        environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert (workspace_folder / "private/server/round-0001/slm/manifest.json").exists()
    assert fedcollm(*words).out == "nothing is left to do\n"


def test_keys_come_first_wherever_updates_are_hidden(
    workspace_folder: Path, own_secrets: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(workspace_folder / "fedcollm.toml", "[distillation]", '[aggregation]\nmode = "encrypted"\n\n[distillation]')
    script = fedcollm("run", "--dry-run", "--round", 1, "--no-scores", "-w", workspace_folder).out
    assert script.index("fedcollm keys --client 3") < script.index("fedcollm enroll") < script.index("fedcollm join")
    assert script.index("fedcollm join --client 3") < script.index("fedcollm broadcast --round 1")


def test_another_method_is_told_once_its_workspace_is_there(
    reported_once: Path, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("run", "--dry-run", "--method", "fedavg", "-w", finished)
    assert outcome.code == 3
    assert "fedcollm run --method fedavg makes it" in outcome.err
    assert not (finished / "baselines").exists()
    words = ("run", "--dry-run", "--method", "fedavg", "--round", 1, "--overwrite", "--no-client-scores")
    found = fedcollm(*words, "-w", reported_once).out.splitlines()
    place = f"--workspace {reported_once / 'baselines/fedavg'}"
    assert found[-2:] == [
        f"fedcollm aggregate --round 1 --overwrite {place}",
        f"fedcollm evaluate --round 1 --model aggregate --overwrite {place}",
    ]


def test_what_run_would_refuse_is_refused(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    (finished / "exchange/round-0001/client-2/manifest.json").write_text("{")
    outcome = fedcollm("run", "--dry-run", "-w", finished)
    assert outcome.code == 5
    assert "client-2 of round 1 is damaged" in outcome.err
    edit(finished / "fedcollm.toml", "seed = 7", "seed = 8")
    outcome = fedcollm("run", "--dry-run", "-w", finished)
    assert outcome.code == 5
    assert "federation.seed was 7, is 8" in outcome.err
