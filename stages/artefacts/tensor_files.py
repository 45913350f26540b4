"""Files of tensors before their bulk is read: what a header says, and how large such a file can be.

A file comes from another party, or from nobody knows whom: its size is held against the agreement and the base model,
and its header against its size. Nothing here needs NumPy.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import IO, Any

from stages.bases import base_files, base_folders
from stages.files import reading
from stages.runtime.errors import Damaged, Problem
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

LARGEST_HEADER_BYTES = 1 << 20
LARGEST_BASE_HEADER_BYTES = 100 << 20
"""What the safetensors library takes."""
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "U8": 1}
"""Bytes of one number, of every type that adapters and exchanged arrays have."""
SPLIT = 3
"""A checkpoint may hold as one matrix what is up to three layers in memory: queries, keys and values."""


def largest_bytes(numbers: int) -> int:
    """The most that a file of so many 4-byte numbers can have, whatever else its header says."""
    return 8 + LARGEST_HEADER_BYTES + 4 * numbers


def read_header(content: bytes, path: Path) -> dict[str, Any]:
    """A safetensors header: small, strict JSON, that describes each tensor by dtype, shape and place, and no more.

    content: the file's, or at least its head up to the end of the header. Beside the tensors it may hold
    "__metadata__".
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(LARGEST_HEADER_BYTES, len(content) - 8) or content[8:9] != b"{":
        is_pickle = content[:1] == b"\x80" or content[:2] == b"PK"
        found = "is a pickle, which is never opened" if is_pickle else "is not a safetensors file, or is cut short"
        raise bad(path, found)
    try:
        header = reading.parse_json(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise bad(path, f"has a header that is not strict JSON: {error}") from error
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict):
                raise bad(path, "carries unknown metadata")
            continue
        is_plain = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
        if not (is_plain and isinstance(entry["shape"], list) and all(type(size) is int for size in entry["shape"])):
            raise bad(path, f"describes {json.dumps(name)} in an unknown way")
    return header


def told_in(header: dict[str, Any], name: str) -> dict[str, Any]:
    """What a file says of itself: the JSON under this name, the only key of its metadata; empty if it is not so.

    Takes the metadata out of the header, which is then its tensors alone.
    """
    metadata = header.pop("__metadata__", {})
    try:
        return reading.parse_json(str(metadata[name]).encode()) if set(metadata) == {name} else {}
    except (ValueError, RecursionError):
        return {}


def check_head(file: IO[bytes], size_bytes: int, path: Path) -> None:
    """Raise Damaged unless the header of an open file describes as many bytes as the file has."""
    head = file.read(8 + LARGEST_HEADER_BYTES)
    header = read_header(head, path)
    end = 8 + int.from_bytes(head[:8], "little")
    for name, entry in header.items():
        if name != "__metadata__":
            if str(entry["dtype"]) not in SIZES or min(entry["shape"], default=0) < 0:
                raise bad(path, f"describes {json.dumps(name)} in an unknown way")
            end += SIZES[entry["dtype"]] * math.prod(entry["shape"])
    if end != size_bytes:
        raise bad(path, f"has {size_bytes} bytes, its header makes {end}")


def bad(path: Path, found: str) -> Damaged:
    """What is wrong with a file of tensors."""
    return Damaged(f"{path.name} {found}", where=path, mend=reading.FOLDER_AGAIN)


def most_numbers(workspace: Workspace, role: Role) -> int | None:
    """More numbers than the agreed adapter can have, by the shapes of the base model that is here; None without one.

    Every matrix of the base is counted as if it were adapted. Its weights are not read.
    """
    try:
        folder = base_folders.configuration(workspace, role)
        sides = _sides(folder) if folder else 0
    except (Problem, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # who loads the base says what is wrong with it
    return workspace.agreement.model_of(role).lora.r * SPLIT * sides or None


@functools.cache
def _sides(folder: Path) -> int:
    """The rows and columns of all matrices of a base model, added up; 0 if its files do not say."""
    total = 0
    for path in base_files.weight_files(folder):
        if path.suffix != ".safetensors":
            return 0
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, LARGEST_BASE_HEADER_BYTES)))
        for name, entry in header.items():
            if name == "__metadata__" or len(shape := entry["shape"]) < 2:
                continue
            if not str(entry["dtype"]).startswith(("F", "BF")):
                return 0  # packed: its shape is not the layer's
            total += math.prod(shape[:-1]) + shape[-1]
    return total
