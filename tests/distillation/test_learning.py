"""Lessons and learning: what a teacher of another tokenizer, or of the same, teaches, against what is known already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders import examples, tuned
from stages.artefacts.manifest import BaseIdentity
from stages.artefacts.vocabulary_files import Kind, Vocabulary
from stages.distillation import captures, top_k_logits
from stages.distillation.alignment import Alignment, exact
from stages.distillation.cuts import Cuts
from stages.distillation.knowledge import Knowledge, Told, knowledge_of
from stages.distillation.learning import Learning, pupils
from stages.distillation.lessons import Lesson, chosen, lesson_of
from stages.distillation.pairs import Pair, Voice
from stages.distillation.top_k_logits import Captured, Source
from stages.models.tuned import Tuned
from stages.training.losses import row_losses
from stages.training.objective import Objective, task_loss
from stages.workspace.budgets import Distillation

VOCABULARY, K = 40, 12
ROWS = examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6), (4, 3)], vocabulary=VOCABULARY)
WEIGHTS = {"slm_ft": 1.0, "slm_kd": 1.0, "slm_taught": 0.0}
BASE = BaseIdentity(architecture="gpt2", weights_sha256="a" * 64, tokenizer_sha256="b" * 64)


@pytest.fixture(scope="module")
def student() -> Tuned:
    return tuned("slm", width=16)


@pytest.fixture(scope="module")
def teacher() -> Tuned:
    return tuned("llm", width=32, family="llama")


def vocabulary(order: np.ndarray | None = None) -> Vocabulary:
    """40 tokens of one byte each; order: the byte of each id."""
    order = np.arange(VOCABULARY) if order is None else order
    return Vocabulary.of([(Kind.TEXT, bytes([65 + place])) for place in order.tolist()], {}, "c" * 64)


def cuts(positions: list[int], ends: list[list[int]]) -> Cuts:
    return Cuts("d" * 64, "e" * 64, np.array(positions, np.int32), np.concatenate(ends).astype(np.int32))


def byte_by_byte() -> Cuts:
    """Each token is a byte: at each of an answer's positions one more has been read."""
    ends = [list(range(one.prompt_tokens, len(one.input_ids))) for one in ROWS]
    return cuts([one.answer_tokens for one in ROWS], ends)


def pair(own: Cuts, other: Cuts, alignment: Alignment, order: np.ndarray | None = None) -> Pair:
    voices = Voice(vocabulary(), own, BASE, "f" * 64), Voice(vocabulary(order), other, BASE, "f" * 64)
    return Pair(*voices, alignment, report=None)  # type: ignore[arg-type]


def said(model: Tuned, folder: Path, k: int = K) -> Captured:
    return captures.capture(
        model,
        ROWS,
        Source("d" * 64, top_k_logits.rows_sha256(ROWS), 1.0, VOCABULARY, k),
        rows=3,
        every=9,
        folder=folder,
        inputs={},
        also=("losses", "chances"),
        report=lambda event: None,
    )


def knows(found: Captured, known: Cuts) -> Knowledge:
    source = found.source
    return knowledge_of(found, known, Told(source.data_sha256, "e" * 64, 1.0, VOCABULARY, source.top_k))


def gradient(objective: Objective, rows: Any) -> tuple[Tensor, dict[str, float]]:
    objective.zero_grad()
    objective(**objective.collate(rows))["loss"].backward()
    found = torch.cat([parameter.grad.flatten() for parameter in objective.adapter_parameters("slm")])
    return found, objective.pop_losses()


