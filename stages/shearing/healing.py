"""Healing a model that was cut: it learns to say what the whole model says, as the same text goes through both.

At every token: the cosine of the last hidden states, and the Kullback-Leibler divergence of the next token. All of the
cut model's weights train.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.data.examples import Example
from stages.models.packing import Batch
from stages.models.tuned import Tuned
from stages.runtime.errors import UsageProblem
from stages.shearing.divergence import Heads, divergence
from stages.training.losses import wide
from stages.training.objective import Objective, Tokens, task_loss

WEIGHTS = {"slm_kd": 1.0, "slm_hidden": 1.0}
"""Of the divergence, in nats a token, and of 1 - cosine."""

LOGITS_AT_ONCE = 2**24
"""Of how many logits, of whole answers, copies are held at a time: more than losses.AT_ONCE, as the output layer is
read anew for each, and its gradient written."""

LOSS_SAMPLE = 8
"""How many rows the losses before and after are measured on; each is of hundreds of answers."""


class Healing(Objective):
    """A cut model, as "slm", taught by the whole one. Its examples are rows of one length, of text throughout."""

    is_whole = True

    def __init__(self, student: Tuned, teacher: Tuned) -> None:
        super().__init__([student], task_loss, WEIGHTS)
        self.tuned = (student, teacher)  # the teacher is no module of this one: it is not trained, saved or moved
        self._student, self._teacher = student, teacher

    def collate(self, examples: Sequence[Example], step: Tokens | None = None) -> Batch:
        """input_ids, [rows, length]; tokens, as Objective has them."""
        ids = torch.tensor([example.input_ids for example in examples])
        return {"input_ids": ids, "tokens": torch.tensor(step or Tokens.of(examples), dtype=torch.float32)}

    def parts(self, batch: Batch, tokens: Tokens, turn: str | None = None) -> dict[str, Tensor]:
        """Both losses on a batch; there are no turns."""
        del turn
        ids = batch["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self._student.autocast):
            with torch.no_grad():
                taught = last_hidden(self._teacher.model, ids)[:, :-1].flatten(0, 1)
            hidden = last_hidden(self._student.model, ids)[:, :-1].flatten(0, 1)
            apart = divergence(hidden, taught, self._heads, at_once=self._answers_at_once)
        cosine = F.cosine_similarity(wide(hidden), wide(taught), dim=-1)
        return {"slm_kd": apart / tokens.distilled, "slm_hidden": (1 - cosine).sum() / tokens.distilled}

    @property
    def _heads(self) -> Heads:
        student, teacher = self._student.model, self._teacher.model
        weights = [one for one in student.get_output_embeddings().parameters() if one.requires_grad]
        return Heads(partial(logits_of, student), partial(logits_of, teacher), weights)

    @property
    def _answers_at_once(self) -> int:
        return max(1, LOGITS_AT_ONCE // len(self._student.model.get_output_embeddings().weight))

    def measure(self, examples: Sequence[Example], rows: int, *, most: int = LOSS_SAMPLE) -> dict[str, float]:
        """As Objective has it, over fewer rows."""
        return super().measure(examples, rows, most=most)


def last_hidden(model: Any, ids: Tensor) -> Tensor:
    """What goes into a model's output layer, [rows, length, width]."""
    found: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return found


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """What a model's output layer makes of hidden states, [answers, vocabulary]; of Gemma's kind capped."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if not cap else cap * torch.tanh(logits / cap)


@torch.no_grad()
def check_head(model: Any, row: Sequence[int]) -> None:
    """Raise UsageProblem for a model whose logits are not those of logits_of: its architecture does something else."""
    ids = torch.tensor([row], device=model.device)
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    found = logits_of(model, last_hidden(model, ids)[0]).float()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        message = f"how {model.config.model_type} makes logits from its last hidden states is not known here"
        raise UsageProblem(message, mend="shear it without --heal")


def as_examples(rows: Sequence[list[int]]) -> list[Example]:
    """Rows of text of which every token but the first is learned."""
    return [Example(row, 1) for row in rows]
