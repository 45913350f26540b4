"""Asking a model what it knows of the public rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from stages.distillation import captures, knowledge, top_k_logits
from stages.distillation.knowledge import Knowledge, Told
from stages.distillation.learning import Pupil, pupils
from stages.distillation.pairs import Voice
from stages.distillation.public import Public, examples_of
from stages.models.held import held_in_bfloat16
from stages.models.packing import ROWS, answer_logits, collate
from stages.models.tuned import Outline, Tuned
from stages.runtime.errors import Refused
from stages.runtime.events import Event, Report
from stages.training.losses import row_losses
from stages.workspace.paths import Workspace


def told_of(workspace: Workspace, public: Public, voice: Voice) -> Told:
    """What knowledge of these rows by this party has to say of itself."""
    settings = workspace.agreement.distillation
    return Told(
        data_sha256=public.sha256,
        vocabulary_sha256=voice.vocabulary.sha256,
        temperature=settings.temperature,
        vocabulary=voice.vocabulary.rows,
        top_k=settings.top_k,
    )


def read_by(public: Public, outline: Outline, workspace: Workspace, own: Voice | None) -> list[Pupil]:
    """The public rows as a model reads them; of those that its party has told of, where it has told."""
    found = examples_of(public, outline, workspace)
    if own is not None:
        found = [one if positions else None for one, positions in zip(found, own.cuts.positions, strict=True)]
    return pupils(found)


def known(
    tuned: Tuned,
    public: Public,
    voice: Voice,
    workspace: Workspace,
    *,
    folder: Path,
    inputs: Mapping[str, str],
    again: bool,
    report: Report,
) -> Knowledge:
    """What a model knows of the rows that its party reads. Memory does not grow with their number.

    folder: what there is goes there now and then, and a run with equal inputs that was stopped goes on from it. Raises
    Refused where the rows are cut otherwise than was told.
    """
    told, machine = told_of(workspace, public, voice), workspace.machine
    examples = read_by(public, tuned.outline, workspace, voice)
    if [one.answer_tokens for one in examples] != voice.cuts.positions[voice.cuts.positions > 0].tolist():
        message = "the tokenizer here cuts the public rows otherwise than was told in round 1"
        mend = "the other parties would take this for other rows: go on with the tokenizer of round 1"
        raise Refused(message, where=public.path, mend=mend)
    source = top_k_logits.Source(
        data_sha256=public.sha256,
        rows_sha256=top_k_logits.rows_sha256(examples),
        temperature=told.temperature,
        vocabulary=told.vocabulary,
        top_k=told.top_k,
    )
    captured = captures.capture(
        tuned,
        examples,
        source,
        rows=machine.rows_at_once(workspace.agreement.distillation),
        finds_rows=machine.micro_batch == "auto",
        every=machine.checkpoint_steps,
        folder=folder,
        inputs={"agreement": workspace.agreement_sha256, **inputs, "dtype": tuned.dtype},
        also=("losses", "chances"),
        overwrite=again,
        report=report,
    )
    found = knowledge.knowledge_of(captured, voice.cuts, told)
    knowledge.check(found, voice.cuts, Path("what the model knows"))
    return found


@torch.no_grad()
def losses_of(tuned: Tuned, examples: Sequence[Pupil], rows: int, count: int, report: Report) -> np.ndarray:
    """How well a model knows each public row: float64 [count], in nats; NaN for one that its party leaves out.

    examples: those that it reads. rows: how many are taken at once.
    """
    was_training = tuned.model.training
    tuned.model.eval()
    found = np.full(count, np.nan)
    with held_in_bfloat16(tuned):
        for start in range(0, len(examples), rows):
            some = examples[start : start + rows]
            batch = collate(some, longest_packed=tuned.longest_packed, device=tuned.model.device)
            batch = {name: tensor.to(tuned.model.device) for name, tensor in batch.items()}
            with torch.autocast(tuned.model.device.type, torch.bfloat16, enabled=tuned.autocast):
                logits = answer_logits(tuned.model, batch)
            found[[one.row for one in some]] = row_losses(logits, batch["labels"], batch[ROWS]).cpu().numpy()
            report(Event("step", "rows", step=start + len(some), total=len(examples)))
    tuned.model.train(was_training)
    return found
