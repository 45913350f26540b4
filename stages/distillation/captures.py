"""Co-distillation in two phases: a teacher is captured once, without its student; a student learns from the capture.

Only one of the two models is in memory at any time. What it costs: the teacher stands still for the whole round, where
in one phase both move together step by step; and only its k likeliest tokens are known one by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.artefacts import checkpoints
from stages.data.examples import Example
from stages.distillation import top_k_logits
from stages.distillation.top_k_logits import Captured, Source
from stages.files import reading, writing
from stages.models.devices import naming_memory_knobs
from stages.models.held import held_in_bfloat16
from stages.models.packing import ROWS, Batch, answer_logits, collate
from stages.models.tuned import Tuned
from stages.runtime.errors import Damaged, UsageProblem
from stages.runtime.events import Event, Report
from stages.training.losses import (
    DIVERGENCES,
    TopK,
    by_row,
    captured_distillation,
    cross_entropy,
    knows_better,
    label_losses,
    row_losses,
    top_k,
)
from stages.training.micro_batch import rows_that_fit
from stages.training.objective import TAUGHT, Losses, Objective, Tokens
from stages.workspace.budgets import Distillation

TOLD = "taught_"
"""What the parts of a TopK are called in a batch, before their own names."""


# --- capture


def capture(
    teacher: Tuned,
    examples: Sequence[Example],
    source: Source,
    *,
    rows: int,
    finds_rows: bool = False,
    every: int,
    folder: Path,
    inputs: Mapping[str, Any],
    also: tuple[str, ...] = (),
    overwrite: bool = False,
    report: Report,
) -> Captured:
    """What the teacher says at every distilled position, without dropout, so many rows at a time.

    Of each batch only the k likeliest tokens are kept. Every so many batches what there is goes to the folder, and a
    run with equal inputs that was stopped goes on from there; the caller removes it. finds_rows: whether to try how
    many rows fit, and take fewer if not all do. also: further parts of Captured that are wanted: losses, chances.
    """
    total = sum(example.distilled_positions for example in examples)
    largest = top_k_logits.largest_bytes(len(examples), total, min(source.top_k, source.vocabulary))
    over = largest - reading.LARGEST_ADAPTER_BYTES
    if over > 0:
        fits = max(min(source.top_k, source.vocabulary) + -over // (8 * total), 1)
        message = f"a capture of {total} positions with --top-k {source.top_k} would have {largest} bytes"
        raise UsageProblem(message, mend=f"give --top-k {fits} or less")
    if finds_rows:
        once = partial(_said, teacher, source=source, also=also, report=lambda _: None)
        rows = rows_that_fit(lambda some: once([some]), examples, rows, report=report)
    wanted = reading.json_bytes({**inputs, "rows": rows})
    if overwrite or not checkpoints.is_of(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        writing.write(folder / checkpoints.INPUTS, wanted)
    batches = [examples[start : start + rows] for start in range(0, len(examples), rows)]
    parts = []
    with naming_memory_knobs(), held_in_bfloat16(teacher):
        for start in range(0, len(batches), every):
            some = batches[start : start + every]
            place = folder / f"batches-{start}.safetensors"
            if not place.exists():
                part = _said(teacher, some, source, also=also, report=partial(_tell, report, start, len(batches)))
                top_k_logits.check(part, f"what the {teacher.role.upper()} says")
                writing.write(place, top_k_logits.capture_bytes(part))
            content = reading.read(place, limit_bytes=reading.LARGEST_ADAPTER_BYTES)
            parts.append(top_k_logits.parse_capture(content, place))
    names = ["positions", "tokens", "log_probabilities", "confidence", *also]
    return Captured(source, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@torch.no_grad()
def _said(
    teacher: Tuned, batches: Sequence[Sequence[Example]], source: Source, *, also: tuple[str, ...], report: Any
) -> Captured:
    """The capture of some batches."""
    was_training = teacher.model.training
    teacher.model.eval()
    found, each = [], []
    for number, batch in enumerate(batches):
        device = teacher.model.device
        tensors = collate(batch, longest_packed=teacher.longest_packed, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=teacher.autocast):
            logits = answer_logits(teacher.model, {name: tensor.to(device) for name, tensor in tensors.items()})
        short = top_k(logits[..., : source.vocabulary], source.top_k, temperature=source.temperature)
        found.append([part.cpu().numpy() for part in short])
        if also:
            of_labels = label_losses(logits, tensors["labels"].to(device))
            each.append((by_row(of_labels, tensors[ROWS].to(device)).cpu().numpy(), -of_labels.cpu().numpy()))
        report(number)
    teacher.model.train(was_training)
    positions = [example.distilled_positions for batch in batches for example in batch]
    tokens, log_probabilities, confidence = (np.concatenate(parts) for parts in zip(*found, strict=True))
    said = np.array(positions, np.int32), tokens.astype(np.int32), log_probabilities, confidence
    further = dict(zip(("losses", "chances"), map(np.concatenate, zip(*each, strict=True)), strict=False))
    return Captured(source, *said, **{name: further[name] for name in also})


def _tell(report: Report, before: int, total: int, number: int) -> None:
    report(Event("step", "capturing", step=before + number + 1, total=total))


# --- train


@dataclass(frozen=True)
class Taught(Example):
    """A row with a captured teacher: which of the capture's rows it is, and where what is said of it begins there."""

    row: int
    first: int


