"""diff: how two adapters differ, in numbers worked out here by hand or by NumPy's own functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import Outcome
from stages.diff import diff
from stages.parts.errors import Damaged, NotReady

Tensors = dict[str, np.ndarray]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter(folder: Path, tensors: Tensors, **config: object) -> Path:
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4} | config))
    return folder


def test_each_tensor_has_its_norms_cosine_difference_and_ranks(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", {"x": np.array([[3, 0, 0], [0, 4, 0]], "f4")})
    b = adapter(tmp_path / "b", {"x": np.array([[3, 0, 0], [0, 0, 0]], "f4")})
    [found] = diff(a, b).tensors
    assert (found.norm_a, found.norm_b) == (5, 3)  # 3-4-5
    assert found.cosine == pytest.approx(9 / 15)
    assert found.largest_difference == 4
    shares = np.array([3, 4]) / 7
    assert found.rank_a == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert found.rank_b == pytest.approx(1)


def test_equal_singular_values_have_full_rank_and_nothing_has_none(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", {"x": np.eye(3, 5, dtype="f4"), "y": np.zeros((2, 2), "f4"), "z": np.ones(4, "f4")})
    found = {one.name: one for one in diff(a, a).tensors}
    assert found["x"].rank_a == pytest.approx(3)
    assert found["y"].rank_a == 0
    assert found["y"].cosine is None
    assert found["z"].rank_a is None
    assert found["z"].cosine == 1


def test_the_same_values_in_other_bytes_are_told_from_the_same_bytes(tmp_path: Path) -> None:
    values = np.array([[0.5, -2, 4]], "f4")  # all of them exact in float16
    a, b = adapter(tmp_path / "a", {"x": values}), adapter(tmp_path / "b", {"x": values.astype("f2")}, lora_alpha=8)
    assert diff(a, a).verdict == "tensors: identical, byte for byte; configuration: identical"
    found = diff(a, b)
    assert (found.same_bytes, found.same_values) == (False, True)
    assert found.verdict == "tensors: identical in every value, stored in other bytes; configuration: 1 key differs"
    assert found.config == {"lora_alpha": (4, 8)}


def test_bfloat16_is_read_as_what_it_is(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    values = torch.tensor([[1.0, -3.140625, 1e30]])
    a, b = adapter(tmp_path / "a", {"x": values.bfloat16().float().numpy()}), adapter(tmp_path / "b", {})
    save_file({"x": values.bfloat16()}, b / WEIGHTS)
    assert diff(a, b).same_values


def test_missing_tensors_and_other_shapes_are_differences(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", {"only": np.ones((1, 1), "f4"), "x": np.ones((1, 2), "f4"), "s": np.ones(1, "f4")})
    b = adapter(tmp_path / "b", {"more": np.ones((1, 1), "f4"), "x": np.ones((2, 1), "f4"), "s": np.ones(1, "f4")})
    found = diff(a, b)
    assert (found.only_in_a, found.only_in_b) == (["only"], ["more"])
    [x] = [one for one in found.tensors if one.name == "x"]
    assert (x.shape_a, x.shape_b, x.cosine, x.largest_difference) == ([1, 2], [2, 1], None, None)
    assert found.verdict.startswith("tensors: 3 differ, 1 identical")


def test_nan_differs_from_everything_and_json_can_say_so(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", {"x": np.array([[np.nan, 1]], "f4")})
    b = adapter(tmp_path / "b", {"x": np.array([[np.nan, 2]], "f4")})
    found = diff(a, b)
    assert found.verdict.startswith("tensors: 1 differ, 0 identical")
    [x] = found.tensors
    assert (x.norm_a, x.cosine, x.largest_difference, x.rank_a) == (None, None, None, None)
    json.dumps(found.as_json(), allow_nan=False)


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", {"x": np.ones((1, 1), "f4")})
    with pytest.raises(NotReady, match="there is no such folder") as gone:
        diff(a, tmp_path / "b")
    assert gone.value.where == tmp_path / "b"
    (tmp_path / "b").mkdir()
    with pytest.raises(NotReady, match=r"adapter_model\.safetensors is not there"):
        diff(a, tmp_path / "b")
    (tmp_path / "b" / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(Damaged, match=r"adapter_model\.bin is never opened") as pickled:
        diff(tmp_path / "b", a)
    assert pickled.value.mend == "save it again with PEFT, as safetensors"
    (tmp_path / "b" / WEIGHTS).write_bytes(b"\x80\x04")
    with pytest.raises(Damaged, match="is a pickle, which is never opened"):
        diff(a, tmp_path / "b")
    safetensors.numpy.save_file({"x": np.ones(2, "i4")}, tmp_path / "b" / WEIGHTS)
    with pytest.raises(Damaged, match="holds x as I32, which no adapter is"):
        diff(a, tmp_path / "b")


def test_the_command_shows_a_table_and_ends_well_for_what_differs(
    finished_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    exchange = finished_once / "exchange"
    outcome = fedcollm("diff", exchange / "round-0001/broadcast", exchange / "round-0002/client-2")
    assert outcome.code == 0
    assert "max |A-B|" in outcome.out
    assert "tensors: 2 differ, 0 identical; configuration: identical" in outcome.out
    same = fedcollm("diff", exchange / "round-0001/broadcast", exchange / "round-0001/broadcast", "--json")
    found = json.loads(same.out)
    assert (same.code, found["same_bytes"], found["same_values"]) == (0, True, True)
    assert {one["name"].rpartition(".")[0].rpartition(".")[2] for one in found["tensors"]} == {"lora_A", "lora_B"}


def test_the_command_names_what_is_not_there(finished_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("diff", finished_once / "exchange/round-0001/broadcast", finished_once / "nowhere")
    assert outcome.code == 3
    assert f"in    {finished_once / 'nowhere'}" in outcome.err
    assert "mend  name a folder that holds an adapter" in outcome.err
