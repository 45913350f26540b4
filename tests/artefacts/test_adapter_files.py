"""adapter_files: strict safetensors by bytes made by hand, and files that others read."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from peft import LoraConfig

from builders import random_adapter
from stages.artefacts.adapter_files import (
    Layout,
    config_bytes,
    flat,
    layout_of,
    modules_of,
    read_adapter,
    unflat,
    weights_bytes,
)
from stages.artefacts.manifest import BaseIdentity, Manifest
from stages.artefacts.reading import Artefact
from stages.runtime.errors import BadNumbers, Damaged, Problem
from stages.workspace.agreement import Lora
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS

LORA = Lora(r=2, alpha=4)
A, B = "h.0.lora_A.weight", "h.0.lora_B.weight"
LAYOUT: Layout = {A: (2, 3), B: (4, 2)}
CONFIG: dict[str, Any] = json.loads(config_bytes(LORA, target_modules=["c_attn"], fan_in_fan_out=True))
TENSORS = random_adapter(LAYOUT, seed=1)
Entries = dict[str, Any]


def entry(shape: Any, start: int, *, dtype: str = "F32", size: int = 4) -> Entries:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size * int(np.prod(shape))]}


def by_hand(header: Entries | str, data: bytes) -> bytes:
    """A safetensors file: the header's length as eight bytes, the header, the data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


SOUND: Entries = {A: entry([2, 3], 0), B: entry([4, 2], 24)}  # 6 and 8 numbers of 4 bytes: 24 and 32 bytes
DATA = TENSORS[A].tobytes() + TENSORS[B].tobytes()


def artefact(weights: bytes, config: bytes | None = None, *, client: int | None = 3) -> Artefact:
    nobody = BaseIdentity(architecture="gpt2", weights_sha256="0" * 64, tokenizer_sha256="0" * 64)
    manifest = Manifest(
        federation="tiny",
        agreement_sha256="0" * 64,
        stage="client-train",
        round=1,
        client=client,
        parents={},
        files={},
        base=nobody,
        lora=LORA,
        parameters=14,
        versions={},
    )
    contents = {ADAPTER_WEIGHTS: weights, ADAPTER_CONFIG: json.dumps(CONFIG).encode() if config is None else config}
    return Artefact(Path("exchange/round-0001/client-3"), manifest, b"", "0" * 64, contents)


def refusal(weights: bytes, kind: type[Problem] = Damaged, *, expected: Layout | None = LAYOUT) -> Problem:
    with pytest.raises(kind) as caught:
        read_adapter(artefact(weights), expected, LORA)
    assert type(caught.value) is kind
    assert str(caught.value.where).endswith(ADAPTER_WEIGHTS)
    assert caught.value.mend
    return caught.value


def test_a_file_made_by_hand_is_read() -> None:
    found = read_adapter(artefact(by_hand(SOUND | {"__metadata__": {"format": "pt"}}, DATA)), LAYOUT, LORA)
    assert found.keys() == TENSORS.keys()
    assert all(np.array_equal(found[name], TENSORS[name]) for name in TENSORS)


def test_what_is_written_is_read_again() -> None:
    found = read_adapter(artefact(weights_bytes(TENSORS)), LAYOUT, LORA)
    assert {name: tensor.tobytes() for name, tensor in found.items()} == {
        name: tensor.tobytes() for name, tensor in TENSORS.items()
    }
    assert layout_of(found) == LAYOUT


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    return buffer.getvalue()


@pytest.mark.parametrize("pickled", [pickle.dumps({A: [1.0]}), zipped()], ids=["pickle", "torch.save's zip"])
def test_a_pickle_is_named_and_never_opened(pickled: bytes) -> None:
    assert "is a pickle, which is never opened" in refusal(pickled).message


@pytest.mark.parametrize("cut", [0, 7, 8, 30, len(by_hand(SOUND, DATA)) - 1])
def test_a_file_cut_short_anywhere_is_damaged(cut: int) -> None:
    assert "copy the folder again" in str(refusal(by_hand(SOUND, DATA)[:cut]).mend)


def test_bytes_after_the_end_are_damage() -> None:
    refusal(by_hand(SOUND, DATA + b"\x00"))


