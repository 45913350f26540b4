"""The two files of an adapter that PEFT reads, written and read strictly: float32 safetensors, exact names and shapes.

Never a pickle, never a path out of a file. Arrays are NumPy's, so that nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact
from stages.artefacts.tensor_files import bad, read_header
from stages.files import reading
from stages.runtime.errors import BadNumbers, Damaged
from stages.workspace.agreement import Lora
from stages.workspace.averaging import Factors
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS

Tensors = dict[str, np.ndarray]
Layout = dict[str, tuple[int, ...]]

A, B = ".lora_A.weight", ".lora_B.weight"
"""How the names of a layer's two matrices end."""


def layers_of(names: Collection[str]) -> list[str]:
    """The layers that have an A and a B, of tensors of these names."""
    layers = (name.removesuffix(A) for name in names if name.endswith(A))
    return [layer for layer in layers if layer + B in names]


def numbers_in(layout: Layout) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(map(math.prod, layout.values()))


def flat(tensors: Tensors) -> np.ndarray:
    """An adapter's numbers one after the other, by the names of its tensors, as in its file: [numbers]."""
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def unflat(numbers: np.ndarray, layout: Layout) -> Tensors:
    """The tensors of such a row, views of it. Raises ValueError unless it has as many numbers as the layout."""
    ends = np.cumsum([math.prod(layout[name]) for name in sorted(layout)])
    if len(numbers) != ends[-1]:
        raise ValueError(f"{len(numbers)} numbers do not fill a layout of {ends[-1]}")
    rows = np.split(numbers, ends[:-1])
    return {name: row.reshape(layout[name]) for name, row in zip(sorted(layout), rows, strict=True)}


def part_of(tensors: Mapping[str, Any], factors: Factors) -> dict[str, Any]:
    """Of an adapter's tensors, or of their shapes, those of A, of B, or all; what is of neither is always there."""
    left_out = {"A": B, "B": A}.get(factors)
    return {name: one for name, one in tensors.items() if left_out is None or not name.endswith(left_out)}


