"""How good an alignment is for a pair: counted in the vocabularies, and measured on rows, without any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from stages.artefacts.manifest import Count, Sha256
from stages.artefacts.vocabulary_files import Kind, Vocabulary, vocabulary_bytes
from stages.data.examples import encode_row
from stages.data.rows import Row
from stages.distillation.alignment import METHODS, OTHER, Alignment, Method, matching
from stages.models.token_bytes import ends_of
from stages.runtime.events import Event, Report
from stages.workspace.settings import Role

FORMAT: Literal["fedcollm-alignment-report/1"] = "fedcollm-alignment-report/1"
USABLE = 0.5
"""The least share of answer positions at which a teacher should reach what the student predicts."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class VocabularyFigures(_Part):
    """One vocabulary. tokens: those that texts are made of; rows: with special tokens and padding."""

    rows: Count
    tokens: Count
    size_bytes: Count
    sha256: Sha256
    tokenizer_sha256: Sha256


class Measured(_Part):
    """What was counted on rows.

    left_out: rows that a tokenizer does not give back byte for byte. positions: of the student, that predict a token of
    an answer; matched: those at which the teacher has read the same bytes. agreeing: by method, matched positions at
    which the teacher's next token has the outcome of the student's next token.
    """

    rows: Count
    left_out: Count
    positions: Count
    matched: Count
    agreeing: dict[Method, Count]

    @property
    def coverage(self) -> float:
        """The share of positions that are matched."""
        return self.matched / self.positions if self.positions else 0.0

    def agreement(self, method: Method) -> float:
        """The share of matched positions that agree."""
        return self.agreeing[method] / self.matched if self.matched else 0.0

    @property
    def best(self) -> Method:
        """The method that agrees most often; of equal ones the plainest."""
        return max(METHODS, key=lambda method: self.agreeing[method])


class Direction(_Part):
    """One model taught by the other.

    exact: the teacher's tokens whose bytes are one of the student's; near: with those for which min-edit finds one.
    led: the student's tokens that are, or begin with, one of the teacher's. method: of the map that is written, and why
    that one.
    """

    teacher: Role
    student: Role
    exact: Count
    near: Count
    led: Count
    measured: Measured | None
    method: Method
    because: Literal["it measures best", "it was asked for", "it is the paper's, and there are no rows to measure on"]

    @property
    def usable(self) -> float | None:
        """The share of the student's positions at which the teacher reaches what it predicts; None if not measured."""
        found = self.measured
        return None if found is None else found.coverage * found.agreement(self.method)


class AlignmentReport(_Part):
    """All of it. rows_sha256: of the files of rows that were measured on. files: sha256 of what lies beside it."""

    format: Literal["fedcollm-alignment-report/1"]
    asked: Method | None
    rows_sha256: str
    vocabularies: dict[Role, VocabularyFigures]
    directions: list[Direction]
    files: dict[str, Sha256]

    def as_json(self) -> dict[str, Any]:
        """For JSON, with the shares that follow from the counts."""
        told = self.model_dump()
        for one, direction in zip(told["directions"], self.directions, strict=True):
            if (measured := direction.measured) is not None:
                agreement = {method: measured.agreement(method) for method in METHODS}
                one |= {"coverage": measured.coverage, "agreement": agreement, "usable": direction.usable}
        return told


class Read(NamedTuple):
    """A row as one model reads it: bytes read before each position that predicts a token of the answer, and it."""

    ends: np.ndarray
    following: np.ndarray


def is_text(vocabulary: Vocabulary) -> np.ndarray:
    """Which ids texts are made of, bool [rows]."""
    found: np.ndarray = (vocabulary.kinds == Kind.TEXT) | (vocabulary.kinds == Kind.BYTE)
    return found


def figures_of(vocabulary: Vocabulary) -> VocabularyFigures:
    """A vocabulary in figures."""
    return VocabularyFigures(
        rows=vocabulary.rows,
        tokens=int(is_text(vocabulary).sum()),
        size_bytes=len(vocabulary_bytes(vocabulary)),
        sha256=vocabulary.sha256,
        tokenizer_sha256=vocabulary.tokenizer_sha256,
    )


def read_by(vocabulary: Vocabulary, tokenizer: Any, rows: Sequence[Row], report: Report) -> list[Read | None]:
    """Each row as a model with this vocabulary reads it; None if its tokens do not make its text."""
    found: list[Read | None] = []
    for number, row in enumerate(rows, 1):
        text, example = row.prompt + (row.completion or ""), encode_row(row, tokenizer)
        ends = ends_of(vocabulary, example.input_ids, text)
        first = example.prompt_tokens
        found.append(None if ends is None else Read(ends[first - 1 : -1], np.array(example.input_ids[first:])))
        report(Event("step", "rows", step=number, total=len(rows)))
    return found


def measure(
    teacher: Sequence[Read | None], student: Sequence[Read | None], alignments: Mapping[Method, Alignment]
) -> Measured:
    """What the maps do at the rows' answer positions."""
    read = [(one, other) for one, other in zip(teacher, student, strict=True) if one is not None and other is not None]
    agreeing, matched = dict.fromkeys(alignments, 0), 0
    for one, other in read:
        ours, theirs = matching(one.ends, other.ends)
        matched += len(ours)
        for method, alignment in alignments.items():
            said = alignment.teacher[one.following[ours]]
            is_same = (said == alignment.student[other.following[theirs]]) & (said != OTHER)
            agreeing[method] += int(is_same.sum())
    return Measured(
        rows=len(read),
        left_out=len(teacher) - len(read),
        positions=sum(len(other.following) for _, other in read),
        matched=matched,
        agreeing=agreeing,
    )


def direction_of(
    roles: tuple[Role, Role],
    vocabularies: tuple[Vocabulary, Vocabulary],
    alignments: Mapping[Method, Alignment],
    measured: Measured | None,
    asked: Method | None,
) -> Direction:
    """The figures of one way, and which method's map is to be written. Pairs are teacher and student."""
    teacher, student = vocabularies
    if asked is not None:
        method, because = asked, "it was asked for"
    elif measured is not None and measured.matched:
        method, because = measured.best, "it measures best"
    else:
        method, because = "min-edit", "it is the paper's, and there are no rows to measure on"

    def reached(side: np.ndarray, vocabulary: Vocabulary) -> int:
        return int((is_text(vocabulary) & (side != OTHER)).sum())

    return Direction.model_validate(
        {
            "teacher": roles[0],
            "student": roles[1],
            "exact": reached(alignments["exact"].teacher, teacher),
            "near": reached(alignments["min-edit"].teacher, teacher),
            "led": reached(alignments["leading"].student, student),
            "measured": measured,
            "method": method,
            "because": because,
        }
    )
