"""How examples become tensors: no padding where the model allows it, and logits at answer positions alone.

Packed: the examples of a batch stand one after the other in a single row, each attending to itself only, each with
its own positions. The numbers are those of separate rows; padding costs attention alone. Whether a model takes this is
found out by trying (`packs`). Padded: one example a row, padded on the left.

In both, logits come back as [answers, vocabulary]: one row for each answer token and for the token after each
unlabelled prompt, in the order of the batch. This is where the logits of two models meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from stages.data.examples import NO_LABEL, Example
from stages.models.packed_attention import places

Batch = dict[str, Tensor]

UNBOUNDED = 1 << 30
"""Tokens of a row that no model sets a bound to."""

ATTENTION = {"full_attention", "sliding_attention"}
"""Of the kinds of layers that configurations list, those in which a mask keeps rows apart."""

ROWS = "rows"
"""In a batch: [answers], which of its examples each answer belongs to."""

PROMPTS = "prompts"
"""In a batch, where that is asked for: bool, of the form of its input_ids, which tokens are of prompts."""


def packed(examples: Sequence[Example], *, by_length: bool = False) -> Batch:
    """One row: input_ids, position_ids [1, tokens]; attention_mask, by_length: as of places; all else [A]."""
    lengths = [len(example.input_ids) for example in examples]
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    answers = [start + _predicting(example) for start, example in zip(starts, examples, strict=True)]
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.input_ids]]),
        "position_ids": torch.cat([torch.arange(len(example.input_ids)) for example in examples])[None],
        "attention_mask": places(lengths, by_length=by_length),
        "answers": torch.cat(answers),
        "labels": _labels(examples),
        ROWS: _rows(examples),
    }


def padded(examples: Sequence[Example]) -> Batch:
    """A row each: input_ids, position_ids, attention_mask [rows, length]; answers [rows, kept]; labels, rows [A]."""
    length = max(len(example.input_ids) for example in examples)
    kept = max(len(example.input_ids) - example.prompt_tokens for example in examples) + 1
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    mask, answers = torch.zeros_like(ids), torch.zeros(len(examples), kept, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, length - len(example.input_ids) :] = torch.tensor(example.input_ids)
        mask[row, length - len(example.input_ids) :] = 1
        answers[row, _predicting(example) + kept - len(example.input_ids)] = True
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": mask,
        "answers": answers,
        "labels": _labels(examples),
        ROWS: _rows(examples),
    }


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """The logits that predict each of the batch's labels, [answers, vocabulary], in their order."""
    answers = batch["answers"]
    kept = answers.shape[1] if answers.dtype == torch.bool else answers
    logits: Tensor = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=kept,
        use_cache=False,
    ).logits
    return logits[answers] if answers.dtype == torch.bool else logits[0]


def collate(examples: Sequence[Example], *, longest_packed: int, device: torch.device) -> Batch:
    """Packed, if the models take rows of this length so (see packs); else padded. On the CPU.

    device: that the batch will go to.
    """
    longest = max(len(example.input_ids) for example in examples)
    return packed(examples, by_length=device.type == "cpu") if longest <= longest_packed else padded(examples)


def prompts(examples: Sequence[Example], batch: Batch) -> Tensor:
    """Which tokens of a batch of these examples, of either layout, are of prompts: bool, of the form of input_ids."""
    length = batch["input_ids"].shape[1]
    each = [_unanswered(example) for example in examples]
    if batch["attention_mask"].dim() > 2:
        return torch.cat(each)[None]
    return torch.stack([torch.nn.functional.pad(one, (length - len(one), 0)) for one in each])


def own_window(config: Any) -> int:
    """The longest row at which a mask of ours may take the place of the model's own; UNBOUNDED if it has no window.

    0 where no mask keeps rows apart: layers that are no attention hand on what they have read.
    """
    text = config.get_text_config()
    if getattr(text, "attention_chunk_size", None) or {*(getattr(text, "layer_types", None) or ())} - ATTENTION:
        return 0
    slides = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return int(text.sliding_window) if slides else UNBOUNDED


@torch.no_grad()
def packs(model: Any) -> int:
    """The longest row that this model takes packed; 0 unless packed rows give it the logits of separate rows.

    Tried on a few tokens. Longer rows would lose the model's own window.
    """
    examples = [Example([3, 1, 4, 1, 5, 9, 2], 3), Example([2, 7, 1, 8], 2)]
    was_training = model.training
    model.eval()
    try:
        batch = {name: tensor.to(model.device) for name, tensor in packed(examples).items()}
        together = answer_logits(model, batch).float()
        apart = torch.cat(
            [
                answer_logits(
                    model, {name: tensor.to(model.device) for name, tensor in padded([example]).items()}
                ).float()
                for example in examples
            ]
        )
    except (RuntimeError, ValueError, TypeError, IndexError):
        return 0
    finally:
        model.train(was_training)
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    is_alike = bool((together - apart).abs().max() <= tolerance * apart.abs().max().clamp(min=1.0))
    return own_window(model.config) if is_alike else 0


def _labels(examples: Sequence[Example]) -> Tensor:
    answers = ([token for first, end in one.turns for token in one.input_ids[first:end]] for one in examples)
    return torch.tensor([token for answer in answers for token in answer or [NO_LABEL]])


def _predicting(example: Example) -> Tensor:
    """The positions at which labels are predicted, one before each token of an answer; of no answer, the last."""
    turns = example.turns or [(len(example.input_ids), len(example.input_ids) + 1)]
    return torch.cat([torch.arange(first - 1, end - 1) for first, end in turns])


def _unanswered(example: Example) -> Tensor:
    """Which tokens are of no answer."""
    found = torch.ones(len(example.input_ids), dtype=torch.bool)
    for first, end in example.turns:
        found[first:end] = False
    return found


def _rows(examples: Sequence[Example]) -> Tensor:
    counts = torch.tensor([example.distilled_positions for example in examples])
    return torch.repeat_interleave(torch.arange(len(examples)), counts)
