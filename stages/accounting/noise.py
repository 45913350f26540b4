"""Random numbers that nobody else can draw a second time, for sampling and noise, which a known seed would take away.

The key comes from the system, lives in memory alone and is never written or logged. The stream is AES-256 in counter
mode: torch's own generator takes 32 bits of seed on a CPU, few enough to try them all.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


class SecretRandom:
    """One stream of numbers under a key of its own; key: 32 secret bytes, for a stream that its owner can repeat."""

    def __init__(self, key: bytes | None = None) -> None:
        self._stream = Cipher(algorithms.AES256(key or os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> np.ndarray:
        """So many numbers in [0, 1), float64, multiples of 2^-53."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return (words >> np.uint64(11)) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        """So many standard normal numbers, float64, by Box and Muller's transformation."""
        pairs = (count + 1) // 2
        uniform = self.uniform(2 * pairs)
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[:pairs])), 2 * np.pi * uniform[pairs:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
