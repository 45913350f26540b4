"""broadcast: theta^1 is a fresh adapter that changes nothing yet; its manifest names the base by content."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import edit
from stages.artefacts.manifest import Manifest
from stages.broadcast import broadcast
from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace.paths import Workspace

WIDTH, RANK = 16, 4  # of the SLM of conftest and of the adapter of builders.AGREEMENT


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())


def test_in_round_one_b_is_zero_and_a_is_drawn_as_peft_draws_it(finished_once: Path) -> None:
    found = tensors(finished_once / "exchange/round-0001/broadcast")
    a = {name: tensor for name, tensor in found.items() if "lora_A" in name}
    b = {name: tensor for name, tensor in found.items() if "lora_B" in name}
    # PEFT's default for GPT-2 is c_attn, [width, 3 width]: A is [rank, width], B [3 width, rank].
    assert {tensor.shape for tensor in a.values()} == {(RANK, WIDTH)}
    assert {tensor.shape for tensor in b.values()} == {(3 * WIDTH, RANK)}
    assert len(a) + len(b) == len(found)
    assert all(not tensor.any() for tensor in b.values())
    for tensor in a.values():
        # kaiming_uniform_(a=sqrt(5)) is uniform in +-1/sqrt(inputs), so its deviation is 1/sqrt(3 inputs).
        assert np.abs(tensor).max() <= 1 / math.sqrt(WIDTH)
        assert np.isclose(tensor.std(), 1 / math.sqrt(3 * WIDTH), rtol=0.25)


def test_peft_reads_the_folder_and_the_model_is_still_the_base(finished_once: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(finished_once / "models/slm")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, finished_once / "exchange/round-0001/broadcast")(ids).logits
    assert torch.equal(before, after)


def test_the_parameters_that_travel_are_counted(workspace_folder: Path) -> None:
    manifest = broadcast(Workspace(workspace_folder), round=1)
    # One layer: A with rank x width, B with 3 width x rank.
    assert manifest.parameters == RANK * WIDTH + 3 * WIDTH * RANK
    size = (workspace_folder / "exchange/round-0001/broadcast/adapter_model.safetensors").stat().st_size
    assert 4 * manifest.parameters < size < 4 * manifest.parameters + 1024


def published_with(folder: Path, base: Path) -> Manifest:
    (folder / "machine.toml").write_text(f'[models]\nslm = "{base}"\n')
    return broadcast(Workspace(folder), round=1, overwrite=True)


def test_a_base_is_the_same_however_its_weights_are_cut_into_files(workspace_folder: Path, tmp_path: Path) -> None:
    whole = broadcast(Workspace(workspace_folder), round=1)
    sharded = tmp_path / "sharded"
    base = AutoModelForCausalLM.from_pretrained(workspace_folder / "models/slm")
    base.save_pretrained(sharded, max_shard_size="4KB")
    AutoTokenizer.from_pretrained(workspace_folder / "models/slm").save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert published_with(workspace_folder, sharded).base == whole.base


def test_other_weights_and_other_tokens_are_another_base(workspace_folder: Path, tmp_path: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[federation]", '[federation]\nmethod = "fedavg"')  # no LLM has to agree
    first = broadcast(Workspace(workspace_folder), round=1).base
    other = shutil.copytree(workspace_folder / "models/slm", tmp_path / "other")
    edit(other / "tokenizer.json", '"red": 2,', '"crimson": 2,')
    second = published_with(workspace_folder, other).base
    assert second.weights_sha256 == first.weights_sha256
    assert second.tokenizer_sha256 != first.tokenizer_sha256

    weights = safetensors.numpy.load_file(other / "model.safetensors")
    weights["transformer.wte.weight"][0, 0] += 1
    safetensors.numpy.save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    third = published_with(workspace_folder, other).base
    assert third.tokenizer_sha256 == second.tokenizer_sha256
    assert third.weights_sha256 != second.weights_sha256


def test_no_exchanged_file_names_a_path_a_host_or_a_time(finished_once: Path) -> None:
    import getpass
    import socket

    texts = [path.read_text() for path in (finished_once / "exchange").rglob("*.json")]
    assert len(texts) == 2 * 2 * 4  # rounds x files x (the server's and three clients' folders)
    forbidden = [str(finished_once), str(Path.home()), socket.gethostname(), f'"{getpass.getuser()}"', "wall", "/tmp"]
    assert not [(word, text) for word in forbidden for text in texts if word in text]


def test_the_broadcast_of_round_two_names_the_adapter_it_was(finished_once: Path) -> None:
    import hashlib

    manifest = json.loads((finished_once / "exchange/round-0002/broadcast/manifest.json").read_text())
    source = (finished_once / "private/server/round-0001/slm/manifest.json").read_bytes()
    assert manifest["parents"] == {"slm": hashlib.sha256(source).hexdigest()}


def test_an_llm_that_co_distill_could_not_take_is_refused_before_anyone_trains(
    workspace_folder: Path, base_models: Path, tmp_path: Path
) -> None:
    edit(workspace_folder / "fedcollm.toml", "[llm.lora]", '[llm.lora]\ntarget_modules = ["q_proj"]')
    with pytest.raises(UsageProblem, match="'q_proj' fits no layer"):
        broadcast(Workspace(workspace_folder), round=1)
    assert not (workspace_folder / "exchange/round-0001/broadcast").exists()
    edit(workspace_folder / "fedcollm.toml", '\ntarget_modules = ["q_proj"]', "")

    llm = shutil.copytree(base_models / "llm", tmp_path / "llm")
    weights = safetensors.numpy.load_file(llm / "model.safetensors")
    del weights["transformer.ln_f.weight"]
    safetensors.numpy.save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    (workspace_folder / "machine.toml").write_text(f'[models]\nllm = "{llm}"\n')
    with pytest.raises(Damaged, match="the LLM's weights are missing"):
        broadcast(Workspace(workspace_folder), round=1)

    shutil.rmtree(llm)
    broadcast(Workspace(workspace_folder), round=1)
