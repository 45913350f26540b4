"""bases: a model is found in its folder or in the hub's cache, whole or not, without asking the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from builders import edit
from stages.bases import base_folders
from stages.models.loading import Models
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(workspace_folder: Path, base_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The SLM as a model of the hub that was fetched earlier; the folder that its files lie in."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--somebody--tiny" / "snapshots" / COMMIT
    shutil.copytree(base_models / "slm", snapshot)
    (cache / "models--somebody--tiny" / "refs").mkdir()
    (cache / "models--somebody--tiny" / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    edit(workspace_folder / "fedcollm.toml", 'model = "models/slm"', 'model = "somebody/tiny"')
    return snapshot


def test_a_model_of_the_hub_is_found_in_its_cache(workspace_folder: Path, cached: Path) -> None:
    workspace = Workspace(workspace_folder)
    assert base_folders.own_folder(workspace, "slm") is None
    assert base_folders.whole_folder(workspace, "slm") == base_folders.configuration(workspace, "slm") == cached
    assert base_folders.folder(workspace, "slm") == cached
    assert Models(workspace).get("slm").model.num_parameters() > 0


def test_another_revision_is_another_model(workspace_folder: Path, cached: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", '"somebody/tiny"', '"somebody/tiny"\nrevision = "v2"')
    assert base_folders.whole_folder(Workspace(workspace_folder), "slm") is None


def test_a_configuration_alone_is_no_whole_model(workspace_folder: Path, cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    assert base_folders.whole_folder(Workspace(workspace_folder), "slm") is None
    assert base_folders.configuration(Workspace(workspace_folder), "slm") == cached


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_parts_are_whole_when_all_that_the_index_names_are_there(
    workspace_folder: Path, cached: Path, name: str
) -> None:
    (cached / "model.safetensors").unlink()
    parts = [f"part-{i}-of-{name}" for i in (1, 2)]
    (cached / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    (cached / parts[0]).touch()
    assert base_folders.whole_folder(Workspace(workspace_folder), "slm") is None
    (cached / parts[1]).touch()
    assert base_folders.whole_folder(Workspace(workspace_folder), "slm") == cached


def test_machine_toml_comes_first(workspace_folder: Path, cached: Path, base_models: Path) -> None:
    (workspace_folder / "machine.toml").write_text(f"[models]\nslm = {json.dumps(str(base_models / 'slm'))}\n")
    workspace = Workspace(workspace_folder)
    assert base_folders.whole_folder(workspace, "slm") == base_folders.folder(workspace, "slm") == base_models / "slm"


def test_what_is_not_here_is_named_with_the_command_that_fetches_it(workspace_folder: Path, cached: Path) -> None:
    shutil.rmtree(cached.parents[1])
    with pytest.raises(NotReady, match="the SLM somebody/tiny is neither here nor on the hub") as caught:
        base_folders.folder(Workspace(workspace_folder), "slm")
    assert "`fedcollm prefetch --model slm`" in str(caught.value.mend)


def test_offline_lasts_as_long_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    for module in (constants, config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)

    def states() -> tuple[bool, bool]:
        return constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE

    with base_folders.offline():
        assert states() == (True, True)
    assert states() == (False, False)
