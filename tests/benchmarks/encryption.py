"""Encrypted aggregation: bytes sent against float32, the time of each step, the error of the mean, and FedShield's way.

FedShield-LLM's parameters (degree 8192, primes of 60, 40, 40 and 60 bits, scale 2^40) are a peer in bytes: it opens
sums as they are, under no noise of its own.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tenseal

from stages.artefacts.sizes import encrypted_bytes
from stages.encryption import ckks
from stages.encryption.ciphertext_files import written
from stages.parties.encryption_keys import DEGREE, PRIME_BITS
from tests.benchmarks.repeats import shown

PARAMETERS = 3_145_728  # OPT-1.3B with LoRA of rank 16 on q_proj and v_proj
ROUNDS, BOUND = 5, 8.0
CLIENTS = (2, 16)


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    secret = tenseal.context(tenseal.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(PRIME_BITS), n_threads=1)
    public = secret.copy()
    public.make_context_public()
    rows, took = [], dict[str, list[float]]()
    for clients in CLIENTS:
        precision = ckks.Precision(clients, ROUNDS, PARAMETERS)
        for _ in range(repeats if clients == CLIENTS[0] else 1):
            sent, error = once(clients, secret, public, precision, took if clients == CLIENTS[0] else {})
        rows.append((f"relative RMS error of the mean, {clients} clients", f"{error:.1e}", "<= 1e-5"))
        noise = BOUND * precision.deviation / clients
        rows.append((f"noise over the mean, {clients} clients: its RMS", f"{noise:.1e}", "<= 1e-5 of the mean's"))
    plain = 4 * PARAMETERS
    told = f"{sent:,}: {sent / PARAMETERS:.1f} a parameter, {sent / plain:.1f} times float32"
    rows.append((f"bytes sent, {PARAMETERS:,} parameters", told, f"<= {encrypted_bytes(PARAMETERS):,}"))
    for name, bits, degree in (("FedShield's parameters", [60, 40, 40, 60], 8192), ("50, 50 bits", [50, 50], 4096)):
        peer = bytes_at(degree, bits)
        rows.append(
            (f"bytes at {name}, degree {degree}, which tell of the key", f"{peer:,}", f"{peer / plain:.1f} times")
        )
    rows += [(f"{step}: seconds", shown(times), "-") for step, times in took.items()]
    return rows


def once(
    clients: int, secret: Any, public: Any, precision: ckks.Precision, took: dict[str, list[float]]
) -> tuple[int, float]:
    """One round of updates with a mean of 5e-3 RMS: the bytes that a client sends, and the error of the mean."""
    rng, total, exact, sent = np.random.default_rng(clients), list[Any](), np.zeros(PARAMETERS), 0
    common = rng.standard_t(4, PARAMETERS) * 3.5e-3
    for number in range(clients):
        update = (common + rng.standard_t(4, PARAMETERS) * 2e-3).astype(np.float32)
        exact += update.astype(np.float64) / clients
        start = time.perf_counter()
        ciphertexts = list(ckks.encrypted(update, 1.0, BOUND, public, precision))
        sent = len(written(ciphertexts))
        between = time.perf_counter()
        total = ckks.add(total, ciphertexts, public, precision)
        if number:
            took.setdefault("a client encrypts", []).append(between - start)
            took.setdefault("the server adds one update", []).append(time.perf_counter() - between)
    start = time.perf_counter()
    mine = [ckks.read(one.serialize(), secret, precision) for one in total]
    found = ckks.opened(ckks.decrypted(mine), clients, BOUND, bytes(32), precision).mean
    took.setdefault("the client with the key opens the sum", []).append(time.perf_counter() - start)
    return sent, float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def bytes_at(degree: int, bits: list[int]) -> int:
    """What PARAMETERS numbers take at other parameters, by the ciphertext of a few of them."""
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=bits, n_threads=1)
    numbers = np.random.default_rng(0).normal(size=degree // 2) * 1e-3
    each = len(tenseal.ckks_vector(context, numbers.tolist(), scale=2.0**40).serialize())
    return each * -(-PARAMETERS // (degree // 2))
