"""Updates as ciphertexts of CKKS, which add up, and what can be told of their sum without telling of the key.

Each ciphertext holds a 1 and some numbers of value * weight / bound, where weights are at most 1: in a sum the ones are
a count, and nothing in it is larger than the count. The first ciphertext begins with the weight.
CKKS opens a sum with noise that hangs on the secret key, and a few such sums tell the key to whoever has the
ciphertexts (Li and Micciancio, Eurocrypt 2021). So what is opened is told under Gaussian noise that drowns the other
(Li, Micciancio, Schultz and Sorrell, Crypto 2022), and is still far below what an update is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.accounting.noise import SecretRandom
from stages.artefacts.sizes import CIPHERTEXT_BYTES, ciphertexts_of
from stages.parties.encryption_keys import MODULUS_BITS, SLOTS, tenseal
from stages.runtime.errors import BadNumbers, Damaged

NOISE = 2.0**12
"""More than the root mean square of what one encryption adds to a slot, in units of 1 / scale: 2^10.5 as measured."""
DISTANCE = 2.0**-40
"""How far, in total variation, all that a federation tells is from what would tell nothing of the key."""
LARGEST_ERROR = 1e-5
"""Of a mean beside its values, both as root mean squares; what would be coarser is refused."""
TOLERANCE = 2.0**-10
"""How far from a whole number a count may be. A sound one is far nearer; what no key of ours made is anywhere."""


@dataclass(frozen=True)
class Precision:
    """What hangs on how many clients and rounds a federation has, and on how many numbers each sends in a round."""

    clients: int
    rounds: int
    numbers: int

    @property
    def scale(self) -> float:
        """What numbers are multiplied by to be whole: as large as the modulus takes for a sum of all clients."""
        return 2.0 ** (MODULUS_BITS - 2 - math.ceil(math.log2(self.clients)))

    @property
    def deviation(self) -> float:
        """Of the noise that a sum is told under, beside a count of 1.

        A number that is e off, told under noise of deviation s, is within e / (2 s) of the noise alone; here over all
        numbers of all rounds. That holds too for numbers that were rounded to float64 first, which moves one by a whole
        step as seldom as e is smaller than that.
        """
        told = self.rounds * ciphertexts_of(self.numbers) * SLOTS
        return NOISE * math.sqrt(self.clients) * told / (2 * DISTANCE) / self.scale


def check_fits(update: np.ndarray, weight: float, bound: float, precision: Precision) -> None:
    """Raise BadNumbers for values that are not finite or beyond the bound, or too small to be seen under the noise."""
    largest, size = (float(np.abs(update).max()), _size(update)) if len(update) else (0.0, 0.0)
    if not math.isfinite(largest):
        mend = "lower the learning rate or set max_grad_norm, then train again with --overwrite"
        raise BadNumbers("the update holds NaN or infinity", mend=mend)
    if largest > bound:
        message = f"the update holds {largest:.4g}, aggregation.max_update_value allows {bound:g}"
        enough = 2.0 ** math.ceil(math.log2(largest))
        mend = "lower the learning rate and train again with --overwrite; or all parties agree on "
        raise BadNumbers(message, mend=f"{mend}max_update_value = {enough:g} for the next federation")
    check_error(size, bound * precision.deviation / weight, "the update", bound)


def check_error(size: float, error: float, what: str, bound: float) -> None:
    """Raise BadNumbers where an error, a root mean square, is more than LARGEST_ERROR of a size, another."""
    if error <= LARGEST_ERROR * size:
        return
    message = f"{what} is of {size:.3g} as root mean square, and would be known but to {error:.3g}"
    mend = f"train for longer; or all parties agree on max_update_value below {bound:g}, or on max_examples nearer to "
    raise BadNumbers(f"{message}: more than {LARGEST_ERROR:g} of it", mend=f"{mend}what clients train on")


def encrypted(update: np.ndarray, weight: float, bound: float, key: Any, precision: Precision) -> Iterator[bytes]:
    """One client's update, float32 [d], as ciphertexts."""
    library = tenseal()
    numbers = np.concatenate([[1.0], update.astype(np.float64) / bound]) * weight
    for start in range(0, len(numbers), SLOTS - 1):
        slots = np.zeros(SLOTS)
        some = numbers[start : start + SLOTS - 1]
        slots[0], slots[1 : 1 + len(some)] = 1, some
        yield library.ckks_vector(key, slots.tolist(), scale=precision.scale).serialize()


