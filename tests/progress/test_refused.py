"""status and plan tell of rows that client-train would refuse, with the words that it has for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome
from stages.progress.refused import refused_rows
from stages.progress.status import status
from stages.workspace.paths import Workspace

GOOD = '{"prompt": "Q : red ? A :", "completion": " red"}\n'
BAD = {
    "no answer": (GOOD + '{"prompt": "Q"}\n', "line 2 of train.jsonl: no completion"),
    "two forms": (GOOD + '{"instruction": "I", "output": "O"}\n', "line 2 of train.jsonl: a row"),
    "nothing": ("", "train.jsonl is empty"),
    "compressed": ("\x1f\x8b", "train.jsonl is not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_client_train_refuses_status_and_plan_tell(
    kind: str, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    content, found = BAD[kind]
    (workspace_folder / "private/client-2/train.jsonl").write_bytes(content.encode("latin-1"))
    assert fedcollm("broadcast", "--round", "1", "-w", workspace_folder).code == 0
    refusal = fedcollm("client-train", "--client", "2", "--round", "1", "-w", workspace_folder)
    assert refusal.code == 4
    found = found.replace("not UTF-8", "compressed with gzip") if kind == "compressed" else found
    assert found in refusal.err
    told = fedcollm("status", "-w", workspace_folder)
    assert told.code == 0
    assert f"training would refuse private/client-2/train.jsonl: {found}" in told.out
    planned = fedcollm("plan", "-w", workspace_folder)
    assert planned.code == 0, planned.err
    assert found in " ".join(planned.out.split())


def test_of_sound_rows_nothing_is_told(workspace_folder: Path) -> None:
    assert list(refused_rows(Workspace(workspace_folder))) == []


def test_where_all_rounds_are_done_status_reads_no_rows(finished: Path) -> None:
    (finished / "private/client-2/train.jsonl").write_text("{}\n")
    assert len(list(refused_rows(Workspace(finished)))) == 1
    assert status(Workspace(finished)).refused == []


def test_the_servers_rows_may_be_without_an_answer_but_not_the_held_out_ones(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    workspace.auxiliary_data.write_text(GOOD + '{"prompt": "Q"}\n')
    assert list(refused_rows(workspace)) == []
    workspace.held_out_data.write_text(GOOD + '{"prompt": "Q"}\n')
    [found] = refused_rows(workspace)
    assert found.startswith("private/server/held-out.jsonl: line 2 of held-out.jsonl: no completion")


def test_files_beyond_what_status_reads_are_left_to_training(
    workspace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace_folder / "private/client-1/train.jsonl").write_text("{}\n" * 100)
    (workspace_folder / "private/client-2/train.jsonl").write_text("{}\n")
    monkeypatch.setattr("stages.progress.refused.MOST_BYTES", 100)
    assert [one.partition(":")[0] for one in refused_rows(Workspace(workspace_folder))] == [
        "private/client-2/train.jsonl"
    ]