class TaughtObjective(Objective):
    """One half of Eq. 6: a student's cross-entropy, and its divergence from a teacher that was captured.

    Its examples are those of `taught`.
    """

    def __init__(self, student: Tuned, captured: Captured, settings: Distillation, weights: Mapping[str, float]):
        if settings.select == "min-ce" and captured.losses is None:
            raise Damaged("the capture does not say how well its model knows each row", mend=top_k_logits.AGAIN)
        super().__init__([student], taught_losses(student.role, settings, captured.source.vocabulary), weights)
        self._captured = captured

    def collate(self, examples: Sequence[Example], step: Tokens | None = None) -> Batch:
        """A batch, with what the teacher says of it."""
        places = np.concatenate([np.arange(one.first, one.first + one.distilled_positions) for one in _all(examples)])
        found = self._captured
        short = TopK(
            torch.from_numpy(found.tokens[places].astype(np.int64)),
            torch.from_numpy(found.log_probabilities[places]),
            torch.from_numpy(found.confidence[places]),
        )
        batch = super().collate(examples, step) | as_batch(short)
        if found.losses is not None:
            batch[KNOWN] = torch.from_numpy(found.losses[[one.row for one in _all(examples)]])
        return batch

    def losses_of(self, logits: Mapping[str, Tensor], batch: Batch, tokens: Tokens) -> dict[str, Tensor]:
        """Every named loss; the teacher comes in the batch, beside the student's logits."""
        return super().losses_of(
            {**logits, **{name: batch[name] for name in (*_NAMES, KNOWN) if name in batch}}, batch, tokens
        )


KNOWN = "taught_losses"
"""In a batch: [rows], how well the teacher knows each row, where rows are selected."""

_NAMES = [f"{TOLD}{name}" for name in TopK._fields]


def as_batch(teacher: TopK) -> Batch:
    """What a teacher says, as parts of a batch."""
    return dict(zip(_NAMES, teacher, strict=True))


def taught_losses(role: str, settings: Distillation, vocabulary: int) -> Losses:
    """Eq. 4 and Eq. 5 of one model, whose teacher's TopK stands beside its logits."""
    distilled = partial(
        captured_distillation,
        vocabulary=vocabulary,
        temperature=settings.temperature,
        divergence=DIVERGENCES[settings.divergence],
        min_confidence=settings.min_confidence,
    )

    def losses(logits: Mapping[str, Tensor], labels: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        teacher, where = TopK(*(logits[name] for name in _NAMES)), None
        if settings.select == "min-ce":
            rows = logits[ROWS]
            where = knows_better(logits[KNOWN], row_losses(logits[role], labels, rows), rows)
        return {
            f"{role}_ft": cross_entropy(logits[role], labels, tokens.labelled),
            f"{role}_kd": distilled(logits[role], teacher, tokens.distilled, taught=where),
            **({} if where is None else {f"{role}{TAUGHT}": where.sum() / tokens.distilled}),
        }

    return losses


def taught(examples: Sequence[Example], captured: Captured) -> list[Taught]:
    """The rows that were captured, each with its place in the capture."""
    places = enumerate(captured.firsts.tolist())
    return [
        Taught(one.input_ids, one.prompt_tokens, *place, gaps=one.gaps)
        for one, place in zip(examples, places, strict=True)
    ]


def _all(examples: Sequence[Example]) -> list[Taught]:
    found = [one for one in examples if isinstance(one, Taught)]
    assert len(found) == len(examples), "only rows that were captured can be taught"
    return found
