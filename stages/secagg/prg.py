"""The endless words of a key, by AES-256-CTR: what masks are made of.

The words of a key are its keystream from counter 0, as little-endian unsigned 32-bit numbers. A counter can start
anywhere, so that cores share a vector by ranges of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

WORD_BYTES = 4
CHUNK = 1 << 16
"""Words worked on at a time: they, their keystream and the zeros it is made of, 256 KiB each, stay in cache."""
WORDS_PER_BLOCK = 4

Stream = tuple[bytes, int]
"""A key, and +1 to add its words or -1 to take them away."""


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add(total: np.ndarray, streams: Sequence[Stream], *, threads: int | None = None) -> None:
    """Add the words of every stream to total, uint32, in place, modulo 2^32. Without threads: one for each core."""
    share = -(-len(total) // (threads or cores()))
    share = -(-share // CHUNK) * CHUNK  # whole chunks, which are whole blocks
    starts = range(0, len(total), share)
    if len(starts) == 1:
        _add(total, streams, 0)
        return
    with ThreadPoolExecutor(len(starts)) as pool:
        list(pool.map(lambda start: _add(total[start : start + share], streams, start), starts))


def checksum(key: bytes, values: np.ndarray) -> int:
    """The sum of values[i] * words[i] modulo 2^32: linear, so that the checksum of a sum is the sum of checksums."""
    found = 0
    stream = _encryptor(key, 0)
    zeros, buffer = _buffers(len(values))
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK]
        words = _next_words(stream, zeros, buffer, len(chunk))
        found += int(np.multiply(words, chunk, out=words).sum(dtype=np.uint64))
    return found % 2**32


def _add(total: np.ndarray, streams: Sequence[Stream], first: int) -> None:
    """Add to words that stand `first` words into the vector."""
    encryptors = [(_encryptor(key, first), np.add if sign > 0 else np.subtract) for key, sign in streams]
    zeros, buffer = _buffers(len(total))
    for start in range(0, len(total), CHUNK):
        chunk = total[start : start + CHUNK]
        for encryptor, operation in encryptors:
            operation(chunk, _next_words(encryptor, zeros, buffer, len(chunk)), out=chunk)


def _encryptor(key: bytes, first: int) -> CipherContext:
    counter = (first // WORDS_PER_BLOCK).to_bytes(16, "big")
    return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()


def _buffers(words: int) -> tuple[memoryview, bytearray]:
    """Zeros to encrypt and a place for the result, which some versions of the library want a block longer."""
    size = WORD_BYTES * min(words, CHUNK)
    return memoryview(bytes(size)), bytearray(size + 16)


def _next_words(encryptor: CipherContext, zeros: memoryview, buffer: bytearray, count: int) -> np.ndarray:
    encryptor.update_into(zeros[: WORD_BYTES * count], buffer)
    return np.frombuffer(buffer, "<u4", count)
