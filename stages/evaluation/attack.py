"""Accuracy under attack: whether a multiple-choice question is answered right whatever was done to its prompt.

What is done is a change of the prompt's embeddings, the same for all of its answers, by gradient ascent on the margin:
how much likelier the best wrong answer is than the best right one. A question counts if the model is right without a
change and after every step. So this is never above the plain accuracy, and more steps only lower it. Nothing is drawn
at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from lm_eval.api.task import ConfigurableTask
from torch import Tensor

from stages.artefacts.records import ROBUST, TaskScores
from stages.data.tasks import right_choices
from stages.evaluation import branches
from stages.evaluation.branches import Question
from stages.evaluation.harness import Harness
from stages.models import adapters
from stages.models.perturbing import Ascent, Perturbation
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event, Report


@dataclass(frozen=True)
class Asked:
    """A question with all its choices as answers, and which of them are right. number: in its task, from 1."""

    number: int
    question: Question
    right: Sequence[int]


def attacked(lm: Harness, tasks: Sequence[ConfigurableTask], report: Report) -> dict[str, list[Asked]]:
    """The questions of each task that can be attacked; their requests have been built.

    Raises UsageProblem where no task is multiple choice, and for what cannot be attacked.
    """
    chosen = [task for task in tasks if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input]
    for task in tasks:
        if task not in chosen:
            report(Event("warning", f"{task.config.task} is not of one prompt and several answers: no attack"))
    if not chosen:
        raise UsageProblem("nothing to attack: no task is multiple choice", mend="leave out the attack: --attack 0")
    return {str(task.config.task): _asked(lm, task) for task in chosen}


def with_robust(
    lm: Harness, asked: Mapping[str, Sequence[Asked]], scores: Mapping[str, TaskScores], ascent: Ascent, report: Report
) -> dict[str, TaskScores]:
    """The scores of tasks, with what those whose questions are attacked have under attack beside, as ROBUST."""
    found = dict(scores)
    for name, those in asked.items():
        report(Event("note", f"{name} under attack: {ascent.steps} steps, radius {ascent.radius:g}"))
        one, kept = scores[name], _shared(lm, those, ascent, name)
        plain = one["correct"].get("acc", "1" * len(kept))  # other batches may round a near tie otherwise
        kept = [is_kept and sign == "1" for is_kept, sign in zip(kept, plain, strict=True)]
        signs = "".join(str(int(is_kept)) for is_kept in kept)
        error = {f"{ROBUST}_stderr": stdev(kept) / len(kept) ** 0.5} if len(kept) > 1 else {}
        metrics = {**one["metrics"], ROBUST: fmean(kept), **error}
        found[name] = {**one, "metrics": metrics, "correct": {**one["correct"], ROBUST: signs}}
    return found


def _asked(lm: Harness, task: ConfigurableTask) -> list[Asked]:
    """The questions of a task in their order, as they were scored. Raises UsageProblem for one that has no such row."""
    by_question: dict[int, dict[int, Any]] = {}
    for one in task.instances:
        by_question.setdefault(one.doc_id, {})[one.idx] = one
    found = []
    for number, (_, instances) in enumerate(sorted(by_question.items()), 1):
        doc = instances[0].doc
        choices = range(len(task.doc_to_choice(doc)))  # acc_mutual_info asks each of them without its prompt, too
        pairs = [lm.encoded(*instances[choice].args[:2]) for choice in choices]
        question = Question(tuple(pairs[0][0]), [answer for _, answer in pairs], list(choices))
        where = f"question {number} of task {task.config.task}"
        if any(prompt != pairs[0][0] for prompt, _ in pairs):
            message = f"{where} has a prompt whose tokens hang on the answer: one change cannot be made for all"
            raise UsageProblem(message, mend="begin each choice with a space, or leave out the attack: --attack 0")
        if question.tokens > lm.room:
            reads = f"this model reads {lm.room} at most" if lm.room else "this model takes no answers side by side"
            message = f"{where} is {question.tokens} tokens long with all its answers in one row; {reads}"
            raise UsageProblem(message, mend="leave out the attack: --attack 0, or that task")
        found.append(Asked(number, question, right_choices(task, doc, number)))
    return found


def _shared(lm: Harness, asked: Sequence[Asked], ascent: Ascent, name: str) -> list[bool]:
    """Of each question whether it was right all the time; each process attacks its share."""
    count, rank = (lm.processes.count, lm.processes.rank) if lm.shares else (1, 0)
    own = withstood(lm, asked[rank::count], ascent, name)
    if count == 1:
        return own
    kept = [False] * len(asked)
    for share, those in enumerate(lm.processes.gather(own)):
        kept[share::count] = those
    return kept


def withstood(lm: Harness, asked: Sequence[Asked], ascent: Ascent, name: str) -> list[bool]:
    """Of each question whether it was right without a change and after each step."""
    places = {id(one.question): place for place, one in enumerate(asked)}
    kept, done = [False] * len(asked), 0
    for questions in branches.batches([one.question for one in asked], lm.batch_size):
        batch = [asked[places[id(question)]] for question in questions]
        for one, is_kept in zip(batch, _of_batch(lm, batch, ascent, name), strict=True):
            kept[places[id(one.question)]] = is_kept
        done += len(batch)
        lm.report(Event("step", "attacking", step=done, total=len(asked)))
    return kept


def _of_batch(lm: Harness, asked: Sequence[Asked], ascent: Ascent, name: str) -> list[bool]:
    questions = [one.question for one in asked]
    batch = branches.batch_of(questions, packs=lm.packs)
    perturbation = Perturbation(lm.model, ascent, batch.prompt.to(lm.model.device))
    kept = [True] * len(asked)
    for step in range(ascent.steps + 1):
        goes_on = step < ascent.steps
        with torch.set_grad_enabled(goes_on), perturbation.applied():
            each = branches.of_each(lm.model, questions, batch, softmax_dtype=lm.softmax_dtype)
        for place, (one, found) in enumerate(zip(asked, each, strict=True)):
            kept[place] &= _first_of_best(found[0].tolist()) in one.right
        margins = torch.stack([_margin(found[0], one.right) for one, found in zip(asked, each, strict=True)])
        for one, margin in zip(asked, margins.tolist(), strict=True):
            if margin != margin:
                message = f"question {one.number} of task {name}: an answer's likelihood is NaN under attack"
                raise BadNumbers(message, mend=adapters.NO_SETTING_OF_TRAINING)
        if goes_on and margins.requires_grad and perturbation.change is not None:
            (gradient,) = torch.autograd.grad(margins.sum(), perturbation.change)
            perturbation.ascend(gradient)
    return kept


def _margin(likelihoods: Tensor, right: Iterable[int]) -> Tensor:
    """By how many nats the best wrong answer is ahead of the best right one; 0 where all are right. Of [answers]."""
    is_right = torch.zeros_like(likelihoods, dtype=torch.bool)
    is_right[list(right)] = True
    if bool(is_right.all()):
        return likelihoods.sum() * 0
    return likelihoods[~is_right].max() - likelihoods[is_right].max()


def _first_of_best(values: Sequence[float]) -> int:
    """As lm-eval chooses."""
    return max(range(len(values)), key=values.__getitem__)
