"""base_names: a local folder has the agreement's name only where it is known to be of that model's shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from builders import Outcome, edit
from stages.bases import base_names
from stages.paper import reported
from stages.planning.comm_cost import comm_cost
from stages.planning.plan import plan
from stages.planning.prefetch import prefetch
from stages.workspace.paths import Workspace

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def named(workspace_folder: Path, agreed: str, config: dict[str, Any], folder: Path | None = None) -> Workspace:
    """A workspace whose agreement names a model of the hub, and whose machine.toml a folder with this configuration."""
    own = folder or workspace_folder.parent / "mine"
    own.mkdir(parents=True, exist_ok=True)
    (own / "config.json").write_text(json.dumps(config))
    edit(workspace_folder / "fedcollm.toml", 'model = "models/slm"', f'model = "{agreed}"')
    (workspace_folder / "machine.toml").write_text(f"[models]\nslm = {json.dumps(str(own))}\n")
    return Workspace(workspace_folder)


@pytest.mark.parametrize("agreed", sorted(reported.checkpoints()))
def test_a_folder_of_the_paper_s_shape_has_its_name(agreed: str, workspace_folder: Path) -> None:
    config = reported.checkpoints()[agreed].config | {"torch_dtype": "float16", "use_cache": True}
    workspace = named(workspace_folder, agreed, config)
    assert base_names.name_of(workspace, "slm") == base_names.hub_id(workspace, "slm") == agreed


@pytest.mark.parametrize("agreed", sorted(reported.checkpoints()))
def test_a_folder_of_another_shape_is_called_what_it_is(agreed: str, workspace_folder: Path) -> None:
    config = reported.checkpoints()[agreed].config
    other = "hidden_size" if "hidden_size" in config else "n_layer"
    workspace = named(workspace_folder, agreed, config | {other: 1 + config[other]})
    assert base_names.name_of(workspace, "slm") == f"the local folder mine ({config['model_type']})"
    assert base_names.hub_id(workspace, "slm") is None


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_folder_whose_configuration_cannot_be_read_has_no_name_of_others(text: str, workspace_folder: Path) -> None:
    workspace = named(workspace_folder, "gpt2", {})
    (workspace_folder.parent / "mine/config.json").write_text(text)
    assert base_names.name_of(workspace, "slm") == "the local folder mine (of unknown architecture)"


def test_a_folder_in_the_workspace_that_is_called_like_a_model_is_not_that_model(workspace_folder: Path) -> None:
    workspace = named(workspace_folder, "gpt2", LLAMA, workspace_folder / "gpt2")
    (workspace_folder / "machine.toml").unlink()
    assert base_names.name_of(Workspace(workspace.root), "slm") == "the local folder gpt2 (llama)"


def test_the_configuration_in_the_hub_s_cache_says_whether_a_folder_is_the_model(
    workspace_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "cache/models--some--llama/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(LLAMA | {"transformers_version": "4.0.0"}))
    workspace = named(workspace_folder, "some/llama", LLAMA)
    assert base_names.hub_id(workspace, "slm") is None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert base_names.hub_id(workspace, "slm") == "some/llama"
    (tmp_path / "mine/config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 3}))
    assert base_names.hub_id(workspace, "slm") is None


def test_a_folder_of_another_machine_s_cache_has_its_name_in_its_path(workspace_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "copied/models--some--llama/snapshots/0123"
    workspace = named(workspace_folder, "some/llama", LLAMA, place)
    assert base_names.hub_id(workspace, "slm") == "some/llama"
    (workspace_folder / "fedcollm.toml").write_text(
        (workspace_folder / "fedcollm.toml").read_text().replace("some/llama", "some/other")
    )
    assert base_names.hub_id(Workspace(workspace_folder), "slm") is None


def test_no_command_calls_another_model_by_the_agreement_s_name(
    workspace_folder: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    own = shutil.copytree(base_models / "slm", workspace_folder.parent / "mine")
    workspace = named(workspace_folder, "facebook/opt-1.3b", json.loads((own / "config.json").read_text()))
    expected = "the local folder mine (gpt2)"
    assert plan(workspace).models[0].model == expected
    found = comm_cost(workspace).full
    assert found is not None
    assert found.model == expected
    assert prefetch(workspace, model="slm", tasks=False)[0].name == expected
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    outcome = fedcollm("report", "-w", workspace_folder)
    assert outcome.code == 0, outcome.err
    page = (workspace_folder / outcome.out.strip()).read_text()
    assert "SLM base, gpt2; here the local folder mine (gpt2), not known to be facebook/opt-1.3b" in page
