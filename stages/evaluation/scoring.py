"""Accuracy by lm-evaluation-harness: its tasks, prompts and metrics, on a model that is already in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask

from stages.artefacts.records import TaskScores
from stages.data.spacing import is_doubly_spaced
from stages.data.tasks import MISTAKES, mistaken
from stages.evaluation.asking import asking
from stages.evaluation.attack import attacked, with_robust
from stages.evaluation.harness import Harness
from stages.evaluation.prompting import ZERO_SHOT, Prompting
from stages.files import reading
from stages.models.perturbing import Ascent
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event, Report
from stages.runtime.processes import ALONE, Processes


def score(
    tuned: Tuned,
    tasks: Sequence[ConfigurableTask],
    *,
    with_adapter: bool,
    limit: int | None,
    batch_size: int,
    as_trained: bool = False,
    attack: Ascent | None = None,
    prompting: Prompting = ZERO_SHOT,
    processes: Processes = ALONE,
    shares: bool = True,
    report: Report,
) -> dict[str, TaskScores]:
    """Each task's metrics, number of questions, version and prompt, and which questions were right.

    with_adapter: score the base with its adapter, after proof that the adapter changes the logits; else the base alone.
    as_trained: compute as training does, with probabilities in float32; else all as the weights are held.
    attack: measure, too, how many questions are right under it. prompting: what stands before each question.
    processes: all get all the scores; each does its share of the work, unless shares is False.
    """
    ready = asking(
        tuned,
        with_adapter=with_adapter,
        batch_size=batch_size,
        as_trained=as_trained,
        processes=processes,
        shares=shares,
        report=report,
    )
    with ready as lm:
        try:
            prompting.check(lm, tasks, report)
            asked = {task.config.task: _asked(lm, task, prompting, limit, report) for task in tasks}
            under_attack = attacked(lm, tasks, report) if attack else {}  # before hours of scoring
            for task in tasks:  # they stand
                task.build_all_requests = lambda **_: None
            dealt = {"tasks": {task.config.task: task for task in tasks}}
            results = evaluate(lm=lm, task_dict=dealt, limit=limit, **prompting.arguments)
            assert results is not None
            found = {one.config.task: _of_task(one, results, *asked[one.config.task], report) for one in tasks}
            found = with_robust(lm, under_attack, found, attack, report) if attack else found
        except (TemplateError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise mistaken(", ".join(str(task.config.task) for task in tasks), error) from error
    return found


def _asked(
    lm: Harness, task: ConfigurableTask, prompting: Prompting, limit: int | None, report: Report
) -> tuple[int, str]:
    """How many questions are cut, told, and the digest of all that is asked: what the scores depend on."""
    try:
        prompting.build(lm, task, limit)
    except MISTAKES as error:
        raise mistaken(str(task.config.task), error) from error
    asked = [(one.doc_id, one.idx, one.args) for one in task.instances]
    cut, questions = len(lm.cut(task.instances)), len({one.doc_id for one in task.instances})
    if cut:
        words = f"{cut} of {questions} questions of {task.config.task} are longer than the model's context"
        report(Event("warning", f"{words} of {lm.max_length} tokens: scored without their beginning"))
    answered = (one for one in task.instances if one.request_type == "loglikelihood")
    doubled = {one.doc_id for one in answered if is_doubly_spaced(*one.args[:2])}
    if doubled:
        words = (
            f"{len(doubled)} of {questions} questions of {task.config.task} have two spaces or more before an answer"
        )
        report(Event("warning", f"{words}: one is in doc_to_text or the choices, another is target_delimiter"))
    return cut, reading.sha256(repr(asked).encode())


def _of_task(
    task: ConfigurableTask, results: dict[str, Any], cut: int, questions_sha256: str, report: Report
) -> TaskScores:
    name = task.config.task
    metrics = {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key
    }
    if not metrics:
        mend = "correct metric_list in its task file: acc, acc_norm, exact_match, ..."
        raise UsageProblem(f"task {name} gave no score: no metric that lm-eval knows, or no question", mend=mend)
    for key, value in metrics.items():
        if not math.isfinite(value):
            mend = "compute with --dtype float32; or leave that metric out of metric_list in its task file"
            raise BadNumbers(f"{key} of task {name} is {value}", mend=mend)
    measured = {key.partition(",")[0] for key in results["results"][name]}
    if absent := sorted(set(task._metric_fn_list) - measured):
        words = f"{name} asks for {', '.join(absent)}, which lm-eval does not measure of {task.OUTPUT_TYPE}"
        report(Event("warning", words))
    prompt = task.config.doc_to_text
    return {
        "metrics": metrics,
        "questions": results["n-samples"][name]["effective"],
        "questions_in_all": results["n-samples"][name]["original"],
        "questions_sha256": questions_sha256,
        "cut": cut,
        "correct": _correct(results["samples"][name]),
        "version": results["versions"].get(name),
        "prompt": prompt if isinstance(prompt, str) else "a function of the task",
        "num_fewshot": results["n-shot"].get(name, 0),
    }


def _correct(samples: list[dict[str, Any]]) -> dict[str, str]:
    """For each metric that is 0 or 1 for every question, the questions in their order: "0110" is two of four right.

    With them two models are compared question by question, which tells far more than two means.
    """
    values: dict[str, list[Any]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            values.setdefault(f"{metric}{suffix}", []).append(sample[metric])
    return {
        metric: "".join(str(int(value)) for value in found)
        for metric, found in values.items()
        if all(isinstance(value, int | float) and value in (0, 1) for value in found)
    }
