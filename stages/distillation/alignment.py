"""What a teacher says in its own tokens, said in outcomes that a student of another vocabulary can be compared in.

Two vocabularies meet in bytes. An alignment gives each token of both an outcome, or "any other"; probabilities of
tokens with one outcome add up, so that a distribution stays one. A coarser partition can only lower a divergence, never
raise it (the data processing inequality).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from stages.artefacts.vocabulary_files import Kind, Vocabulary
from stages.distillation.nearest_tokens import nearest
from stages.runtime.events import Report, ignore

Method = Literal["exact", "min-edit", "leading"]
METHODS: tuple[Method, ...] = get_args(Method)
OTHER = -1
"""The outcome "any other"."""


@dataclass(frozen=True)
class Alignment:
    """The outcome of each token id of a teacher and of a student, int32 [rows]; OTHER where there is none."""

    method: Method
    teacher: np.ndarray
    student: np.ndarray


# --- the three methods


def exact(teacher: Vocabulary, student: Vocabulary, report: Report = ignore) -> Alignment:
    """An outcome for each token of the student, and that for the teacher's token of the same bytes."""
    del report
    return Alignment("exact", _same(teacher, student), np.arange(student.rows, dtype=np.int32))


def min_edit(teacher: Vocabulary, student: Vocabulary, report: Report = ignore) -> Alignment:
    """As exact; where the student has no such bytes, its nearest token by edit distance (MinED).

    Nothing beyond half of the teacher's bytes; of equally near ones the smallest bytes. The last pairs are kept: a
    simulation asks for each at both parties, and again for each seed.
    """
    pair = teacher.sha256, student.sha256
    if pair not in _NEAREST:
        if len(_NEAREST) == MOST_KEPT:
            del _NEAREST[next(iter(_NEAREST))]
        _NEAREST[pair] = _with_nearest(_same(teacher, student), teacher, student, report)
    return Alignment("min-edit", _NEAREST[pair].copy(), np.arange(student.rows, dtype=np.int32))


MOST_KEPT = 8
_NEAREST: dict[tuple[str, str], np.ndarray] = {}
"""What min_edit has found, by the sha256 of teacher and student, the oldest first."""


def _with_nearest(same: np.ndarray, teacher: Vocabulary, student: Vocabulary, report: Report) -> np.ndarray:
    missing = [place for token, place in teacher.ids.items() if same[place] == OTHER]
    targets = list(student.ids)
    found = nearest([teacher.tokens[place] for place in missing], targets, report)
    for place, target in zip(missing, found, strict=True):
        if target >= 0:
            same[place] = student.ids[targets[target]]
    return same


def leading(teacher: Vocabulary, student: Vocabulary, report: Report = ignore) -> Alignment:
    """An outcome for each token of the teacher; a student's token has that of its longest prefix that the teacher has.

    What the student says in one long token, the teacher begins with that prefix.
    """
    del report
    back = _same(student, teacher)
    longest = max(map(len, teacher.ids), default=0)
    for token, place in student.ids.items():
        if back[place] == OTHER:
            lengths = range(min(len(token), longest), 0, -1)
            back[place] = next((teacher.ids[token[:k]] for k in lengths if token[:k] in teacher.ids), OTHER)
    return Alignment("leading", np.arange(teacher.rows, dtype=np.int32), back)


MAPPINGS: Mapping[Method, Callable[[Vocabulary, Vocabulary, Report], Alignment]] = {
    "exact": exact,
    "min-edit": min_edit,
    "leading": leading,
}


def _same(source: Vocabulary, target: Vocabulary) -> np.ndarray:
    """The target's id for the same bytes, or the same role, of each id of the source; OTHER where there is none.

    A single byte of byte fallback is met by one, if there is one; a special token by one that is written alike.
    """
    found = np.full(source.rows, OTHER, np.int32)
    bytes_, special = _of_kind(target, Kind.BYTE), _of_kind(target, Kind.SPECIAL)
    for kind, ids in (
        (Kind.TEXT, target.ids),
        (Kind.BYTE, target.ids | bytes_),
        (Kind.SPECIAL, special),
    ):
        for token, place in _of_kind(source, kind).items():
            found[place] = ids.get(token, OTHER)
    for role in ("unk", "pad", "bos", "eos"):  # one token may have several: its last counts
        if role in source.roles and role in target.roles:
            found[source.roles[role]] = target.roles[role]
    return found


def _of_kind(vocabulary: Vocabulary, kind: Kind) -> dict[bytes, int]:
    """The ids of one kind that have bytes, by them; of several, the smallest."""
    places = np.flatnonzero(vocabulary.kinds == kind)[::-1].tolist()
    return {vocabulary.tokens[place]: place for place in places if vocabulary.tokens[place]}


# --- distributions


@dataclass(frozen=True)
class Mapped:
    """What a teacher says in outcomes, at each position.

    outcomes: int32 [positions, k], rising, those that are not there last and OTHER. log_probabilities: float32
    [positions, k + 1], in nats, minus infinity for those; last, that of "any other".
    """

    outcomes: np.ndarray
    log_probabilities: np.ndarray


def mapped(alignment: Alignment, tokens: np.ndarray, log_probabilities: np.ndarray) -> Mapped:
    """A teacher's k likeliest tokens in outcomes. The probabilities of one outcome add up.

    tokens: [positions, k]. log_probabilities: [positions, k + 1], the last that of all other tokens together; or
    [positions, k], where there are no others. Where each token has an outcome of its own, not a bit of them changes.
    """
    positions, k = tokens.shape
    last = np.iinfo(np.int32).max
    found = alignment.teacher[tokens].astype(np.int64)
    found[found == OTHER] = last
    chances = log_probabilities.astype(np.float64)
    if chances.shape[1] == k:
        chances = np.hstack([chances, np.full((positions, 1), -np.inf)])
    found = np.hstack([found, np.full((positions, 1), last)])
    order = np.argsort(found, axis=1, kind="stable")
    found, chances = np.take_along_axis(found, order, axis=1), np.take_along_axis(chances, order, axis=1)
    is_first = np.diff(found, axis=1, prepend=-1) > 0
    sums = np.logaddexp.reduceat(chances.ravel(), np.flatnonzero(is_first))
    outcomes = np.full((positions, k), OTHER, np.int32)
    added = np.full((positions, k + 1), -np.inf)
    rows, _ = np.nonzero(is_first)
    columns = (np.cumsum(is_first, axis=1) - 1)[is_first]
    is_other = found[is_first] == last
    columns[is_other] = k
    added[rows, columns] = sums
    outcomes[rows[~is_other], columns[~is_other]] = found[is_first][~is_other]
    return Mapped(outcomes, added.astype(np.float32))


# --- positions


def matching(teacher_ends: np.ndarray, student_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of positions at which both have read the same bytes of a text: of the teacher, and of the student.

    Ends: the bytes read before what each position predicts, never falling. Where several have read as many, such as a
    first token and a lone space before the first word, the last counts: it is the one that predicts text.
    """
    teacher, student = _last_of_each(teacher_ends), _last_of_each(student_ends)
    _, ours, theirs = np.intersect1d(
        teacher_ends[teacher], student_ends[student], assume_unique=True, return_indices=True
    )
    return teacher[ours], student[theirs]


def _last_of_each(ends: np.ndarray) -> np.ndarray:
    is_last = np.append(ends[1:] != ends[:-1], True)[: len(ends)]
    return np.flatnonzero(is_last)
