"""Training one model on the public rows: their answers, and what others have told of them (Eq. 7 to 10 of FedMKT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.data.examples import Example
from stages.distillation.lessons import Lesson
from stages.models.packing import Batch
from stages.models.tuned import Tuned
from stages.training.cross_tokenizer_losses import mapped_distillation, sorted_distillation, span_distillation
from stages.training.losses import DIVERGENCES, cross_entropy
from stages.training.objective import TAUGHT, Objective, Tokens, task_loss
from stages.workspace.budgets import Distillation

TOLD = "told"
"""What the parts of a lesson are called in a batch, before the teacher's number and their own names."""


@dataclass(frozen=True)
class Pupil(Example):
    """A public row as its student reads it. row: which one it is, from 0."""

    row: int


class Learning(Objective):
    """A student's cross-entropy, and its divergence from each teacher where that is chosen. Its examples are Pupils.

    chosen: how much each lesson counts at each row, as lessons.chosen has it.
    """

    def __init__(
        self,
        student: Tuned,
        lessons: Sequence[Lesson],
        chosen: Sequence[np.ndarray],
        settings: Distillation,
        weights: Mapping[str, float],
    ) -> None:
        super().__init__([student], task_loss, weights)
        self._role, self._settings = student.role, settings
        self._lessons, self._chosen = lessons, chosen
        self._outcomes: dict[int, Tensor] = {}

    def collate(self, examples: Sequence[Example], step: Tokens | None = None) -> Batch:
        """A batch, with what each teacher says of it."""
        batch = super().collate(examples, step)
        pupils = [one for one in examples if isinstance(one, Pupil)]
        assert len(pupils) == len(examples), "only public rows can be taught"
        firsts = np.concatenate([[0], np.cumsum([one.answer_tokens for one in pupils])])
        for number, (lesson, shares) in enumerate(zip(self._lessons, self._chosen, strict=True)):
            rows = [(place, one.row) for place, one in enumerate(pupils) if shares[one.row] > 0]
            for name, part in _said(lesson, shares, rows, firsts).items():
                batch[f"{TOLD}{number}_{name}"] = torch.from_numpy(part)
        return batch

    def losses_of(self, logits: Mapping[str, Tensor], batch: Batch, tokens: Tokens) -> dict[str, Tensor]:
        """The named losses; what is told comes in the batch, beside the student's logits."""
        role, own = self._role, logits[self._role]
        taught, divergence = [own.new_zeros(())], own.new_zeros(())
        for number in range(len(self._lessons)):
            told = {name: batch[f"{TOLD}{number}_{name}"] for name in _NAMES if f"{TOLD}{number}_{name}" in batch}
            if len(told["places"]):
                term = self._divergence(number, own, {**told, "labels": batch["labels"]})
                divergence = divergence + term / tokens.distilled
                taught.append(told["shares"].sum() / tokens.distilled)
        return {
            f"{role}_ft": cross_entropy(own, batch["labels"], tokens.labelled),
            **({f"{role}_kd": divergence, f"{role}{TAUGHT}": torch.stack(taught).sum()} if self._lessons else {}),
        }

    def _divergence(self, number: int, own: Tensor, told: Batch) -> Tensor:
        """From one teacher, summed. own: the student's logits, [answers, vocabulary]; told: its part of a batch."""
        settings, lesson, said = self._settings, self._lessons[number], told["log_probabilities"]
        shared: dict[str, Any] = {"temperature": settings.temperature, "weights": told["shares"]}
        if lesson.kind == "spans":
            return span_distillation(
                own, told["labels"], told["spans"], said[:, 0], 1, divergence=DIVERGENCES["forward"], **shared
            )
        there = own[told["places"]]
        if lesson.kind == "sorted":
            return sorted_distillation(there, said, 1, **shared)
        return mapped_distillation(
            there,
            told["outcomes"],
            said,
            1,
            student_outcomes=self._outcomes_of(number, lesson, own.device),
            divergence=DIVERGENCES[settings.divergence],
            min_confidence=settings.min_confidence,
            confidence=told["confidence"],
            **shared,
        )

    def _outcomes_of(self, number: int, lesson: Lesson, device: torch.device) -> Tensor | None:
        """The outcome of each of the student's tokens, on its device; None where each is its own."""
        if lesson.student_outcomes is None:
            return None
        if number not in self._outcomes:
            self._outcomes[number] = torch.from_numpy(lesson.student_outcomes.astype(np.int64)).to(device)
        return self._outcomes[number]


_NAMES = ("places", "log_probabilities", "outcomes", "confidence", "shares", "spans")


def _said(
    lesson: Lesson, shares: np.ndarray, rows: Sequence[tuple[int, int]], firsts: np.ndarray
) -> dict[str, np.ndarray]:
    """A lesson's part of a batch. rows: the place in the batch, and the number, of each row that it teaches there.

    firsts: where the answers of each place begin among the batch's; last, how many there are.
    """
    starts, ends = lesson.starts[:-1], lesson.starts[1:]
    taken = np.concatenate([np.empty(0, np.int64), *(np.arange(starts[row], ends[row]) for _, row in rows)])
    counts = [int(ends[row] - starts[row]) for _, row in rows]
    first = np.repeat([firsts[place] for place, _ in rows], counts).astype(np.int64)
    places = first + lesson.places[taken]
    found = {
        "places": places,
        "log_probabilities": lesson.log_probabilities[taken],
        "confidence": lesson.confidence[taken],
        "shares": np.repeat([shares[row] for _, row in rows], counts).astype(np.float32),
    }
    if lesson.outcomes is not None:
        found["outcomes"] = lesson.outcomes[taken].astype(np.int64)
    if lesson.kind == "spans":
        found["spans"] = _spans(places, rows, firsts)
    return found


def _spans(places: np.ndarray, rows: Sequence[tuple[int, int]], firsts: np.ndarray) -> np.ndarray:
    """Which span each answer of a batch belongs to, -1 for one before its row's first, or of a row that is not taught.

    places: where the spans begin, rising. A row's last reaches to its end.
    """
    answers = np.arange(firsts[-1])
    found = np.searchsorted(places, answers, side="right") - 1
    begins = np.full(int(firsts[-1]), -1, np.int64)  # the first span of the row that an answer belongs to
    for place, _ in rows:
        inside = slice(int(firsts[place]), int(firsts[place + 1]))
        begins[inside] = np.searchsorted(places, firsts[place], side="left")
    spans: np.ndarray = np.where((begins >= 0) & (found >= begins), found, -1).astype(np.int64)
    return spans


def pupils(examples: Sequence[Example | None]) -> list[Pupil]:
    """The public rows that a model reads, each with its number."""
    return [Pupil(one.input_ids, one.prompt_tokens, row) for row, one in enumerate(examples) if one is not None]
