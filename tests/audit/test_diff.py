"""diff: how two adapters differ, in numbers worked out here by hand or by NumPy's own functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import Outcome
from stages.audit.diff import diff
from stages.runtime.errors import Damaged, NotReady

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
    assert diff(a, a).verdict.startswith("tensors: identical, byte for byte; configuration: identical; ")
    found = diff(a, b)
    assert (found.same_bytes, found.same_values) == (False, True)
    said = "tensors: identical in every value, stored in other bytes; configuration: 1 key differs; "
    assert found.verdict.startswith(said)
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
    a = adapter(tmp_path / "c", {name: tensor * np.nan for name, tensor in pair("q").items()})
    found = diff(a, adapter(tmp_path / "d", pair("q")))
    assert (found.layers[0].norm_a, found.layers[0].difference, found.layers[0].is_equal) == (None, None, False)
    json.dumps(found.as_json(), allow_nan=False)


def pair(*layers: str, of: int = 0, rank: int = 2) -> Tensors:
    """A [rank, 5] and B [3, rank] of each layer."""
    draw = np.random.default_rng(of)
    shapes = {"lora_A": (rank, 5), "lora_B": (3, rank)}
    return {
        f"base_model.model.{layer}.{name}.weight": draw.standard_normal(shape).astype("f4")
        for layer in layers
        for name, shape in shapes.items()
    }


def added(tensors: Tensors, layer: str, scale: float) -> np.ndarray:
    a, b = (tensors[f"base_model.model.{layer}.{name}.weight"].astype("f8") for name in ("lora_A", "lora_B"))
    return scale * b @ a


def test_what_is_added_to_each_layer_is_compared_as_peft_scales_it(tmp_path: Path) -> None:
    ours, theirs = pair("q", "v"), pair("q", "v", of=1, rank=4)
    a = adapter(tmp_path / "a", ours, alpha_pattern={"q": 16})
    b = adapter(tmp_path / "b", theirs, r=4, use_rslora=True)
    scales = {"q": (16 / 2, 4 / 4**0.5), "v": (4 / 2, 4 / 4**0.5)}
    found = {one.name.rpartition(".")[2]: one for one in diff(a, b).layers}
    for layer, (of_a, of_b) in scales.items():
        first, second = added(ours, layer, of_a), added(theirs, layer, of_b)
        assert found[layer].norm_a == pytest.approx(np.linalg.norm(first))
        assert found[layer].norm_b == pytest.approx(np.linalg.norm(second))
        assert found[layer].difference == pytest.approx(np.linalg.norm(first - second))
        assert found[layer].cosine == pytest.approx(
            (first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second))
        )


def test_equal_tensors_may_add_other_things_and_other_tensors_the_same(tmp_path: Path) -> None:
    tensors = pair("q")
    a = adapter(tmp_path / "a", tensors)
    louder = diff(a, adapter(tmp_path / "b", tensors, lora_alpha=40))
    assert louder.verdict.startswith("tensors: identical, byte for byte; configuration: 1 key differs")
    assert louder.verdict.endswith("what they add: other in 1 of 1 layers")
    assert louder.layers[0].norm_b == pytest.approx(10 * (louder.layers[0].norm_a or 0))
    swapped = {name: tensor * np.float32(3 if "lora_A" in name else 1 / 3) for name, tensor in tensors.items()}
    same = diff(a, adapter(tmp_path / "c", swapped))
    assert same.verdict.startswith("tensors: 2 differ, 0 identical")
    assert same.verdict.endswith("what they add: the same in every layer, to rounding")


def test_an_adapter_adds_nothing_to_a_layer_that_it_lacks(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", pair("q", "v")), adapter(tmp_path / "b", pair("q"))
    for first, second in ((a, b), (b, a)):
        found = diff(first, second)
        lacking = found.layers[1]
        norms = (lacking.norm_a, lacking.norm_b) if first is a else (lacking.norm_b, lacking.norm_a)
        assert norms == (lacking.difference, 0)
        assert found.verdict.endswith("other in 1 of 2 layers")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights = 'eva'"),
        ({"use_dora": True}, "use_dora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"key_of_next_year": 1}, "key_of_next_year"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"rank_pattern": {"q": 3}}, "q has rank 2, the configuration says 3"),
        ({"alpha_pattern": {"k": 3}}, "alpha_pattern has 'k', which fits no layer"),
    ],
)
def test_of_what_is_not_understood_it_is_said_so(tmp_path: Path, config: dict[str, object], said: str) -> None:
    a, b = adapter(tmp_path / "a", pair("q")), adapter(tmp_path / "b", pair("q"), **config)
    found = diff(a, b)
    assert found.verdict.endswith("what they add: not known here")
    assert not found.not_understood["A"]
    assert any(said in line for line in found.not_understood["B"])


def test_tensors_beside_the_pairs_and_no_configuration_are_not_understood(tmp_path: Path) -> None:
    name = "base_model.model.q.lora_magnitude_vector"
    a = adapter(tmp_path / "a", pair("q") | {name: np.ones(3, "f4")})
    b = adapter(tmp_path / "b", pair("q"))
    (b / CONFIG).unlink()
    found = diff(a, b)
    assert found.not_understood["A"] == [f"{name} is not of a pair of LoRA matrices"]
    assert found.not_understood["B"] == ["adapter_config.json, which says alpha, is not there or empty"]
    assert found.layers[0].norm_b is None


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
    verdict = "tensors: 2 differ, 0 identical; configuration: identical; what they add: other in 1 of 1 layers"
    assert verdict in " ".join(outcome.out.split())
    same = fedcollm("diff", exchange / "round-0001/broadcast", exchange / "round-0001/broadcast", "--json")
    found = json.loads(same.out)
    assert (same.code, found["same_bytes"], found["same_values"]) == (0, True, True)
    assert {one["name"].rpartition(".")[0].rpartition(".")[2] for one in found["tensors"]} == {"lora_A", "lora_B"}


def test_a_row_of_a_deep_model_fits_a_terminal_of_80_columns(
    tmp_path: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    layers = [f"base_model.model.model.layers.{block}.self_attn.q_proj" for block in range(11)]
    for name, factor in {"a": 1.0, "b": -0.123456}.items():
        tensors = {f"{layer}.lora_A.weight": factor * np.ones((1, 4), "f4") for layer in layers}
        tensors |= {f"{layer}.lora_B.weight": factor * np.ones((4, 1), "f4") for layer in layers}
        adapter(tmp_path / name, tensors, r=1)
    lines = [line.split() for line in fedcollm("diff", tmp_path / "a", tmp_path / "b").out.splitlines()]
    heads = [" ".join(words[:3]) for words in lines if "of" in words or "in" in words]
    assert heads[:2] == ["tensor of model.layers", "added in model.layers"]
    assert ["10.self_attn.q_proj.lora_A", "2", "0.2469", "-1", "1.123", "1", "1"] in lines  # 2 = the root of 4 ones
    assert sum(words[0].endswith(("lora_A", "lora_B")) for words in lines if words) == 22


def test_the_command_names_what_is_not_there(finished_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("diff", finished_once / "exchange/round-0001/broadcast", finished_once / "nowhere")
    assert outcome.code == 3
    assert f"in    {finished_once / 'nowhere'}" in outcome.err
    assert "mend  name a folder that holds an adapter" in outcome.err
