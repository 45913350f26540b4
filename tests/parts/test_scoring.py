"""scoring: which questions were right, one sign for each."""

from __future__ import annotations

from stages.parts.scoring import _correct


def sample(question: int, filter: str, **metrics: float) -> dict[str, object]:
    return {"doc_id": question, "filter": filter, "metrics": list(metrics), **metrics}


def test_a_task_with_two_filters_counts_no_question_twice() -> None:
    strict = [sample(i, "strict", exact_match=value) for i, value in enumerate([1.0, 0.0, 0.0])]
    lenient = [sample(i, "lenient", exact_match=value) for i, value in enumerate([1.0, 1.0, 0.0])]
    assert _correct([*lenient, *strict]) == {"exact_match,strict": "100", "exact_match,lenient": "110"}


def test_questions_stand_in_their_order_and_what_is_no_yes_or_no_is_left_out() -> None:
    answers = [(2, 1.0, 0.3), (0, 0.0, 1.0), (1, 1.0, 0.0)]
    assert _correct([sample(i, "none", acc=acc, f1=f1) for i, acc, f1 in answers]) == {"acc": "011"}