def read(content: bytes, key: Any, precision: Precision) -> Any:
    """One ciphertext of another party. Raises Damaged unless it is one of our parameters and scale.

    SEAL looks at each word that it loads; under which key it was made cannot be seen.
    """
    if len(content) > CIPHERTEXT_BYTES:
        raise Damaged(f"a ciphertext has {len(content)} bytes, at most {CIPHERTEXT_BYTES} are expected")
    try:
        vector = tenseal().ckks_vector_from(key, content)
        sizes, inside = vector.shape, vector.ciphertext()
    except (ValueError, RuntimeError, TypeError, IndexError, MemoryError, OverflowError) as error:
        raise Damaged(f"not a ciphertext of this federation's parameters: {error}") from error
    expected = key.seal_context().data.first_parms_id(), 2, precision.scale
    if sizes != [SLOTS] or len(inside) != 1 or (inside[0].parms_id(), inside[0].size(), inside[0].scale) != expected:
        raise Damaged("a ciphertext of another shape, level or scale than this federation's")
    return vector


def add(total: list[Any], ciphertexts: Sequence[bytes], key: Any, precision: Precision) -> list[Any]:
    """The sum so far and one client's ciphertexts; the sum is empty at first. Raises as read does."""
    found = [read(one, key, precision) for one in ciphertexts]
    for mine, other in zip(total, found, strict=True) if total else ():
        mine.add_(other)
    return total or found


def same(total: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two sums are the same ciphertexts, word for word."""
    return len(total) == len(other) and all(a.serialize() == b.serialize() for a, b in zip(total, other, strict=True))


def decrypted(total: Sequence[Any]) -> np.ndarray:
    """What a sum holds, float64 [ciphertexts, SLOTS], for whoever has the secret key; to be told to nobody as it is."""
    return np.array([one.decrypt() for one in total])


@dataclass(frozen=True)
class Opened:
    """A weighted mean, float32 [d], as it may be told, and of how many clients it is."""

    mean: np.ndarray
    count: int


def opened(slots: np.ndarray, count: int, bound: float, seed: bytes, precision: Precision) -> Opened:
    """What may be told of a sum that was decrypted.

    count: of the clients that it is said to hold. seed: 32 secret bytes that noise comes from: the same for the same
    sum, or the mean of many answers would be without.
    Raises Damaged for a sum that no such clients can have made, BadNumbers for one that is too small.
    """
    noise = SecretRandom(seed).normal(slots.size).reshape(slots.shape)
    grid = precision.deviation / 16
    told = np.rint((slots + precision.deviation * noise) / grid) * grid
    counts, flat = told[:, 0], told[:, 1:].ravel()
    weight, sums = float(flat[0]), flat[1 : 1 + precision.numbers]
    if not np.isfinite(told).all() or np.abs(counts - count).max() > TOLERANCE:
        odd = next((number for number, one in enumerate(counts) if not abs(one - count) <= TOLERANCE), 0)
        message = f"the sum is not of {count} updates of this federation's key: its ciphertext {odd} counts "
        raise Damaged(f"{message}{counts[odd]:.6g}")
    if not TOLERANCE**2 < weight <= count + TOLERANCE:
        raise Damaged(f"the sum says that {count} clients weigh {weight:.6g}: a client broke the protocol")
    mean = sums * (bound / weight)
    if len(mean) and np.abs(mean).max() > bound * (1 + TOLERANCE):
        raise Damaged(f"the mean has values beyond {bound:g}, which no client may send: a client broke the protocol")
    check_error(_size(mean), bound * precision.deviation / weight, "the mean", bound)
    return Opened(mean.astype(np.float32), count)


def _size(values: np.ndarray) -> float:
    """The root mean square."""
    return math.sqrt(float(np.square(values, dtype=np.float64).mean())) if len(values) else 0.0
