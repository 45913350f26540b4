"""any_adapter: adapters of every floating-point type, and what is measured of them, against NumPy on whole matrices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from stages.parts.any_adapter import AnyAdapter, effective_rank, parse_weights, product_spectrum, rank_of
from stages.parts.errors import Damaged

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


def test_tensors_that_lie_over_each_other_are_damaged() -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"x": entry, "y": entry}).encode()
    with pytest.raises(Damaged, match="not a sound safetensors file"):
        parse_weights(len(header).to_bytes(8, "little") + header + bytes(4), WHERE)
