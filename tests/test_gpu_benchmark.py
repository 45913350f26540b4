"""The GPU benchmark: its code on any machine, with tiny shapes; and on a GPU, plan against what it takes."""

from __future__ import annotations

import pytest
import torch
from pretended_cuda import cuda

from stages.paper import reported
from stages.workspace.agreement import Lora, Model
from tests.benchmarks import gpu

TINY = {"n_positions": 256, "n_embd": 32, "n_head": 2, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 1}


PAIR = gpu.Pair(
    "tiny",
    {"slm": {"model_type": "gpt2", "n_layer": 1, **TINY}, "llm": {"model_type": "gpt2", "n_layer": 2, **TINY}},
    Model(model="random", lora=Lora(r=2, alpha=4)),
)


def test_every_stage_of_a_tiny_pair_is_measured() -> None:
    found = list(gpu.of_pair(PAIR, torch.device("cpu"), torch.float32, rows=2, steps=3))
    assert [one.what for one in found] == [
        "client-train",
        "co-distill",
        *(f"co-distill --phase capture, {role}" for role in ("slm", "llm")),
        *(f"co-distill --phase train, {role}" for role in ("slm", "llm")),
    ]
    assert all(one.tokens_per_s > 0 and one.flops > 0 and one.planned_bytes > 0 for one in found)
    planned = {one.what: one.planned_bytes for one in found}
    assert planned["co-distill --phase train, llm"] < planned["co-distill"]
    assert planned["co-distill --phase capture, llm"] < planned["co-distill --phase train, llm"]
    # Forward and back, 2 operations a weight each: a layer of width 32 has 12 x 32 x 32 weights, and an adapter's.
    client = found[0]
    assert client.flops / client.tokens_per_s == pytest.approx(4 * (12 * 32 * 32 + 2 * (32 + 96)))


def test_models_with_logits_for_different_numbers_of_places_are_measured_too() -> None:
    wider = {"slm": PAIR.configs["slm"], "llm": PAIR.configs["llm"] | {"vocab_size": 104}}
    pair = gpu.Pair("padded", wider, PAIR.settings)
    assert len(list(gpu.of_pair(pair, torch.device("cpu"), torch.float32, rows=2, steps=3))) == 6


def test_qwens_shapes_have_the_parameters_that_its_names_say() -> None:
    pair = gpu.of_qwen()
    counts = [sum(one.numel() for one in pair.base(role, "meta", torch.bfloat16).parameters()) for role in gpu.BOTH]
    assert counts == [494_032_768, 7_615_616_512]  # as its model cards say: 0.49 and 7.61 billion


def test_the_papers_settings_are_there() -> None:
    pairs = [gpu.Pair.of_paper(name) for name in ("s1", "s2", "s3")]
    assert [pair.configs["llm"]["model_type"] for pair in pairs] == ["gpt2", "opt", "llama"]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_on_a_gpu_a_setting_has_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SIZE", 64)
    monkeypatch.setattr(gpu, "STEPS", 3)
    monkeypatch.setattr(gpu, "ROWS", 2)
    monkeypatch.setattr(gpu.Pair, "of_paper", lambda name: PAIR)
    monkeypatch.setattr(gpu.reported, "SETTINGS", {"s1": reported.SETTINGS["s1"]})
    monkeypatch.setattr(gpu, "of_qwen", lambda: PAIR)
    with cuda() as device:
        rows = gpu.measure(1)
    assert device.waits
    assert [what.partition(",")[0] for what, *_ in rows[1:]] == ["tiny"] * 12
    assert all("tokens/s" in measured and "plan says" in measured for _, measured, _ in rows[1:])


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.measure(1) == [("skipped: there is no CUDA device here", "-", "-")]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_what_plan_says_is_within_a_fifth_of_what_a_gpu_takes() -> None:
    for one in gpu.of_pair(gpu.Pair.of_paper("s1"), torch.device("cuda"), torch.bfloat16):
        assert one.peak_bytes
        assert 0.8 < one.planned_bytes / one.peak_bytes < 1.2, one
