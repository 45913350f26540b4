"""Updates as whole numbers modulo 2^32, in which sums are exact: one vector for an adapter, its weight and a count.

A value becomes rint(value * weight / bound), where weights are at most floor((2^31 - 1) / clients): no sum of clients
leaves the 32 bits. bound is `aggregation.max_update_value`, the largest value that an update may have.
"""

from __future__ import annotations

import math

import numpy as np

from stages.runtime.errors import BadNumbers, Damaged

CHUNK = 1 << 18
"""Values that are worked on at a time, in cache."""


def heaviest(clients: int) -> int:
    """The weight of a client with as many examples as the agreement allows; in uniform weighting, of every client."""
    return (2**31 - 1) // clients


def encode(
    update: np.ndarray,
    *,
    bound: float,
    clients: int,
    examples: int | None = None,
    largest_examples: int = 1 << 20,
) -> np.ndarray:
    """One client's update and weight, to be summed: uint32 [d+2], the values, the weight and a 1.

    update: float32 [d]. clients: how many the round has. examples: None gives the client the weight of every other,
    a number one in proportion to largest_examples, which rounds the more coarsely the further it is above the number:
    a step is bound / weight. Raises BadNumbers for values that are not finite or beyond the
    bound, which would otherwise be clipped in silence, and for examples out of range.
    """
    _check(update, bound)
    weight = _weight(clients, examples, largest_examples)
    encoded = np.empty(len(update) + 2, np.uint32)
    scaled = np.empty(min(CHUNK, len(update)), np.float64)
    for start in range(0, len(update), CHUNK):
        chunk = update[start : start + CHUNK]
        part = scaled[: len(chunk)]
        np.multiply(chunk, weight / bound, out=part, dtype=np.float64)
        np.rint(part, out=part)
        encoded[start : start + len(chunk)].view(np.int32)[:] = part
    encoded[-2:] = weight, 1
    return encoded


def decode(total: np.ndarray, *, bound: float, clients: int) -> tuple[np.ndarray, int, int]:
    """What a sum, uint32 [d+2], says: the weighted mean, float64 [d], the sum of weights, and of how many clients.

    Raises Damaged for a sum that no clients which keep to the bound can have made.
    """
    weight, count = int(total[-2]), int(total[-1])
    if not (1 <= count <= clients and count <= weight <= count * heaviest(clients)):
        raise Damaged(f"the sum says that {count} clients of {clients} weigh {weight}: a client broke the protocol")
    sums = total[:-2].view(np.int32)
    if len(sums) and max(int(sums.max()), -int(sums.min())) > weight:
        raise Damaged(f"the mean has values beyond {bound:g}, which no client may send: a client broke the protocol")
    return np.multiply(sums, bound / weight, dtype=np.float64), weight, count


def _check(update: np.ndarray, bound: float) -> None:
    largest = max(float(update.max()), -float(update.min())) if len(update) else 0.0
    if not math.isfinite(largest):
        mend = "lower the learning rate or set max_grad_norm, then train again with --overwrite"
        raise BadNumbers("the update holds NaN or infinity", mend=mend)
    if largest > bound:
        enough = 2.0 ** math.ceil(math.log2(largest))
        message = f"the update holds {largest:.4g}, aggregation.max_update_value allows {bound:g}"
        mend = (
            "lower the learning rate and train again with --overwrite; or all parties agree on "
            f"max_update_value = {enough:g} for the next federation"
        )
        raise BadNumbers(message, mend=mend)


def _weight(clients: int, examples: int | None, largest_examples: int) -> int:
    if examples is None:
        return heaviest(clients)
    if not 1 <= examples <= largest_examples:
        message = f"the client has {examples} examples, aggregation.max_examples allows 1 to {largest_examples}"
        raise BadNumbers(
            message, mend=f"all parties agree on max_examples = {max(examples, 1)} or more, or on fewer rows"
        )
    return round(examples / largest_examples * heaviest(clients))
