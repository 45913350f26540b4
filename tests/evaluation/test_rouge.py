"""rouge: Rouge-L is that of rouge_score on English, and counts words of any script."""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from builders import WORDS
from stages.evaluation.rouge import longest_common, rouge_l


def by_table(one: list[str], other: list[str]) -> int:
    """The longest common subsequence by the usual table."""
    rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        for j, another in enumerate(other, 1):
            rows[i][j] = rows[i - 1][j - 1] + 1 if word == another else max(rows[i - 1][j], rows[i][j - 1])
    return rows[-1][-1]


def test_the_longest_common_subsequence_is_that_of_the_usual_table() -> None:
    draw = random.Random(3)
    for _ in range(300):
        one, other = (draw.choices("abcd", k=draw.randrange(90)) for _ in range(2))
        assert longest_common(one, other) == by_table(one, other)


def test_the_f_measure_is_that_of_rouge_score() -> None:
    draw, scorer = random.Random(5), RougeScorer(["rougeL"])
    for _ in range(200):
        one, other = (" ".join(draw.choices([*WORDS, "Red,", "blue-green"], k=draw.randrange(1, 20))) for _ in range(2))
        assert rouge_l(one, other) == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)


@pytest.mark.parametrize(("one", "other", "found"), [("der Bär schläft", "der Bär wacht", 2 / 3), ("", "red", 0.0)])
def test_words_of_other_scripts_count_and_an_empty_text_has_none(one: str, other: str, found: float) -> None:
    assert rouge_l(one, other) == pytest.approx(found)
