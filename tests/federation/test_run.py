"""run: the whole federation, in one process or by separate commands, leaves the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from builders import edit
from stages.aggregate import aggregate
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.federation.run import run
from stages.runtime.errors import Refused
from stages.workspace.paths import Workspace


def digests(folder: Path) -> dict[str, str]:
    """Every published file's digest; private logs hold times and are left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("exchange", "private")
        for path in sorted((folder / part).rglob("*"))
        if path.is_file() and path.suffix in (".json", ".safetensors")
    }


def test_run_leaves_the_very_bytes_of_the_separate_commands(workspace_folder: Path, finished_once: Path) -> None:
    workspace = Workspace(workspace_folder)
    for round in (1, 2):
        broadcast(workspace, round=round)
        for client in (1, 2, 3):
            client_train(workspace, client=client, round=round)
        aggregate(workspace, round=round)
        co_distill(workspace, round=round)
    assert digests(workspace_folder) == digests(finished_once)


def test_clients_receive_in_round_two_what_co_distill_wrote_in_round_one_byte_for_byte(finished_once: Path) -> None:
    workspace = Workspace(finished_once)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (workspace.broadcast(2) / name).read_bytes() == (workspace.slm(1) / name).read_bytes()


def test_run_under_an_edited_agreement_is_refused_before_anything_is_scored(finished: Path) -> None:
    result = finished / "results/zero-shot/slm.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text("a score under the agreement before")
    before = digests(finished)
    edit(finished / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused, match=r"federation\.seed was 7, is 8") as caught:
        run(Workspace(finished))
    assert "--overwrite" in (caught.value.mend or "")
    assert result.read_text() == "a score under the agreement before"
    assert [path for path in (finished / "results").rglob("*") if path.is_file()] == [result]
    assert digests(finished) == before


def test_run_goes_on_after_rounds_that_ended_without_some_clients(workspace_folder: Path) -> None:
    toml, heard = workspace_folder / "fedcollm.toml", list[str]()
    edit(toml, "rounds = 2", 'rounds = 3\nmethod = "fedavg"')
    toml.write_text(f"{toml.read_text()}\n[aggregation]\nmin_clients = 2\n")
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    for client in (1, 2):
        client_train(workspace, client=client, round=1)
    aggregate(workspace, round=1)
    client_train(workspace, client=3, round=1)  # which comes late
    broadcast(workspace, round=2)
    aggregate(workspace, round=2, keep_old=True)  # before anybody has sent
    before = digests(workspace_folder)
    run(workspace, scores=False, report=lambda event: heard.append(event.text))
    assert "round 1 has ended without the update of client 3: it stays as it is" in heard
    assert before.items() <= digests(workspace_folder).items()
    assert workspace.aggregate(3).exists()
