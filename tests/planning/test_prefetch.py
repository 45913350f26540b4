"""prefetch: says what was here, and without a network names what is not to be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builders import edit
from stages.planning.prefetch import Fetched, prefetch
from stages.runtime.errors import NotReady, UsageProblem
from stages.runtime.events import Event
from stages.workspace.paths import Workspace


def test_what_is_here_is_said_to_have_been_here(workspace_folder: Path) -> None:
    told: list[Event] = []
    assert prefetch(Workspace(workspace_folder), report=told.append) == [
        Fetched("models/slm", True, "models/slm"),
        Fetched("models/llm", True, "models/llm"),
        Fetched("colours", True),
    ]
    steps = [(one.text, one.step, one.total) for one in told if one.kind == "step"]
    assert steps == [("models/slm", 1, 3), ("models/llm", 2, 3), ("colours", 3, 3)]


def test_a_client_needs_no_llm_and_no_tasks(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", '"models/llm"', '"nobody/nothing"')
    edit(workspace_folder / "fedcollm.toml", '"colours"', '"nowhere"')
    assert [one.name for one in prefetch(Workspace(workspace_folder), model="slm", tasks=False)] == ["models/slm"]


def test_a_model_that_cannot_be_fetched_is_named(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", '"models/llm"', '"nobody/nothing"')
    with pytest.raises(NotReady, match="the LLM nobody/nothing is neither here nor on the hub"):
        prefetch(Workspace(workspace_folder))


def test_a_dataset_that_cannot_be_fetched_is_named(workspace_folder: Path) -> None:
    edit(
        workspace_folder / "tasks/colours.yaml",
        "dataset_path: json\ndataset_kwargs: {data_files: {train: data/train.jsonl, test: data/test.jsonl}}",
        "dataset_path: nobody/nothing",
    )
    with pytest.raises(NotReady, match="the dataset of task colours cannot be loaded") as caught:
        prefetch(Workspace(workspace_folder))
    assert "`fedcollm prefetch` where there is a network" in str(caught.value.mend)


def test_a_folder_without_weights_is_not_taken_for_a_model(workspace_folder: Path, base_models: Path) -> None:
    (workspace_folder / "models").unlink()
    (workspace_folder / "models" / "slm").mkdir(parents=True)
    shutil.copy(base_models / "slm" / "config.json", workspace_folder / "models" / "slm")
    with pytest.raises(NotReady, match="the SLM models/slm is here without its weights") as caught:
        prefetch(Workspace(workspace_folder), model="slm")
    assert caught.value.where == workspace_folder / "models" / "slm"
    assert "put all its files there" in str(caught.value.mend)


def test_a_task_that_nothing_defines_is_a_mistake_not_a_missing_file(workspace_folder: Path) -> None:
    (workspace_folder / "tasks/colours.yaml").write_text("task: colours\noutput_type: nonsense\ndataset_path: json\n")
    with pytest.raises(UsageProblem, match="task colours cannot be used"):
        prefetch(Workspace(workspace_folder))


def test_clients_with_models_of_their_own_fetch_those(unlike_folder: Path) -> None:
    workspace = Workspace(unlike_folder)
    assert [one.name for one in prefetch(workspace, client=2, tasks=False)] == ["models/slm-2"]
    every = [one.name for one in prefetch(workspace, tasks=False)]
    assert every == ["models/slm-2", "models/slm-3", "models/slm-1", "models/llm"]
    edit(unlike_folder / "fedcollm.toml", "models/slm-3", "example/slm-3")
    with pytest.raises(NotReady) as caught:
        prefetch(Workspace(unlike_folder), client=3, tasks=False)
    assert "`fedcollm prefetch --client 3` where there is a network, or set models.clients.3" in str(caught.value.mend)
    (unlike_folder / "machine.toml").write_text('[models.clients]\n3 = "models/slm-3"\n')
    assert [one.was_here for one in prefetch(Workspace(unlike_folder), client=3, tasks=False)] == [True]
