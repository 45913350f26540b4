"""scoring: which questions were right, one sign for each."""

from __future__ import annotations

from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

from stages.evaluation.scoring import _correct, _of_task
from stages.runtime.errors import BadNumbers
from stages.runtime.events import ignore


def sample(question: int, filter: str, **metrics: float) -> dict[str, object]:
    return {"doc_id": question, "filter": filter, "metrics": list(metrics), **metrics}


def test_a_task_with_two_filters_counts_no_question_twice() -> None:
    strict = [sample(i, "strict", exact_match=value) for i, value in enumerate([1.0, 0.0, 0.0])]
    lenient = [sample(i, "lenient", exact_match=value) for i, value in enumerate([1.0, 1.0, 0.0])]
    assert _correct([*lenient, *strict]) == {"exact_match,strict": "100", "exact_match,lenient": "110"}


def test_questions_stand_in_their_order_and_what_is_no_yes_or_no_is_left_out() -> None:
    answers = [(2, 1.0, 0.3), (0, 0.0, 1.0), (1, 1.0, 0.0)]
    assert _correct([sample(i, "none", acc=acc, f1=f1) for i, acc, f1 in answers]) == {"acc": "011"}


@pytest.mark.parametrize("value", [nan, inf])
def test_a_metric_that_is_no_number_is_no_result(value: float) -> None:
    task: Any = SimpleNamespace(config=SimpleNamespace(task="t"), _metric_fn_list={"ppl": None}, OUTPUT_TYPE="x")
    with pytest.raises(BadNumbers, match="ppl of task t is"):
        _of_task(task, {"results": {"t": {"ppl,none": value}}}, 0, "", ignore)
