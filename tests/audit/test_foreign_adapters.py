"""any_adapter: adapters of every floating-point type, and what is measured of them, against NumPy on whole matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from stages.artefacts.lora_settings import not_understood
from stages.audit.foreign_adapters import (
    AnyAdapter,
    effective_rank,
    parse_weights,
    product_spectrum,
    rank_of,
    read_any,
    spectra_by_grams,
)
from stages.runtime.errors import Damaged

WHERE = Path("adapter_model.safetensors")


def matrices(rank: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(rank)
    return draw.standard_normal((rank, inputs)), draw.standard_normal((outputs, rank))


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(1, 5, 7), (4, 64, 32), (8, 8, 100), (6, 3, 9)])
def test_the_spectrum_of_a_product_is_that_of_the_whole_matrix(rank: int, inputs: int, outputs: int) -> None:
    a, b = matrices(rank, inputs, outputs)
    expected = np.linalg.svd(b @ a, compute_uv=False)
    found = product_spectrum(a, b)
    assert found[: len(expected)] == pytest.approx(expected[: len(found)], abs=1e-9)


def spectrum_by_grams(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """That of one product alone."""
    [found] = spectra_by_grams((a @ a.T)[None], (b.T @ b)[None])
    return found


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(1, 5, 7), (4, 64, 32), (8, 8, 100), (16, 300, 200)])
def test_the_spectrum_by_grams_is_that_of_the_whole_matrix(rank: int, inputs: int, outputs: int) -> None:
    a, b = matrices(rank, inputs, outputs)
    found = spectrum_by_grams(a, b)
    assert found is not None
    assert found == pytest.approx(np.linalg.svd(b @ a, compute_uv=False)[:rank], rel=1e-7)


def test_directions_that_are_not_there_count_for_nothing_by_grams_too() -> None:
    a, b = matrices(6, 80, 50)
    b[:, 2:] = b[:, :1]
    found = spectrum_by_grams(a, b)
    assert found is not None
    assert found[:2] == pytest.approx(np.linalg.svd(b @ a, compute_uv=False)[:2], rel=1e-9)
    assert found[2:].tolist() == [0] * 4


def test_grams_tell_nothing_of_what_their_rounding_hides() -> None:
    a, b = np.diag([1.0, 1e-6]), np.diag([1e-6, 1.0])  # B A is 1e-6 of |A| |B|
    assert spectrum_by_grams(a, b) is None
    assert product_spectrum(a, b) == pytest.approx([1e-6, 1e-6])
    assert spectrum_by_grams(np.zeros((2, 2)), np.eye(2)) is None
    assert spectrum_by_grams(np.full((2, 2), 1e200), np.eye(2)) is None
    assert spectrum_by_grams(np.ones((0, 3)), np.ones((3, 0))) is None


def test_layers_beside_each_other_have_each_their_own_spectrum() -> None:
    a, b = matrices(4, 64, 32)
    grams_a = np.stack([a @ a.T, np.zeros((4, 4)), 9 * (a @ a.T)])
    first, nothing, last = spectra_by_grams(grams_a, np.stack([b.T @ b] * 3))
    spectrum = np.linalg.svd(b @ a, compute_uv=False)[:4]
    assert first == pytest.approx(spectrum, rel=1e-7)
    assert nothing is None
    assert last == pytest.approx(3 * spectrum, rel=1e-7)


def test_a_product_is_never_formed() -> None:
    a, b = matrices(2, 200_000, 200_000)  # B A would take 320 GB
    assert product_spectrum(a, b).shape == (2,)


def test_effective_rank_counts_directions_by_their_weight() -> None:
    assert rank_of(np.array([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert rank_of(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert rank_of(np.zeros(3)) == 0
    assert effective_rank(np.ones((3, 50))) == pytest.approx(1)
    assert effective_rank(np.eye(40, 4)) == pytest.approx(4)
    assert effective_rank(np.ones(3)) is None
    assert effective_rank(np.array([[np.inf, 1]])) is None


@pytest.mark.parametrize(("rslora", "expected"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_scale_is_alpha_over_r_or_over_its_root(rslora: bool, expected: float) -> None:
    name = "x.lora_A.weight"
    adapter = AnyAdapter({name: np.ones((4, 9))}, config={"lora_alpha": 8, "use_rslora": rslora})
    assert adapter.scale("x") == expected


def llama() -> Any:
    torch.manual_seed(1)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))


def adds(adapter: AnyAdapter, module: str) -> float | None:
    """The Frobenius norm of what it adds to a layer's weights, if that is known."""
    factors = adapter.scaled(module)
    return None if factors is None else float(np.linalg.norm(factors[1] @ factors[0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 64, r".*layers\.1\..*v_proj": 1}},
        {"rank_pattern": {"q_proj": 2, "1.self_attn.q_proj": 3}},  # the first that fits counts
        {"rank_pattern": {"layers.1.self_attn.(q|v)_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
        {"rank_pattern": {"j": 9}, "alpha_pattern": {"proj": 99}},  # "proj" is the end of no name's part
        {"use_rslora": True, "init_lora_weights": "gaussian"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_what_an_adapter_adds_is_what_peft_adds(settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    expected = {
        name.removeprefix("base_model.model."): float(module.get_delta_weight("default").norm())
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in module.lora_A
    }
    adapter = read_any(tmp_path)
    found = {name.removeprefix("base_model.model."): adds(adapter, name) for name, _, _ in adapter.modules()}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", kind) for kind in ("pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "new")),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_dora", True),
        ("lora_bias", True),
        ("a_key_of_next_year", {"x": 1}),
        ("alpha_pattern", {"(a+)+": 2}),  # would not end on some names
        ("alpha_pattern", {"(": 2}),
        ("alpha_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": "4"}),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
    ],
)
def test_of_settings_that_are_not_understood_nothing_is_computed(key: str, value: Any) -> None:
    tensors = {"q_proj.lora_A.weight": np.ones((4, 9)), "q_proj.lora_B.weight": np.ones((9, 4))}
    plain = AnyAdapter(tensors, config={"r": 4, "lora_alpha": 8})
    assert adds(plain, "q_proj") == pytest.approx(2 * 4 * 9)
    adapter = AnyAdapter(tensors, config=plain.config | {key: value})
    assert adds(adapter, "q_proj") is None
    assert any(key in said for said in not_understood(adapter.config))
    assert adds(AnyAdapter(tensors), "q_proj") is None  # no configuration at all


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_every_type_that_numpy_has_is_read_exactly(kind: str) -> None:
    values = np.array([[0.5, -3.0, 1e-3]], kind)
    found = parse_weights(safetensors.numpy.save({"x": values}, metadata={"by": "me"}), WHERE)
    assert (found.tensors["x"] == values).all()
    assert found.metadata == {"by": "me"}


