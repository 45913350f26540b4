"""encrypted.safetensors: the ciphertexts of an update, or of a sum, one after the other, and how long each is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from stages.artefacts.sizes import CIPHERTEXT_BYTES
from stages.artefacts.tensor_files import bad, read_header

BYTES, LENGTHS = "ciphertexts", "lengths"


def written(ciphertexts: Iterable[bytes]) -> bytes:
    """The file of these."""
    every = list(ciphertexts)
    tensors: dict[str, np.ndarray] = {
        BYTES: np.frombuffer(b"".join(every), np.uint8),
        LENGTHS: np.array([len(one) for one in every], np.uint32),
    }
    return safetensors.numpy.save(tensors)


def read(content: bytes, path: Path, count: int) -> list[bytes]:
    """The ciphertexts in a file, unopened. Raises Damaged unless there are so many, none of them too large."""
    header = read_header(content, path)
    found = {name: (entry["dtype"], len(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    if found != {BYTES: ("U8", 1), LENGTHS: ("U32", 1)} or len(header) != 2 or header[LENGTHS]["shape"] != [count]:
        raise bad(path, f"holds other tensors than {BYTES} U8 [bytes] and {LENGTHS} U32 [{count}]")
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise bad(path, f"is no sound safetensors file: {error}") from error
    lengths = tensors[LENGTHS].astype(np.int64)
    if len(lengths) == 0 or not 0 < lengths.min() <= lengths.max() <= CIPHERTEXT_BYTES:
        raise bad(path, f"has ciphertexts of other lengths than 1 to {CIPHERTEXT_BYTES} bytes")
    ends = np.cumsum(lengths)
    whole = tensors[BYTES].tobytes()
    if ends[-1] != len(whole):
        raise bad(path, f"has {len(whole)} bytes of ciphertexts, their lengths make {ends[-1]}")
    return [whole[end - length : end] for end, length in zip(ends, lengths, strict=True)]
