"""encrypted.safetensors: what is written is read again, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from stages.artefacts.sizes import CIPHERTEXT_BYTES
from stages.encryption.ciphertext_files import read, written
from stages.runtime.errors import Damaged

PATH = Path("encrypted.safetensors")


def of(**tensors: np.ndarray) -> bytes:
    return safetensors.numpy.save(tensors)


def test_ciphertexts_are_read_as_they_were_written() -> None:
    each = [b"one", b"an" * 700, b"\0"]
    assert read(written(each), PATH, 3) == each


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file"),
        (b"\x80\x04K\x01.", "is a pickle"),
        (written([b"one"]), r"lengths U32 \[2\]"),
        (of(ciphertexts=np.zeros(4, np.uint8)), "other tensors"),
        (of(ciphertexts=np.zeros(4, np.uint8), lengths=np.array([2, 2], np.uint32), c=np.zeros(1)), "other tensors"),
        (of(ciphertexts=np.zeros(4, np.uint16), lengths=np.array([2, 2], np.uint32)), "other tensors"),
        (of(ciphertexts=np.zeros((2, 2), np.uint8), lengths=np.array([2, 2], np.uint32)), "other tensors"),
        (of(ciphertexts=np.zeros(4, np.uint8), lengths=np.array([4, 0], np.uint32)), "other lengths"),
        (of(ciphertexts=np.zeros(4, np.uint8), lengths=np.array([2, 2**32 - 1], np.uint32)), "other lengths"),
        (of(ciphertexts=np.zeros(4, np.uint8), lengths=np.array([1, CIPHERTEXT_BYTES + 1], np.uint32)), "other length"),
        (of(ciphertexts=np.zeros(5, np.uint8), lengths=np.array([2, 2], np.uint32)), "5 bytes .* make 4"),
        (written([b"one", b"two"])[:-1], "sound|cut short"),
    ],
)
def test_any_other_file_is_damage(content: bytes, said: str) -> None:
    with pytest.raises(Damaged, match=said):
        read(content, PATH, 2)
