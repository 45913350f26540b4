"""Files that hold one array each, as where updates are hidden: safetensors, read as strictly as adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.tensor_files import read_header
from stages.files import reading
from stages.runtime.errors import Damaged

Kind = Literal["F32", "U32", "U8"]


def array_bytes(name: str, array: np.ndarray) -> bytes:
    """The array as a safetensors file of one tensor."""
    return safetensors.numpy.save({name: np.ascontiguousarray(array)})


def read_array(content: bytes, path: Path, *, name: str, kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """The one array in a file. Raises Damaged unless it has exactly this name, kind and shape."""
    header = read_header(content, path)
    expected: dict[str, tuple[str, list[int]]] = {name: (kind, list(shape))}
    found = {key: (entry.get("dtype"), entry.get("shape")) for key, entry in header.items()}
    if found != expected:
        raise Damaged(
            f"{path.name} holds {_shown(found)}, expected {_shown(expected)}", where=path, mend=reading.COPY_AGAIN
        )
    try:
        return safetensors.numpy.load(content)[name]
    except safetensors.SafetensorError as error:
        raise Damaged(f"not a sound safetensors file: {error}", where=path, mend=reading.COPY_AGAIN) from error


def _shown(arrays: dict[str, tuple[str, list[int]]]) -> str:
    return ", ".join(f"{name} {kind} {shape}" for name, (kind, shape) in sorted(arrays.items())) or "nothing"
