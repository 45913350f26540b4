"""lm-eval's own tasks by name: what is found without its index is what its index says."""

from __future__ import annotations

import shutil
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval.tasks._index import TaskIndex

from stages.workspace import shipped_tasks

FOLDERS = ("arc", "glue", "hellaswag", "mmlu", "truthfulqa")
"""Tasks, groups of groups, tags of included files, and several tasks in one folder."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of lm-eval's tasks."""
    folder, theirs = tmp_path_factory.mktemp("tasks"), Path(lm_eval.tasks.__file__).parent
    for name in FOLDERS:
        shutil.copytree(theirs / name, folder / name)
    return folder


def test_each_name_is_what_lm_evals_index_says_with_all_that_it_stands_for(root: Path) -> None:
    theirs = TaskIndex.build([root])
    assert {entry.kind.name for entry in theirs.values()} >= {"TASK", "GROUP", "TAG"}
    assert len(theirs) > 200
    for name, entry in theirs.items():
        ours = shipped_tasks.entries(name, root)
        assert ours is not None
        assert ours[name] == entry
        assert all(theirs[other] == one for other, one in ours.items())
        assert entry.kind.name != "TAG" or entry.tags <= ours.keys()
    group = shipped_tasks.entries("mmlu", root)
    assert group is not None
    assert {"mmlu_stem", "mmlu_abstract_algebra", "mmlu_virology"} <= group.keys()


def test_a_name_that_stands_in_texts_alone_is_none(root: Path) -> None:
    assert shipped_tasks.entries("dataset_path", root) == {}
    assert shipped_tasks.manager_of("no such task") is None


def test_a_name_that_stands_for_very_many_is_left_to_lm_evals_index(tmp_path: Path) -> None:
    names = [f"task_{number}" for number in range(shipped_tasks.MOST_NAMES + 1)]
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name}))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"group": "all_of_them", "task": names}))
    assert shipped_tasks.entries("all_of_them", tmp_path) is None
    assert shipped_tasks.entries(names[0], tmp_path) == {names[0]: TaskIndex.build([tmp_path])[names[0]]}


def test_a_task_of_lm_evals_can_be_loaded_by_its_manager() -> None:
    manager = shipped_tasks.manager_of("arc_easy")
    assert manager is not None
    assert manager.task_index["arc_easy"].yaml_path.name == "arc_easy.yaml"
    assert manager is not shipped_tasks.manager_of("arc_easy"), "loading writes into its index"