def test_bfloat16_is_read_exactly() -> None:
    import torch
    from safetensors.torch import save

    values = torch.tensor([[1.0, -0.3, 3e38, float("inf")]]).bfloat16()
    found = parse_weights(save({"x": values}), WHERE)
    assert found.dtypes == {"x": "BF16"}
    assert (found.tensors["x"] == values.float().numpy()).all()


@pytest.mark.parametrize("cut", [0, 7, 30, -1])
def test_a_file_that_is_cut_is_damaged(cut: int) -> None:
    content = safetensors.numpy.save({"x": np.ones((2, 2), "f4")})
    with pytest.raises(Damaged):
        parse_weights(content[:cut], WHERE)


def described(header: dict[str, Any], numbers: bytes) -> bytes:
    """A safetensors file with this header."""
    said = json.dumps(header).encode()
    return len(said).to_bytes(8, "little") + said + numbers


def test_tensors_that_lie_over_each_other_are_damaged() -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(Damaged, match="not a sound safetensors file"):
        parse_weights(described({"x": entry, "y": entry}, bytes(4)), WHERE)


ENTRIES: list[dict[str, Any]] = [
    {},
    *({"shape": shape} for shape in ([2, 1], [1], [3], [-2], [-1, -2], [0], [2.0], [True, 2], [], [2**70, 0])),
    *(
        {"data_offsets": places}
        for places in ([0, 4], [4, 12], [0.0, 8], [False, 8], [0, 8, 8], [8, 0], 8, None, ["0", 8])
    ),
    *({"dtype": dtype} for dtype in ("F16", "F64", "BF16", "I32", "U8", "F8_E4M3", "f32", "?", 4, ["F32"])),
]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": 1}, {"format": None}])
@pytest.mark.parametrize("change", ENTRIES)
@pytest.mark.parametrize("more", [0, -4, 4])
def test_a_file_is_sound_here_if_it_is_to_the_library(change: dict[str, Any], metadata: Any, more: int) -> None:
    header: dict[str, Any] = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}
    header |= {"y": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}
    content = described(header | ({"__metadata__": metadata} if metadata else {}), bytes(range(12 + more)))
    try:
        expected = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, OverflowError, ValueError):
        expected = None
    try:
        found = parse_weights(content, WHERE)
    except Damaged:
        assert expected is None or "I32" in str(header) or "U8" in str(header)  # numbers, but no adapter's
        return
    assert expected is not None or "BF16" in str(header)  # NumPy has none
    for name, tensor in (expected or {}).items():
        assert found.tensors[name].tobytes() == tensor.astype(found.tensors[name].dtype).tobytes()
        assert found.tensors[name].shape == tensor.shape


def test_numbers_that_lie_in_another_order_than_they_are_named_are_read_by_their_places() -> None:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": place} for name, place in (("x", [4, 8]), ("y", [0, 4]))
    }
    found = parse_weights(described(header, np.array([1, 2], "f4").tobytes()), WHERE)
    assert {name: float(tensor[0]) for name, tensor in found.tensors.items()} == {"x": 2, "y": 1}


def test_the_extent_of_a_tensor_is_its_largest_absolute_value_and_tells_what_is_no_number() -> None:
    tensors = {"a": [[1.0, -3.0]], "b": [-0.0, 0.0], "c": [], "d": [np.nan, np.inf], "e": [2, -np.inf], "f": 7.0}
    adapter = AnyAdapter({name: np.array(values, "f4") for name, values in tensors.items()})
    assert adapter.extents == pytest.approx({"a": 3, "b": 0, "c": 0, "d": np.nan, "e": np.inf, "f": 7}, nan_ok=True)
    assert not adapter.is_finite
    assert AnyAdapter({name: adapter.tensors[name] for name in "abcf"}).is_finite
