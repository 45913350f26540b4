"""offload_idle: the model that a stage does not use is off the device, and what is trained stays the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from builders import adapters, edit
from stages.federation.run import run
from stages.models.loading import Models
from stages.workspace.paths import Workspace

DEVICE = "cpu:0"  # as good as a GPU for telling where a model was sent: the CPU's memory is "cpu"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Each model that is moved, by its number of layers, and where to."""
    found: list[tuple[int, str]] = []
    move = PeftModel.to

    def watched(self: PeftModel, place: Any) -> Any:
        found.append((int(self.config.num_hidden_layers), str(place)))
        return move(self, place)

    monkeypatch.setattr(PeftModel, "to", watched)
    monkeypatch.setattr("stages.models.loading.device_of", lambda machine: torch.device(DEVICE))
    return found


def places(sent: list[tuple[int, str]]) -> list[dict[int, str]]:
    """Where the SLM, of one layer, and the LLM, of two, were after each move."""
    now: dict[int, str] = {}
    return [dict(now := now | {layers: place}) for layers, place in sent]


def test_run_has_at_most_the_models_of_a_stage_on_the_device_and_leaves_the_same_bytes(
    workspace_folder: Path, finished_once: Path, sent: list[tuple[int, str]]
) -> None:
    (workspace_folder / "machine.toml").write_text("offload_idle = true\n")
    run(Workspace(workspace_folder), scores=False)
    both, alone = {1: DEVICE, 2: DEVICE}, {1: DEVICE, 2: "cpu"}
    seen = places(sent)
    first = seen.index(both)  # in co-distill of round 1
    second = seen.index(alone, first)  # then clients train
    assert both in seen[second:]  # and co-distill of round 2
    assert adapters(workspace_folder) == adapters(finished_once)


def test_whoever_is_not_used_waits_in_the_cpus_memory(workspace_folder: Path, sent: list[tuple[int, str]]) -> None:
    (workspace_folder / "machine.toml").write_text("offload_idle = true\n")
    models = Models(Workspace(workspace_folder))
    models.use("slm", "llm")
    models.get("slm")
    models.get("llm")
    assert places(sent)[-1] == {1: DEVICE, 2: DEVICE}
    models.use("slm")
    models.get("slm")
    assert places(sent)[-1] == {1: DEVICE, 2: "cpu"}
    other = models.of(Workspace(workspace_folder))  # of another method: the same bases
    other.use("llm")
    other.get("llm")
    assert places(sent)[-1] == {1: "cpu", 2: DEVICE}


def test_without_it_nothing_is_moved(workspace_folder: Path, sent: list[tuple[int, str]]) -> None:
    models = Models(Workspace(workspace_folder))
    models.use("slm")
    models.get("slm")
    models.use("llm")
    models.get("llm")
    assert sent == []


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_base_in_few_bits_moves_too(bits: str, workspace_folder: Path, sent: list[tuple[int, str]]) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, 'model = "models/slm"', f'model = "models/slm"\nquantization = "{bits}"')
    (workspace_folder / "machine.toml").write_text("offload_idle = true\n")
    models = Models(Workspace(workspace_folder))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = models.get("slm").model(input_ids=ids).logits
    models.use("llm")
    models.get("llm")
    models.use("slm")
    assert torch.equal(models.get("slm").model(input_ids=ids).logits, before)
