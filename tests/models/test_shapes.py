"""shapes: counts without weights, equal to those of the models themselves and to the paper's."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import edit
from stages.artefacts import adapter_files
from stages.models import adapters, shapes
from stages.models.loading import Models
from stages.paper import reported
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace


@pytest.mark.parametrize(
    ("setting", "sent"),
    [
        ("s1", 12 * (8 * 768 + 2304 * 8)),  # c_attn of 12 layers: A of r x 768, B of 2304 x r
        ("s2", 24 * 2 * (16 * 2048 + 2048 * 16)),  # q_proj and v_proj of 24 layers
        ("s3", 24 * 2 * (16 * 2048 + 2048 * 16)),
    ],
)
def test_the_papers_table_3_follows_from_configurations_alone(setting: str, sent: int) -> None:
    found, said = shapes.of_paper(setting, "slm"), reported.transmitted(setting)
    assert found.adapter_parameters == sent == {"s1": 294_912}.get(setting, 3_145_728)
    assert round(sent / 1e6, 2) == said.sent_millions
    assert round(found.parameters / 1e6) == said.full_millions
    assert round(100 * sent / found.parameters, 2) == said.percent
    assert {parameter.device.type for parameter in found.model.parameters()} == {"meta"}


def test_a_shape_counts_what_the_loaded_model_has(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    for role in ("slm", "llm"):
        found, real = shapes.of_workspace(workspace, role), Models(workspace).get(role).model
        assert found.layout == adapters.layout(real)
        assert found.adapter_parameters == adapters.count(real)
        own = [parameter for parameter in real.parameters() if not parameter.requires_grad]
        assert found.parameters == sum(parameter.numel() for parameter in own)
        assert shapes.weight_bytes(found) == sum(parameter.nbytes for parameter in own)
        assert found.stored_dtype == "float32"
        assert found.came_from == f"models/{role}/config.json"


def test_the_size_of_an_adapters_file_is_known_before_it_is_written(workspace_folder: Path) -> None:
    model = Models(Workspace(workspace_folder)).get("slm").model
    real = len(adapter_files.weights_bytes(adapters.take(model)))
    assert shapes.file_bytes(adapters.layout(model)) == real


def test_weights_are_not_read(workspace_folder: Path, base_models: Path) -> None:
    (workspace_folder / "models").unlink()
    for role in ("slm", "llm"):
        (workspace_folder / "models" / role).mkdir(parents=True)
        shutil.copy(base_models / role / "config.json", workspace_folder / "models" / role)
    assert shapes.of_workspace(Workspace(workspace_folder), "llm").parameters > 0


def test_bfloat16_weights_take_half(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    whole, half = (shapes.of_workspace(workspace, "slm", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert shapes.weight_bytes(whole) == 2 * shapes.weight_bytes(half)


def test_a_model_of_the_paper_needs_nothing_here(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", 'model = "models/llm"', 'model = "facebook/opt-6.7b"')
    found = shapes.of_workspace(Workspace(workspace_folder), "llm")
    assert (found.parameters, found.stored_dtype, found.came_from) == (6_658_473_984, "float16", shapes.SHIPPED)


def test_a_local_folder_comes_before_the_shipped_configuration(workspace_folder: Path, base_models: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", 'model = "models/llm"', 'model = "facebook/opt-6.7b"')
    (workspace_folder / "machine.toml").write_text(f"[models]\nllm = {json.dumps(str(base_models / 'llm'))}\n")
    found = shapes.of_workspace(Workspace(workspace_folder), "llm")
    assert found.parameters < 1_000_000
    assert found.stored_dtype == "float32"


def test_a_model_that_is_nowhere_is_named(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", 'model = "models/llm"', 'model = "nobody/nothing"')
    with pytest.raises(NotReady, match="the configuration of the LLM nobody/nothing is not here") as caught:
        shapes.of_workspace(Workspace(workspace_folder), "llm")
    assert "fedcollm prefetch --model llm" in str(caught.value.mend)


@pytest.mark.parametrize(("bits", "each"), [("4bit", 1 / 2 + 1 / 64 + 4 / (64 * 256)), ("8bit", 1.0)])
def test_a_base_in_few_bits_weighs_what_its_layers_then_weigh(bits: Any, each: float) -> None:
    whole = shapes.of_paper("s3", "llm")
    few = replace(whole, quantization=bits)
    # Llama-2-7B: 32 layers of four 4096 x 4096 and three 4096 x 11008; embeddings, norms and output layer stay.
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scales = 4 * 32 * (4 * 4096 + 3 * 11008) if bits == "8bit" else 0
    saved = shapes.weight_bytes(whole) - shapes.weight_bytes(few)
    assert saved == pytest.approx(4 * linear - each * linear - scales, rel=1e-4)
    assert shapes.unpacked_bytes(few, torch.bfloat16) == 2 * 4096 * 11008
    assert shapes.unpacked_bytes(whole, torch.bfloat16) == 0


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_base_in_few_bits_is_counted_as_it_is_loaded(bits: str, workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, 'model = "models/llm"', f'model = "models/llm"\nquantization = "{bits}"')
    workspace = Workspace(workspace_folder)
    found, real = shapes.of_workspace(workspace, "llm"), Models(workspace).get("llm").model
    held = sum(parameter.nbytes for parameter in real.parameters() if not parameter.requires_grad)
    layers = [module for module in real.modules() if type(module).__module__.startswith("bitsandbytes")]
    if bits == "4bit":
        states = [layer.weight.quant_state for layer in layers]
        held += sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    else:
        real(input_ids=torch.ones(1, 4, dtype=torch.long))  # which takes the scales from the weight to the layer
        held += sum(layer.state.SCB.nbytes for layer in layers)
    assert len(layers) == 2 * 4
    assert shapes.weight_bytes(found) == pytest.approx(held, rel=0.01)
    assert found.layout == adapters.layout(real)
