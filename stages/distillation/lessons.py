"""What one model teaches another of the public rows: what it has told, at the places where both have read the same.

A lesson is made before any model is loaded, from files alone. Which rows of it are taught is chosen by how well each
model knows them (DualMinCE, Algorithm 2 of FedMKT).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from stages.distillation.alignment import Alignment, mapped, matching
from stages.distillation.cuts import Cuts
from stages.distillation.knowledge import Knowledge

if TYPE_CHECKING:
    from stages.distillation.pairs import Pair

Kind = Literal["tokens", "sorted", "spans"]
"""What is compared: each token's probability, probabilities by rank, or how likely a piece of the answer is."""


@dataclass(frozen=True)
class Lesson:
    """One teacher's, for one student.

    starts: int64 [rows + 1], where each public row's places begin; of a row that is not taught there are none.
    places: int32 [n], which of the student's answer positions in its row; of a span, the first.
    log_probabilities: float32 [n, k + 1], of the outcomes and of "any other"; by rank; or [n, 1], of the whole span.
    outcomes: int32 [n, k], as alignment.Mapped has them; None where tokens do not matter.
    confidence: float32 [n], of the teacher's likeliest token; of a span, at its first.
    student_outcomes: int32 [vocabulary], the outcome of each of the student's tokens; None: each is its own.
    losses: float64 [rows], how well the teacher knows each row, in nats; NaN for one that it leaves out.
    """

    teacher: str
    kind: Kind
    starts: np.ndarray
    places: np.ndarray
    log_probabilities: np.ndarray
    outcomes: np.ndarray | None
    confidence: np.ndarray
    student_outcomes: np.ndarray | None
    losses: np.ndarray


def kind_of(divergence: str) -> Kind:
    """What distillation.divergence compares."""
    return {"sorted": "sorted", "spans": "spans"}.get(divergence, "tokens")  # type: ignore[return-value]


def lesson_of(teacher: str, knowledge: Knowledge, pair: Pair, kind: Kind) -> Lesson:
    """From what the other one of a pair has told."""
    theirs, starts, ours = _matched(pair.other.cuts, pair.own.cuts)
    outcomes, student_outcomes = None, None
    said = knowledge.log_probabilities[theirs]
    if kind == "tokens":
        found = mapped(pair.alignment, knowledge.tokens[theirs], said)
        outcomes, said, student_outcomes = found.outcomes, found.log_probabilities, _own(pair.alignment)
    elif kind == "sorted" and said.shape[1] == knowledge.tokens.shape[1]:
        said = np.hstack([said, np.full((len(said), 1), -np.inf, np.float32)])  # there are no other tokens
    elif kind == "spans":
        said = _of_spans(knowledge.chances, theirs, starts, pair.other.cuts)
    return Lesson(
        teacher=teacher,
        kind=kind,
        starts=starts,
        places=ours,
        log_probabilities=said,
        outcomes=outcomes,
        confidence=knowledge.confidence[theirs],
        student_outcomes=student_outcomes,
        losses=knowledge.losses,
    )


def _matched(teacher: Cuts, student: Cuts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The teacher's positions among all of its own, where each row's begin, and the student's places in their rows."""
    found, places, starts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [0]
    for row, first in enumerate(teacher.firsts[:-1].tolist()):
        theirs, ours = teacher.of_row(row), student.of_row(row)
        if len(theirs) and len(ours):
            one, other = matching(theirs, ours)
            found.append(first + one)
            places.append(other)
        starts.append(starts[-1] + (len(found[-1]) if len(theirs) and len(ours) else 0))
    return np.concatenate(found), np.array(starts, np.int64), np.concatenate(places).astype(np.int32)


def _own(alignment: Alignment) -> np.ndarray | None:
    """The outcomes of the student's tokens, None where each is its own."""
    is_own = (alignment.student == np.arange(len(alignment.student))).all()
    return None if is_own else alignment.student


def _of_spans(chances: np.ndarray, positions: np.ndarray, starts: np.ndarray, cuts: Cuts) -> np.ndarray:
    """The log-probability of each span: from one matched position up to the next, or to the end of the row: [n, 1]."""
    ends = np.append(positions[1:], 0)
    for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        if end > start:
            ends[end - 1] = cuts.firsts[row + 1]
    sums = np.concatenate([[0.0], np.cumsum(chances, dtype=np.float64)])
    found: np.ndarray = (sums[ends] - sums[positions]).astype(np.float32)
    return found[:, None]


# --- selection


Select = Literal["all", "min-ce", "none"]


def chosen(own: np.ndarray, told: Mapping[str, np.ndarray], select: Select) -> dict[str, np.ndarray]:
    """How much each teacher counts at each row: float32 [rows], by name; together 0 or 1.

    own: the student's losses, told: the teachers', float64 [rows] in nats, NaN for a row that one leaves out. min-ce:
    the one that knows the row best, and only if it knows it better than the student; of equal ones the first. all: each
    that has told it, alike. A row that the student leaves out is not taught.
    """
    losses = np.array([np.where(np.isnan(one), np.inf, one) for one in told.values()])
    shares = np.zeros_like(losses, np.float32)
    if select == "min-ce" and len(losses):
        best = losses.argmin(axis=0)
        better = losses.min(axis=0) < own  # never where own is NaN
        shares[best[better], np.flatnonzero(better)] = 1.0
    elif select == "all" and len(losses):
        has = np.isfinite(losses) & ~np.isnan(own)
        shares = (has / np.maximum(has.sum(axis=0), 1)).astype(np.float32)
    return dict(zip(told, shares, strict=True))
