"""Bases in 4 and 8 bits: trained, scored and exported by the stages, as other bases; or refused, saying why."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import ROOT, edit, make_wide_models, rows, write_rows
from stages.aggregate import aggregate
from stages.artefacts.manifest import BaseIdentity
from stages.artefacts.reading import read_manifest
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.data.examples import Example
from stages.evaluate import evaluate
from stages.export.export import export
from stages.models.held import held_in_bfloat16
from stages.models.loading import Models
from stages.runtime.errors import Refused, UsageProblem
from stages.training.objective import Objective, task_loss
from stages.workspace.paths import Workspace

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install '.[quant]'"
)
WHEN = ("before", "after")
EACH = pytest.mark.parametrize("bits", ["4bit", "8bit"])


def quantized(folder: Path, bits: str, *roles: str) -> Path:
    """The workspace with an agreement on so many bits."""
    for role in roles or ("slm", "llm"):
        edit(folder / "fedcollm.toml", f'model = "models/{role}"', f'model = "models/{role}"\nquantization = "{bits}"')
    return folder


@pytest.fixture(scope="session")
def wide_models(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Path:
    return make_wide_models(tmp_path_factory.mktemp("wide"), base_models)


@pytest.fixture
def wide(workspace_folder: Path, wide_models: Path) -> Path:
    (workspace_folder / "models").unlink()
    (workspace_folder / "models").symlink_to(wide_models)
    return workspace_folder


@needs_bitsandbytes
@EACH
def test_a_whole_round_on_few_bits_and_every_model_learns(bits: str, wide: Path) -> None:
    workspace = Workspace(quantized(wide, bits))
    broadcast(workspace, round=1)
    for client in workspace.clients:
        made = client_train(workspace, round=1, client=client)
        assert made.metrics["slm_ft_after"] < 0.9 * made.metrics["slm_ft_before"]
        assert made.base.quantization == bits
    aggregate(workspace, round=1)
    made = co_distill(workspace, round=1)
    for role in ("slm", "llm"):
        before, after = (sum(made.metrics[f"{role}_{term}_{when}"] for term in ("ft", "kd")) for when in WHEN)
        assert after < before
    scores = evaluate(workspace, round=1, model="slm")
    assert scores["base"]["quantization"] == bits
    for merged in (False, True):
        proof = export(workspace, round=1, model="slm", merged=merged)["proof"]
        assert proof["error"] < 1e-4 * proof["scale"]
        assert proof["change"] > 100 * proof["error"]


@needs_bitsandbytes
@EACH
def test_a_residual_beneath_an_adapter_on_few_bits_is_exact(bits: str, wide: Path) -> None:
    """Which nothing that is added to the bits themselves could be."""
    edit(wide / "fedcollm.toml", "[distillation]", '[aggregation]\ncombine = "residual"\n\n[distillation]')
    workspace = Workspace(quantized(wide, bits))
    broadcast(workspace, round=1)
    for client in workspace.clients:
        client_train(workspace, round=1, client=client)
    aggregate(workspace, round=1)
    made = co_distill(workspace, round=1)
    assert (workspace.slm(1) / "residual.safetensors").read_bytes() == (
        workspace.aggregate(1) / "residual.safetensors"
    ).read_bytes()
    before, after = (sum(made.metrics[f"slm_{term}_{when}"] for term in ("ft", "kd")) for when in WHEN)
    assert after < before
    for merged in (False, True):
        proof = export(workspace, round=1, model="aggregate", merged=merged)["proof"]
        assert proof["error"] < 1e-4 * proof["scale"]
        assert proof["change"] > 100 * proof["error"]
    broadcast(workspace, round=2)
    client_train(workspace, round=2, client=1)


@needs_bitsandbytes
@EACH
def test_a_merged_export_is_the_base_as_its_bits_say_and_the_adapter(bits: str, wide: Path) -> None:
    from transformers import AutoModelForCausalLM

    workspace = Workspace(quantized(wide, bits, "slm"))
    broadcast(workspace, round=1)
    client_train(workspace, round=1, client=1)
    export(workspace, round=1, client=1, merged=True)
    place = workspace.export(1, "client-1", merged=True)
    assert "quantization_config" not in json.loads((place / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(place)
    original = AutoModelForCausalLM.from_pretrained(wide / "models/slm")
    # Layers without an adapter: the original rounded to few bits, by 1/15 or 1/254 of the range at most.
    before, after = (one.model.layers[0].mlp.up_proj.weight.detach() for one in (original, merged))
    off = float((after - before).abs().max() / before.abs().max())
    assert 1e-4 < off < {"4bit": 0.2, "8bit": 0.01}[bits]


@needs_bitsandbytes
@EACH
def test_an_adapters_gradient_on_few_bits_is_that_on_what_the_bits_say(bits: str, wide: Path) -> None:
    from stages.export import exported
    from stages.models import adapters

    workspace = Workspace(quantized(wide, bits))
    row = [Example([3, 1, 4, 1, 5, 9, 2, 6], 3), Example([2, 7, 1, 8, 2], 2)]

    def gradient(one: Any) -> torch.Tensor:
        objective = Objective([one], task_loss, {"slm_ft": 1.0})
        objective(**objective.collate(row))["loss"].backward()
        return torch.cat([parameter.grad.flatten() for parameter in objective.adapter_parameters("slm")])

    few = Models(workspace).get("slm")
    adapters.make_fresh(few.model, 1)
    few.model.train()
    on_few = gradient(few)
    assert float(on_few.norm()) > 0
    whole = exported.in_full(few, workspace.agreement.slm)
    on_whole = gradient(whole)
    # 8 bits: activations too are rounded to them on the way.
    assert float((on_few - on_whole).norm() / on_whole.norm()) < {"4bit": 1e-5, "8bit": 0.1}[bits]


@needs_bitsandbytes
def test_training_after_a_pass_without_gradient_still_learns(wide: Path) -> None:
    """On a CPU with AVX-512 bfloat16 bitsandbytes repacks 4-bit layers then, and they pass no gradient any more."""
    from stages.models import adapters

    tuned = Models(Workspace(quantized(wide, "4bit"))).get("slm")
    adapters.make_fresh(tuned.model, 1)
    objective = Objective([tuned], task_loss, {"slm_ft": 1.0})
    rows = [Example([3, 1, 4, 1, 5, 9, 2, 6], 3)]
    objective.measure(rows, 1)
    objective.train()
    objective(**objective.collate(rows))["loss"].backward()
    first = [p.grad for name, p in tuned.model.named_parameters() if p.requires_grad and "lora_B" in name]
    assert all(float(one.norm()) > 0 for one in first)


@needs_bitsandbytes
@EACH
def test_what_is_not_in_few_bits_is_held_in_bfloat16_beside_biases_that_are_left_alone(
    bits: str, workspace_folder: Path
) -> None:
    toml = quantized(workspace_folder, bits) / "fedcollm.toml"
    toml.write_text(toml.read_text().replace('dtype = "float32"', 'dtype = "bfloat16"'))
    tuned = Models(Workspace(workspace_folder)).get("slm")
    few = [one for one in tuned.model.modules() if type(one).__module__.startswith("bitsandbytes")]
    biases = [one.bias for one in few]
    with held_in_bfloat16(tuned):
        assert tuned.model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert len(biases) == 4
        assert all(one.bias is bias for one, bias in zip(few, biases, strict=True))


@needs_bitsandbytes
def test_other_bits_are_another_base(wide: Path) -> None:
    workspace = Workspace(quantized(wide, "4bit"))
    broadcast(workspace, round=1)
    _, four = read_manifest(workspace.broadcast(1))
    assert four
    identity = Models(workspace).get("slm").identity
    other = identity.model_copy(update={"quantization": "8bit"})
    with pytest.raises(Refused, match="quantization is 4bit, there 8bit"):
        Models(workspace).expect("slm", other, "somebody's")
    with pytest.raises(Refused, match=r"quantization is 4bit, there none"):
        Models(workspace).expect("slm", other.model_copy(update={"quantization": None}), "somebody's")


def test_a_base_in_full_is_written_down_as_ever() -> None:
    told = {"architecture": "gpt2", "weights_sha256": "0" * 64, "tokenizer_sha256": "1" * 64}
    identity = BaseIdentity(**told)  # type: ignore[arg-type]
    assert identity.model_dump() == json.loads(identity.model_dump_json()) == told
    few = identity.model_copy(update={"quantization": "8bit"})
    assert few.model_dump() == told | {"quantization": "8bit"}
    assert BaseIdentity.model_validate(few.model_dump()) == few != identity


def test_bits_that_nobody_has_are_no_setting(wide: Path) -> None:
    with pytest.raises(UsageProblem, match=r"slm\.quantization"):
        _ = Workspace(quantized(wide, "2bit", "slm")).agreement


def test_without_bitsandbytes_it_says_what_to_install(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    workspace = Workspace(quantized(wide, "4bit", "slm"))
    with pytest.raises(UsageProblem, match=r'slm\.quantization = "4bit" needs bitsandbytes') as caught:
        broadcast(workspace, round=1)
    assert caught.value.mend == "pip install 'fedcollm[quant]'"


@needs_bitsandbytes
def test_a_device_that_bitsandbytes_does_not_know_is_named() -> None:
    from stages.models import quantization

    with pytest.raises(UsageProblem, match="bitsandbytes has nothing for the device meta"):
        quantization.loading("llm", "8bit", torch.float32, torch.device("meta"))


IN_ONE_PROCESS = """import sys
from pathlib import Path
from stages.runtime import imports
imports.spare()
from stages.models.loading import Models
from stages.workspace.paths import Workspace
for folder in sys.argv[1:]:
    model = Models(Workspace(Path(folder))).get("slm").model
    layers = {type(one).__module__ for one in model.modules() if hasattr(one, "lora_A")}
    print(*layers, "bitsandbytes" in sys.modules)
"""


@needs_bitsandbytes
def test_bases_in_few_bits_and_in_full_in_one_process_whichever_comes_first(wide: Path, tmp_path: Path) -> None:
    """bitsandbytes, which PEFT and transformers do not see until it is needed, is then seen by both."""
    few = quantized(Path(shutil.copytree(wide, tmp_path / "few", symlinks=True)), "4bit")
    words = [sys.executable, "-c", IN_ONE_PROCESS, *map(str, (wide, few, wide))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, bnb = "peft.tuners.lora.layer", "peft.tuners.lora.bnb"
    assert done.stdout.splitlines() == [f"{whole} False", f"{bnb} True", f"{whole} True"]


@needs_bitsandbytes
def test_gpt2s_own_layers_too(workspace_folder: Path) -> None:
    workspace = Workspace(quantized(workspace_folder, "4bit"))
    write_rows(workspace_folder / "private/client-1/train.jsonl", rows(12))
    broadcast(workspace, round=1)
    made = client_train(workspace, round=1, client=1)
    assert made.metrics["slm_ft_after"] < made.metrics["slm_ft_before"]
    assert math.isfinite(made.metrics["update_norm"])
