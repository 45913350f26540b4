"""Secure aggregation: masking and unmasking against the keystream they need, bytes sent, error of the mean.

The bound of a time is what its keystream takes, 4 bytes for each word at the rate that AES-256-CTR has in the same run,
and as many additions; on both sides of a ratio one thread.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from secure_rounds import new_keys
from stages.secagg import fixed_point, masking, prg, unmasking
from stages.secagg.unmasking import Opened
from tests.benchmarks.repeats import shown

PARAMETERS, CLIENTS, MISSING = 10_000_000, 64, 6
SENT_PARAMETERS = 3_145_728  # OPT-1.3B with LoRA of rank 16 on q_proj and v_proj
CHUNK_BYTES = 1 << 20  # in cache
BOUND = 8.0


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    rows = []
    for what, streams, work, goal in (
        (f"masking, {CLIENTS} clients", CLIENTS, masking_once(), ">= 60 %"),
        (
            f"unmasking, {MISSING} of {CLIENTS} missing",
            (CLIENTS - MISSING) * (1 + MISSING),
            unmasking_once(),
            ">= 50 %",
        ),
    ):
        bounds, times = zip(*((streams * seconds_per_stream(), seconds(work)) for _ in range(repeats)), strict=True)
        shares = [100 * bound / took for bound, took in zip(bounds, times, strict=True)]
        rows.append((f"{what}, {PARAMETERS:,} parameters: % of the keystream bound", shown(shares, ".0f"), goal))
        rows.append((f"{what}: seconds", shown(times), f"bound {shown(bounds)}"))
    for clients in (4, 16, 64, 256):
        shares = clients * masking.sealed_row_bytes(clients)
        sent = 4 * (SENT_PARAMETERS + 3) + shares
        row = f"bytes sent, {clients} clients, {SENT_PARAMETERS:,} parameters"
        rows.append((row, f"{sent:,}, of them shares {shares:,}", "4 a parameter, and shares"))
    for clients in (4, 16, 64, 256):
        rows.append((f"relative RMS error of the mean, {clients} clients", f"{error(clients):.1e}", "<= 5e-6"))
    return rows


def masking_once() -> Callable[[], object]:
    """What a client does with an encoded update: keys, masks, commitments and sealed shares."""
    round, keys = new_keys(range(1, CLIENTS + 1))
    values = np.random.default_rng(0).integers(0, 2**32, PARAMETERS + 2, dtype=np.uint32)
    return lambda: masking.mask(values, round, client=CLIENTS // 2, secret=keys[CLIENTS // 2], threads=1)


def unmasking_once() -> Callable[[], object]:
    """What the server does once secrets are open. The uploads are one made so that the sum is whole, and zeros."""
    round, _ = new_keys(range(1, CLIENTS + 1))
    survivors, missing = list(range(1, CLIENTS - MISSING + 1)), range(CLIENTS - MISSING + 1, CLIENTS + 1)
    names = [(u, v) for u in survivors for v in (0, *missing)]
    opened = Opened(survivors, {name: secrets.token_bytes(32) for name in names}, {})
    values = np.random.default_rng(0).integers(0, 2**32, PARAMETERS + 3, dtype=np.uint32)
    values[-2] = len(survivors)
    values[-1] = masking.checksum(round.transcript, values[:-1])
    masked = values.copy()
    prg.add(masked, list(unmasking.remaining_streams(opened, round)), threads=1)
    uploads = [masked] + [np.zeros_like(masked)] * (len(survivors) - 1)

    def unmask() -> None:
        np.testing.assert_array_equal(unmasking.unmask(uploads, opened, round, threads=1), values[:-1])

    return unmask


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_per_stream() -> float:
    """What PARAMETERS words of AES-256-CTR and their addition take, in pieces that stay in cache."""
    encryptor = Cipher(algorithms.AES256(secrets.token_bytes(32)), modes.CTR(bytes(16))).encryptor()
    zeros, keystream = bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES + 16)
    words = np.frombuffer(keystream, "<u4", CHUNK_BYTES // 4)
    total = np.zeros_like(words)

    def chunks(count: int = 256) -> None:
        for _ in range(count):
            encryptor.update_into(zeros, keystream)
            np.add(total, words, out=total)

    chunks(16)
    return seconds(chunks) * 4 * PARAMETERS / (256 * CHUNK_BYTES)


def error(clients: int, size: int = 50_000) -> float:
    """Of heavy-tailed updates with a mean of 5e-3 RMS, encoded, summed and decoded, against the mean in float64."""
    rng = np.random.default_rng(clients)
    common = rng.standard_t(4, size) * 3.5e-3
    updates = [(common + rng.standard_t(4, size) * 2e-3).astype(np.float32) for _ in range(clients)]
    total = sum(fixed_point.encode(update, bound=BOUND, clients=clients) for update in updates)
    mean, _, _ = fixed_point.decode(total, bound=BOUND, clients=clients)
    exact = np.mean(updates, axis=0, dtype=np.float64)
    return float(np.sqrt(np.mean((mean - exact) ** 2) / np.mean(exact**2)))
