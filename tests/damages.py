"""What tests do to exchanged files, and what an audit then says: harms, to be done to a workspace by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from builders import sign
from stages.audit.checks import Finding

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
CLIENT = "exchange/round-0001/client-2"
SERVER = "private/server/round-0001/aggregate"

Tensors = dict[str, np.ndarray]
Harm = Callable[[Path], object]


def problems(found: list[Finding]) -> list[str]:
    """Everything that is not in order, as a line."""
    return [f"{one.id} {one.level} {one.text}" for one in found if one.level in ("FAIL", "WARN")]


def tensors_of(folder: Path) -> Tensors:
    return safetensors.numpy.load_file(folder / WEIGHTS)


def put(folder: Path, tensors: Tensors, **metadata: str) -> None:
    """Write other tensors soundly, with a manifest that agrees."""
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"} | metadata)
    count = sum(tensor.size for tensor in tensors.values())
    sign(folder, parameters=count)


def config(folder: Path, **values: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    sign(folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def at(folder: str, harm: Callable[..., object], *how: Any, **claims: Any) -> Harm:
    """The harm done to this folder of a workspace."""
    return lambda root: harm(root / folder, *how, **claims)