TWICE = f'{{"{A}": {json.dumps(SOUND[A])}, "{B}": {json.dumps(SOUND[B])}, "{A}": {json.dumps(SOUND[A])}}}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (TWICE, f"the key {A!r} appears twice"),
        (SOUND | {"__metadata__": {"format": "pt", "author": "me"}}, "unknown metadata"),
        (SOUND | {"__metadata__": {"format": "tf"}}, "unknown metadata"),
        (SOUND | {"__metadata__": None}, "unknown metadata"),
        (json.dumps(SOUND).replace("24", "NaN"), "NaN is not allowed"),
        (json.dumps(SOUND)[:-1], "not strict JSON"),
        ("{" * 5000, "not strict JSON"),
        ("[1, 2]", "is not a safetensors file, or is cut short"),
        (" " + json.dumps(SOUND), "is not a safetensors file, or is cut short"),
        ("{" + " " * (1 << 20) + json.dumps(SOUND)[1:], "is not a safetensors file, or is cut short"),
        (SOUND | {B: [1, 2]}, "in an unknown way"),
        (SOUND | {B: SOUND[B] | {"path": "../x"}}, "in an unknown way"),
        (SOUND | {B: {"dtype": "F32", "shape": [4, 2]}}, "in an unknown way"),
        (SOUND | {B: SOUND[B] | {"shape": 8}}, "in an unknown way"),
        (SOUND | {B: SOUND[B] | {"shape": "42"}}, "in an unknown way"),
        (SOUND | {B: SOUND[B] | {"shape": ["4", "2"]}}, "in an unknown way"),
    ],
)
@pytest.mark.parametrize("expected", [LAYOUT, None], ids=["layout known", "layout unknown"])
def test_a_header_that_is_anything_but_plain_is_refused(
    header: Entries | str, message: str, expected: Layout | None
) -> None:
    assert message in refusal(by_hand(header, DATA), expected=expected).message


@pytest.mark.parametrize(
    "changed",
    [
        {B: entry([4, 2], 0)},  # overlaps A
        {B: entry([4, 2], 28)},  # a hole before it, and past the end
        {B: SOUND[B] | {"data_offsets": [56, 24]}},
        {B: SOUND[B] | {"data_offsets": [-32, 0]}},
        {B: SOUND[B] | {"data_offsets": "24"}},
        {B: SOUND[B] | {"shape": [-4, -2]}},
        {B: SOUND[B] | {"shape": [1 << 62, 1 << 62]}},
    ],
)
@pytest.mark.parametrize("expected", [LAYOUT, None], ids=["layout known", "layout unknown"])
def test_places_that_make_no_sense_are_damage(changed: Entries, expected: Layout | None) -> None:
    refusal(by_hand(SOUND | changed, DATA), expected=expected)


def test_a_missing_tensor_is_named() -> None:
    message = refusal(by_hand({A: SOUND[A]}, DATA[:24])).message
    assert message == f"the adapter lacks {B} (1 tensors missing)"


def test_a_tensor_too_many_is_named() -> None:
    message = refusal(by_hand(SOUND | {"../lm_head.weight": entry([1], 56)}, DATA + b"\0\0\0\0")).message
    assert message == "the adapter has ../lm_head.weight, which the base model does not (1 tensors too many)"


def test_another_rank_is_told_as_a_rank_and_mended_where_it_was_made() -> None:
    problem = refusal(by_hand({A: entry([3, 3], 0), B: entry([4, 3], 36)}, bytes(84)))
    assert problem.message == "the adapter has rank 3, the agreement says 2"
    assert "on client 3's machine" in str(problem.mend)
    assert "--overwrite" in str(problem.mend)


def test_another_shape_is_told_with_both_shapes() -> None:
    problem = refusal(by_hand({A: SOUND[A], B: entry([5, 2], 24)}, DATA + bytes(8)))
    assert problem.message == f"{B} has shape [5, 2], expected [4, 2]"


@pytest.mark.parametrize(("dtype", "size"), [("F16", 2), ("BF16", 2), ("F64", 8), ("I32", 4)])
def test_another_type_than_float32_is_refused(dtype: str, size: int) -> None:
    header = {A: entry([2, 3], 0, dtype=dtype, size=size), B: entry([4, 2], 6 * size, dtype=dtype, size=size)}
    assert f"holds {A} as {dtype}; adapters are exchanged as F32" in refusal(by_hand(header, bytes(14 * size))).message


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]])
def test_a_value_that_is_no_number_is_refused_with_the_name_of_its_tensor(values: list[float]) -> None:
    poisoned = {name: tensor.copy() for name, tensor in TENSORS.items()}
    poisoned[B].flat[: len(values)] = values
    problem = refusal(weights_bytes(poisoned), BadNumbers)
    assert problem.message == f"{B} holds NaN or infinity"


