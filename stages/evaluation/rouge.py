"""Rouge-L: how much of a text's words another has in the same order.

ROUGE-L of Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3.1, with beta 1: the
F-measure of the longest common subsequence of words. Words are in lower case, without punctuation and without stemming,
as in Google's rouge_score; here a word may be of any script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")


def rouge_l(expected: str, found: str) -> float:
    """The F-measure of two texts, 0 to 1; 0 where either has no word."""
    wanted, given = WORD.findall(expected.lower()), WORD.findall(found.lower())
    common = longest_common(wanted, given)
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence.

    By bits, a row of the usual table in one integer: Hyyro, "Bit-parallel LCS-length computation revisited" (2004).
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & whole
    return len(one) - row.bit_count()