def learned(
    student: Tuned, lessons: list[Lesson], shares: list[np.ndarray], **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    learning = Learning(student, lessons, shares, Distillation(steps=1, **settings), WEIGHTS)
    return gradient(learning, pupils(ROWS))


EVERY = np.ones(len(ROWS), np.float32)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize("k", [K, VOCABULARY])
def test_of_equal_tokenizers_the_gradient_is_that_of_a_capture_to_the_bit(
    divergence: Any, k: int, student: Tuned, teacher: Tuned, tmp_path: Path
) -> None:
    found, known = said(teacher, tmp_path, k), byte_by_byte()
    settings = Distillation(steps=1, divergence=divergence)
    captured = captures.TaughtObjective(student, found, settings, WEIGHTS)
    expected, losses = gradient(captured, captures.taught(ROWS, found))
    lesson = lesson_of("server", knows(found, known), pair(known, known, exact(vocabulary(), vocabulary())), "tokens")
    got, of = learned(student, [lesson], [EVERY], divergence=divergence)
    assert (of["slm_kd"], of["slm_ft"]) == (losses["slm_kd"], losses["slm_ft"])
    assert torch.equal(got, expected)


def test_so_it_is_of_the_same_tokenizer_with_permuted_ids(student: Tuned, teacher: Tuned, tmp_path: Path) -> None:
    found, known = said(teacher, tmp_path), byte_by_byte()
    order = np.random.default_rng(1).permutation(VOCABULARY)  # the byte of each of the teacher's ids
    new_ids = np.argsort(order)[found.tokens]
    places = np.argsort(new_ids, axis=1)
    tail = found.log_probabilities[:, K:]
    chances = np.hstack([np.take_along_axis(found.log_probabilities[:, :K], places, axis=1), tail])
    permuted = replace(knows(found, known), tokens=np.sort(new_ids, axis=1).astype(np.int32), log_probabilities=chances)
    plain = lesson_of("server", knows(found, known), pair(known, known, exact(vocabulary(), vocabulary())), "tokens")
    there = vocabulary(order)
    mapped = lesson_of("server", permuted, pair(known, known, exact(there, vocabulary()), order), "tokens")
    expected, losses = learned(student, [plain], [EVERY])
    got, of = learned(student, [mapped], [EVERY])
    assert of == losses
    assert torch.equal(got, expected)


def test_where_nobody_knows_better_the_gradient_is_that_of_cross_entropy_to_the_bit(
    student: Tuned, teacher: Tuned, tmp_path: Path
) -> None:
    found, known = said(teacher, tmp_path), byte_by_byte()
    lesson = lesson_of("server", knows(found, known), pair(known, known, exact(vocabulary(), vocabulary())), "tokens")
    own = lesson.losses.copy()  # equally well: a tie is one's own
    shares = chosen(own, {"server": lesson.losses}, "min-ce")["server"]
    expected, losses = gradient(Objective([student], task_loss, WEIGHTS), ROWS)
    got, of = learned(student, [lesson], [shares])
    assert torch.equal(got, expected)
    assert of == {"slm_ft": losses["slm_ft"], "slm_kd": 0.0, "slm_taught": 0.0}


@pytest.mark.parametrize("kind", ["tokens", "sorted", "spans"])
def test_rows_that_are_not_chosen_count_zero_and_the_rest_is_divided_by_all_positions(
    kind: Any, student: Tuned, teacher: Tuned, tmp_path: Path
) -> None:
    found, known = said(teacher, tmp_path), byte_by_byte()
    lesson = lesson_of("server", knows(found, known), pair(known, known, exact(vocabulary(), vocabulary())), kind)
    divergence = {"tokens": "forward"}.get(kind, kind)
    whole = learned(student, [lesson], [EVERY], divergence=divergence)[1]["slm_kd"]
    parts = []
    for row in range(len(ROWS)):
        alone = np.zeros(len(ROWS), np.float32)
        alone[row] = 1.0
        losses = learned(student, [lesson], [alone], divergence=divergence)[1]
        parts.append(losses["slm_kd"])
        assert losses["slm_taught"] == pytest.approx(ROWS[row].answer_tokens / 17)
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    assert min(parts) > 0


def test_two_teachers_of_a_row_count_half_each(student: Tuned, teacher: Tuned, tmp_path: Path) -> None:
    known, maps = byte_by_byte(), exact(vocabulary(), vocabulary())
    told = {"a": said(teacher, tmp_path / "a"), "b": said(tuned("llm", width=32, family="gpt2"), tmp_path / "b")}
    lessons = [lesson_of(name, knows(one, known), pair(known, known, maps), "tokens") for name, one in told.items()]
    each = [learned(student, [lesson], [EVERY])[1]["slm_kd"] for lesson in lessons]
    both = learned(student, lessons, [EVERY / 2, EVERY / 2])[1]
    assert both["slm_kd"] == pytest.approx(sum(each) / 2, rel=1e-6)
    assert both["slm_taught"] == pytest.approx(1.0)


def test_only_where_both_have_read_the_same_is_anything_taught(student: Tuned, teacher: Tuned, tmp_path: Path) -> None:
    """A teacher that reads two bytes at a time meets the student at every second byte; elsewhere nothing is made up."""
    found, own = said(teacher, tmp_path), byte_by_byte()
    ends = [
        [first, *(end + 1 for end in one[1:])]
        for one in (own.of_row(row).tolist() for row in range(6))
        for first in one[:1]
    ]
    other = cuts(own.positions.tolist(), ends)
    lesson = lesson_of("server", knows(found, other), pair(own, other, exact(vocabulary(), vocabulary())), "tokens")
    firsts = np.diff(lesson.starts)
    for row in range(6):
        meets = set(own.of_row(row).tolist()) & set(other.of_row(row).tolist())
        assert firsts[row] == len(meets)
        places = lesson.places[lesson.starts[row] : lesson.starts[row + 1]]
        assert {int(own.of_row(row)[place]) for place in places} == meets
    losses = learned(student, [lesson], [EVERY])[1]
    assert losses["slm_taught"] == pytest.approx(len(lesson.places) / 17)


def test_a_span_is_as_likely_as_its_tokens_together(teacher: Tuned, student: Tuned, tmp_path: Path) -> None:
    found, own = said(teacher, tmp_path), byte_by_byte()
    sparse = [one[:1] for one in (own.of_row(row).tolist() for row in range(6))]
    student_cuts = cuts([1] * 6, sparse)
    lesson = lesson_of("server", knows(found, own), pair(student_cuts, own, exact(vocabulary(), vocabulary())), "spans")
    assert found.losses is not None
    assert lesson.log_probabilities[:, 0] == pytest.approx(-found.losses, rel=1e-5)
    learning = Learning(student, [lesson], [EVERY], Distillation(steps=1, divergence="spans"), WEIGHTS)
    batch = learning.collate(pupils(ROWS))
    assert batch["told0_spans"].tolist() == np.repeat(np.arange(6), [one.answer_tokens for one in ROWS]).tolist()


def test_how_well_a_row_is_known_hangs_neither_on_its_prompt_nor_on_how_it_is_cut() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, VOCABULARY, generator=generator)
    targets = torch.randint(VOCABULARY, (6,), generator=generator)
    whole = row_losses(logits, targets, torch.zeros(6, dtype=torch.int64))
    halves = row_losses(logits, targets, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert float(whole[0]) == pytest.approx(float(halves.sum()), abs=1e-12)  # a sum, never a mean
