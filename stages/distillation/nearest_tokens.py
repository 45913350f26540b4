"""For each token of one vocabulary, the one of another that is nearest by edit distance on bytes, exactly (MinED).

All pairs would be ten billion. Two facts save most of them, and lose none. An edit changes the number of ASCII
bytes in a token, and that of others, by one at most: so tokens with other counts are at least so far apart, and the
nearest counts are looked at first. And what is nearer than the counts of all that is left allow is final.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from stages.runtime.events import Event, Report, ignore

BLOCK = 1 << 24
"""How many distances are held at once, a byte each."""
LONGEST = 254
"""Bytes of a token that is compared: distances are bytes, and one more says "farther"."""


def nearest(queries: Sequence[bytes], targets: Sequence[bytes], report: Report = ignore) -> list[int]:
    """For each query, where among targets the nearest is, or -1: none is within half of the query's bytes.

    Of several, the smallest bytes. All are unequal among themselves. Memory: 16 MB beside the tokens and the answer.
    """
    order = sorted(range(len(targets)), key=lambda place: targets[place])
    ranked = [targets[place] for place in order]
    ranks = _by_counts(ranked)
    groups = _by_counts(queries)
    found = np.full(len(queries), -1, np.int64)
    done = 0
    for counts, places in groups.items():
        found[places] = _nearest_of_group([queries[place] for place in places], counts, ranked, ranks)
        done += len(places)
        report(Event("step", "nearest tokens", step=done, total=len(queries)))
    return [order[rank] if rank >= 0 else -1 for rank in found.tolist()]


Counts = tuple[int, int]
"""How many bytes of a token are ASCII, and how many are not."""


def _by_counts(tokens: Sequence[bytes]) -> dict[Counts, np.ndarray]:
    """The places of tokens, rising, by their counts; longer ones than are compared are left out."""
    found: dict[Counts, list[int]] = {}
    for place, token in enumerate(tokens):
        if len(token) <= LONGEST:
            plain = sum(byte < 128 for byte in token)
            found.setdefault((plain, len(token) - plain), []).append(place)
    return {counts: np.array(found[counts], np.int64) for counts in sorted(found)}


def _nearest_of_group(
    queries: Sequence[bytes], counts: Counts, ranked: Sequence[bytes], ranks: Mapping[Counts, np.ndarray]
) -> np.ndarray:
    """The ranks of the nearest to queries of equal counts, or -1."""
    limit = sum(counts) // 2
    by_distance: dict[int, list[np.ndarray]] = {}
    for others, those in ranks.items():
        changes = [other - own for other, own in zip(others, counts, strict=True)]
        least = max(sum(max(change, 0) for change in changes), sum(max(-change, 0) for change in changes))
        by_distance.setdefault(least, []).append(those)
    distances = np.full(len(queries), limit + 1, np.int64)
    best = np.full(len(queries), len(ranked), np.int64)
    for least in range(limit + 1):
        open_ones = np.flatnonzero(distances >= max(least, 1))
        if least not in by_distance or not len(open_ones):
            continue
        candidates = np.sort(np.concatenate(by_distance[least]))
        tokens = [ranked[rank] for rank in candidates.tolist()]
        step = max(BLOCK // len(tokens), 1)
        for start in range(0, len(open_ones), step):
            some = open_ones[start : start + step]
            cut = int(distances[some].max())
            asked = [queries[place] for place in some.tolist()]
            table = process.cdist(asked, tokens, scorer=Levenshtein.distance, score_cutoff=cut, dtype=np.uint8)
            first = table.argmin(axis=1)  # of equal ones the first, which has the smallest bytes
            lowest, there = table[np.arange(len(some)), first].astype(np.int64), candidates[first]
            is_better = (lowest < distances[some]) | ((lowest == distances[some]) & (there < best[some]))
            is_better &= lowest <= limit
            distances[some[is_better]], best[some[is_better]] = lowest[is_better], there[is_better]
    return np.where(distances <= limit, best, -1)