def test_the_largest_numbers_are_numbers() -> None:
    largest = {name: np.full_like(tensor, np.finfo(np.float32).max) for name, tensor in TENSORS.items()}
    read_adapter(artefact(weights_bytes(largest)), LAYOUT, LORA)


@pytest.mark.parametrize(
    ("key", "value"), [("r", 16), ("lora_alpha", 8), ("peft_type", "IA3"), ("bias", "all"), ("use_rslora", True)]
)
def test_a_config_of_another_adapter_is_refused_by_key(key: str, value: object) -> None:
    config = json.dumps(CONFIG | {key: value}).encode()
    with pytest.raises(Damaged, match=f"says {key} = {value!r}, the agreement says {CONFIG.get(key)!r}"):
        read_adapter(artefact(weights_bytes(TENSORS), config), LAYOUT, LORA)


@pytest.mark.parametrize("config", [b"", b"[]", b"{", json.dumps(CONFIG)[:-1].encode() + b', "r": 2}', b"{" * 5000])
def test_a_config_that_is_not_strict_json_is_refused(config: bytes) -> None:
    with pytest.raises(Damaged, match="not valid JSON"):
        read_adapter(artefact(weights_bytes(TENSORS), config), LAYOUT, LORA)


def test_equal_adapters_are_equal_bytes_in_whatever_order_they_are_held() -> None:
    backwards = dict(sorted(TENSORS.items(), reverse=True))
    as_columns = {name: np.asfortranarray(tensor.astype(np.float64)) for name, tensor in TENSORS.items()}
    assert list(backwards) != list(TENSORS)
    assert weights_bytes(TENSORS) == weights_bytes(backwards) == weights_bytes(as_columns)


def test_safetensors_itself_reads_what_is_written() -> None:
    found = safetensors.numpy.load(weights_bytes(TENSORS))
    assert all(np.array_equal(found[name], TENSORS[name]) for name in LAYOUT)
    length = int.from_bytes(weights_bytes(TENSORS)[:8], "little")
    assert json.loads(weights_bytes(TENSORS)[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_peft_reads_the_config_and_no_base_is_named_in_it(tmp_path: Path) -> None:
    lora = Lora(r=16, alpha=32, dropout=0.1)
    content = config_bytes(lora, target_modules=["v_proj", "q_proj"], fan_in_fan_out=False)
    (tmp_path / ADAPTER_CONFIG).write_bytes(content)
    config = LoraConfig.from_pretrained(tmp_path)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.1, "none")
    assert set(config.target_modules or []) == {"q_proj", "v_proj"}
    assert config.base_model_name_or_path is None


def test_layers_are_those_agreed_or_else_those_of_the_configuration() -> None:
    assert modules_of(artefact(weights_bytes(TENSORS))) == ["c_attn"]
    config = json.dumps(CONFIG | {"target_modules": 5}).encode()
    with pytest.raises(Damaged, match="target_modules = 5, the agreement says"):
        modules_of(artefact(weights_bytes(TENSORS), config))


def test_tensors_stand_in_the_order_of_their_names_bytes() -> None:
    tensors = {
        "b": np.arange(4, dtype=np.float32).reshape(2, 2).T,
        "a.é": np.array([9], np.float32),
        "a.z": np.array([8], np.float32),
        "B": np.array([7], np.float32),
    }
    vector = flat(tensors)
    assert vector.tolist() == [7, 8, 9, 0, 2, 1, 3]  # B < a.z < a.é (UTF-8 c3 a9) < b, whose columns were rows
    assert vector.dtype == np.float32
    back = unflat(vector, layout_of(tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("size", [4, 6])
def test_a_vector_of_another_length_fills_no_layout(size: int) -> None:
    with pytest.raises(ValueError, match="layout of 5"):
        unflat(np.zeros(size, np.float32), {"a": (2, 2), "b": (1,)})
