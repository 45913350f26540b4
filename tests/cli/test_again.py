"""The same command given again: done already, refused, or done anew; and the same bytes wherever it is given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, adapters, edit, make_workspace, published, rows, write_rows

FIRST_ROUND = [
    ["broadcast", "--round", "1"],
    *(["client-train", "--client", str(k), "--round", "1"] for k in (1, 2, 3)),
    ["aggregate", "--round", "1"],
    ["co-distill", "--round", "1"],
]
STAGES = [*FIRST_ROUND, ["broadcast", "--round", "2"], ["client-train", "--client", "2", "--round", "2"]]


def times(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in published(folder)}


@pytest.mark.parametrize("command", STAGES, ids=" ".join)
def test_a_stage_given_again_is_already_done_and_touches_no_file(
    command: list[str], finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before = times(finished)
    outcome = fedcollm(*command, "-w", finished)
    assert outcome.code == 0
    assert "already done" in outcome.err
    assert (finished / outcome.out.strip() / "manifest.json").exists()
    assert times(finished) == before


@pytest.mark.parametrize("command", STAGES, ids=" ".join)
def test_overwrite_makes_the_same_bytes_again(
    command: list[str], finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before, since = adapters(finished), times(finished)
    outcome = fedcollm(*command, "--overwrite", "-w", finished)
    assert outcome.code == 0
    assert "already done" not in outcome.err
    assert adapters(finished) == before
    made = outcome.out.strip() + "/manifest.json"
    assert times(finished)[made] > since[made]


def test_two_workspaces_made_apart_hold_the_same_bytes(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome], finished_once: Path
) -> None:
    folder = make_workspace(tmp_path / "elsewhere", base_models)
    for command in FIRST_ROUND:
        assert fedcollm(*command, "-w", folder).code == 0
    assert adapters(folder).items() <= adapters(finished_once).items()


def test_another_seed_gives_other_bytes(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    first = fedcollm("broadcast", "--round", 1, "-w", workspace_folder).out.strip()
    weights = workspace_folder / first / "adapter_model.safetensors"
    before = weights.read_bytes()
    edit(workspace_folder / "fedcollm.toml", "seed = 7", "seed = 8")
    assert fedcollm("broadcast", "--round", 1, "--overwrite", "-w", workspace_folder).code == 0
    assert weights.read_bytes() != before


@pytest.mark.parametrize(
    ("file", "command"),
    [("client-2/train.jsonl", "client-train --client 2 --round 1"), ("server/auxiliary.jsonl", "co-distill --round 1")],
)
def test_other_training_data_is_refused_until_overwrite(
    file: str, command: str, finished: Path, refused: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    before = adapters(finished)
    write_rows(finished / "private" / file, rows(7))
    said = refused(finished, 5, *command.split())
    assert "was made from other inputs; changed since: the training data" in said
    assert "--overwrite" in said
    assert fedcollm(*command.split(), "--overwrite", "-w", finished).code == 0
    assert adapters(finished) != before
    assert "already done" in fedcollm(*command.split(), "-w", finished).err


@pytest.mark.parametrize("command", STAGES, ids=" ".join)
def test_a_changed_agreement_is_refused(command: list[str], finished: Path, refused: Callable[..., str]) -> None:
    toml = finished / "fedcollm.toml"
    toml.write_text(toml.read_text() + "# a word that all parties have to know of\n")
    said = refused(finished, 5, *command)
    assert "fedcollm.toml" in said


def test_a_changed_input_goes_down_the_chain_each_step_refused_until_overwrite(
    finished: Path, refused: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    write_rows(finished / "private/client-2/train.jsonl", rows(7))
    assert fedcollm("client-train", "--client", 2, "--round", 1, "--overwrite", "-w", finished).code == 0
    for command, changed in (
        ("aggregate --round 1", "client-2"),
        ("co-distill --round 1", "aggregate"),
        ("broadcast --round 2", "slm"),
        ("client-train --client 1 --round 2", "broadcast"),
    ):
        said = refused(finished, 5, *command.split())
        assert f"changed since: {changed}" in said
        assert fedcollm(*command.split(), "--overwrite", "-w", finished).code == 0
    # Client 1 has answered the new broadcast, client 2 and 3 the old one.
    said = refused(finished, 5, "aggregate", "--round", 2, "--overwrite")
    assert "client 2's update of round 2 was trained from another broadcast than the one here" in said
    assert "fedcollm client-train --client 2 --round 2 --overwrite, on client 2's machine" in said


def test_a_result_taken_away_is_made_again(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    before = adapters(finished)
    for command in STAGES:
        made = fedcollm(*command, "-w", finished).out.strip()
        shutil.rmtree(finished / made)
        assert fedcollm(*command, "-w", finished).code == 0
    assert adapters(finished) == before