def layout_of(tensors: Mapping[str, np.ndarray]) -> Layout:
    """Names and shapes."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def weights_bytes(tensors: Tensors) -> bytes:
    """adapter_model.safetensors: float32, sorted by name, so that equal adapters are equal bytes."""
    ordered = {name: np.ascontiguousarray(tensors[name], dtype=np.float32) for name in sorted(tensors)}
    return safetensors.numpy.save(ordered, metadata={"format": "pt"})


def config_bytes(lora: Lora, *, target_modules: list[str], fan_in_fan_out: bool) -> bytes:
    """adapter_config.json, as PEFT, vLLM and lm-eval read it. The base is not named; the manifest has its digest."""
    return reading.json_bytes(_config(lora, target_modules, fan_in_fan_out))


def _config(lora: Lora, target_modules: list[str], fan_in_fan_out: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(target_modules),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "inference_mode": True,
    }


def read_adapter(artefact: Artefact, expected: Layout | None, lora: Lora) -> Tensors:
    """The adapter's tensors, float32 and finite, of exactly the expected names and shapes where those are given.

    Raises Damaged for anything else than such a safetensors file or a config of another LoRA shape, BadNumbers for NaN
    or infinity.
    """
    check_config(artefact.contents[ADAPTER_CONFIG], artefact.path / ADAPTER_CONFIG, lora)
    path = artefact.path / ADAPTER_WEIGHTS
    content = artefact.contents[ADAPTER_WEIGHTS]
    found = strict_layout(content, path)
    if expected is not None:
        check_layout(found, expected, path, _whose(artefact.manifest))
    tensors = loaded(content, path)
    check_finite(tensors, path)
    return tensors


def loaded(content: bytes, path: Path) -> Tensors:
    """The tensors of a file whose layout was looked at; they may be NaN or infinite. Raises Damaged."""
    try:
        return safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise Damaged(f"not a sound safetensors file: {error}", where=path, mend=reading.FOLDER_AGAIN) from error


def check_config(content: bytes, path: Path, lora: Lora) -> None:
    """Raise Damaged, naming the first difference, unless adapter_config.json is what config_bytes writes."""
    try:
        value = reading.parse_json(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is not valid JSON: {error}", where=path, mend=reading.FOLDER_AGAIN) from None
    named = value.get("target_modules")
    modules = lora.target_modules or [str(name) for name in (named if isinstance(named, list) else [])]
    flag = bool(value.get("fan_in_fan_out"))
    expected = _config(lora, modules, flag)
    for key in sorted(value.keys() | expected.keys()):
        if value.get(key) != expected.get(key):
            message = f"{path.name} says {key} = {value.get(key)!r}, the agreement says {expected.get(key)!r}"
            raise Damaged(message, where=path, mend=reading.FOLDER_AGAIN)


def modules_of(artefact: Artefact) -> list[str]:
    """The layers that a folder's adapter is for: as agreed, or as its adapter_config.json says where PEFT chose them.

    Raises Damaged as check_config does.
    """
    if agreed := artefact.manifest.lora.target_modules:
        return agreed
    content = artefact.contents[ADAPTER_CONFIG]
    check_config(content, artefact.path / ADAPTER_CONFIG, artefact.manifest.lora)
    return [str(name) for name in reading.parse_json(content)["target_modules"]]


def check_layout(found: Layout, expected: Layout, path: Path, whose: str) -> None:
    """Raise Damaged, naming the first difference, unless names and shapes are exactly those expected."""
    missing, superfluous = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    mend = f"make it again {whose} with the agreement's lora settings and --overwrite"
    if missing:
        raise Damaged(f"the adapter lacks {missing[0]} ({len(missing)} tensors missing)", where=path, mend=mend)
    if superfluous:
        kinds = {end for end in (A, B) if any(name.endswith(end) for name in expected)}
        is_kept = superfluous[0].endswith((A, B)) and not superfluous[0].endswith(tuple(kinds))
        whose_not = "which the agreement has nobody send in this round" if is_kept else "which the base model does not"
        message = f"the adapter has {superfluous[0]}, {whose_not} ({len(superfluous)} tensors too many)"
        raise Damaged(message, where=path, mend=mend)
    for name in sorted(expected):
        if found[name] == expected[name]:
            continue
        if ".lora_A." in name and found[name][1:] == expected[name][1:]:
            message = f"the adapter has rank {found[name][0]}, the agreement says {expected[name][0]}"
        else:
            message = f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
        raise Damaged(message, where=path, mend=mend)


def check_finite(tensors: Tensors, path: Path | str) -> None:
    """Raise BadNumbers if any value is NaN or infinite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            mend = "lower the learning rate or set max_grad_norm, then train again with --overwrite"
            raise BadNumbers(f"{name} holds NaN or infinity", where=path, mend=mend)


def is_finite(tensor: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    # The square is finite only if all values are, and is quick; should it overflow, the values are looked at.
    return bool(np.isfinite(np.vdot(tensor, tensor)) or np.isfinite(tensor).all())


def _whose(manifest: Manifest) -> str:
    return f"on client {manifest.client}'s machine" if manifest.client else "on the server"


def is_as_written(head: bytes, layout: Layout, path: Path) -> bool:
    """Whether a file that begins like this, up to its numbers, has them as weights_bytes writes them: by name.

    Another order may be sound too: whoever reads the file whole says so, or what is wrong with it.
    """
    try:
        header, end = _strict_header(head, path), 0
    except Damaged:
        return False
    for name in sorted(layout):
        start, end = end, end + 4 * math.prod(layout[name])
        if header.pop(name, None) != {"dtype": "F32", "shape": [*layout[name]], "data_offsets": [start, end]}:
            return False
    return not header and int.from_bytes(head[:8], "little") == len(head) - 8


def strict_layout(content: bytes, path: Path) -> Layout:
    """The names and shapes that a safetensors header declares."""
    return {name: tuple(entry["shape"]) for name, entry in _strict_header(content, path).items()}


def _strict_header(content: bytes, path: Path) -> dict[str, Any]:
    """What a safetensors header says of each tensor.

    The library accepts duplicate keys, any metadata and any type; here the header is plain JSON, small, says nothing
    else, and every tensor is F32.
    """
    header = read_header(content, path)
    if header.pop("__metadata__", {"format": "pt"}) != {"format": "pt"}:
        raise bad(path, "carries unknown metadata")
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise bad(path, f"holds {name} as {entry['dtype']}; adapters are exchanged as F32 (float32)")
    return header
