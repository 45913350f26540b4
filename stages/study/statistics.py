"""What scores say and what they do not: means over seeds, paired differences, and how far both can be trusted.

Scores are arrays [seeds, questions] of 0 and 1 (or, for the mean of several clients' models, of shares in between).
Two things make a score an accident: the seed (split, initial adapters, data order) and the questions that happen to be
in the test set. Both are estimated, and a difference counts only beyond the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.special import ndtri, stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """An accuracy in [0, 1]: its mean over seeds, their standard deviation, the questions' binomial standard error.

    deviation is None where there is one seed.
    """

    mean: float
    deviation: float | None
    binomial: float


@dataclass(frozen=True)
class Difference:
    """A paired difference of two accuracies: same seeds, same questions.

    seeds_error, questions_error: standard errors over each; half_width: of the 95 % interval that holds both, with
    Student's t for the seeds. None where one seed, or one question, leaves it unknown; then nothing is supported.
    is_supported: whether the error bars leave no doubt of its sign.
    """

    mean: float
    seeds_error: float | None
    questions_error: float | None
    half_width: float | None
    is_supported: bool


def estimate(scores: np.ndarray) -> Estimate:
    """The accuracy of one model. scores: [seeds, questions]."""
    seeds, questions = scores.shape
    mean = float(scores.mean())
    deviation = float(scores.mean(axis=1).std(ddof=1)) if seeds > 1 else None
    return Estimate(mean, deviation, sqrt(mean * (1 - mean) / questions))


def difference(scores: np.ndarray, others: np.ndarray) -> Difference:
    """The first minus the second. Both [seeds, questions]: the same seeds and the same questions, in the same order.

    A single row stands for every seed. The variances over seeds and over questions are added. That counts what is
    common to both twice, so the interval is rather too wide than too narrow.
    """
    each = scores - others
    seeds, questions = each.shape
    mean = float(each.mean())
    seeds_error = float(each.mean(axis=1).std(ddof=1) / sqrt(seeds)) if seeds > 1 else None
    questions_error = float(each.mean(axis=0).std(ddof=1) / sqrt(questions)) if questions > 1 else None
    half_width = None
    if seeds_error is not None and questions_error is not None:
        tail = (1 + CONFIDENCE) / 2
        half_width = float(sqrt((stdtrit(seeds - 1, tail) * seeds_error) ** 2 + (ndtri(tail) * questions_error) ** 2))
    is_supported = half_width is not None and abs(mean) > half_width
    return Difference(mean, seeds_error, questions_error, half_width, is_supported)
