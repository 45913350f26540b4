"""What is minimised: Eq. 3 at a client, Eq. 6 at the server, as one module over one or two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stages.data.examples import Example
from stages.models.packing import ROWS, Batch, answer_logits, collate
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers
from stages.training.losses import cross_entropy, knows_better, row_losses
from stages.training.mutual import WITH_GRADIENT, mutual
from stages.workspace.budgets import Distillation
from stages.workspace.settings import ROLES

LOSS_SAMPLE = 64
"""How many examples the loss before and after is measured on: enough to see it move, little beside training."""


TAUGHT = "_taught"
"""After a model's role, where rows are selected: the share of the distilled positions at which the other teaches it."""


class Tokens(NamedTuple):
    """What the losses of an optimiser step are divided by: its answer tokens, and its positions of distillation.

    The second are more where rows are unlabelled. Neither is below 1, so that a step without any answer has L_FT = 0.
    """

    labelled: Tensor | int
    distilled: Tensor | int

    @staticmethod
    def of(examples: Sequence[Example]) -> Tokens:
        """The counts of these examples together."""
        labelled = sum(example.answer_tokens for example in examples)
        return Tokens(max(labelled, 1), sum(example.distilled_positions for example in examples))


Losses = Callable[[Mapping[str, Tensor], Tensor, Tokens], dict[str, Tensor]]


def task_loss(logits: Mapping[str, Tensor], labels: Tensor, tokens: Tokens) -> dict[str, Tensor]:
    """Eq. 3: the SLM's cross-entropy."""
    return {"slm_ft": cross_entropy(logits["slm"], labels, tokens.labelled)}


def mutual_losses(settings: Distillation) -> Losses:
    """Eq. 4 and Eq. 5 for both models, from one set of logits of each; the backward pass writes over them.

    A teacher teaches where it is sure enough (min_confidence) and, where rows are selected, knows the row better. The
    sum is divided by all the positions as ever, so that each one left out counts zero.
    """
    divergence = WITH_GRADIENT[settings.divergence]

    def losses(logits: Mapping[str, Tensor], labels: Tensor, tokens: Tokens) -> dict[str, Tensor]:
        both = mutual(logits["slm"], logits["llm"], labels, divergence=divergence, temperature=settings.temperature)
        each = dict(zip(ROLES, both, strict=True))
        taught: dict[str, Tensor] = {}
        if settings.select == "min-ce":
            rows = logits[ROWS]
            slm, llm = (row_losses(logits[role], labels, rows) for role in ROLES)
            taught = {"slm": knows_better(llm, slm, rows), "llm": knows_better(slm, llm, rows)}
        found = {}
        for role, teacher in zip(ROLES, reversed(ROLES), strict=True):
            apart = each[role].divergence
            if settings.min_confidence is not None:
                apart = apart.where(each[teacher].confidence >= settings.min_confidence, 0.0)
            if role in taught:
                apart = apart.where(taught[role], 0.0)
            found[f"{role}_ft"] = each[role].cross_entropy.sum() / tokens.labelled
            found[f"{role}_kd"] = apart.sum() / tokens.distilled
        return {**found, **{f"{role}{TAUGHT}": where.sum() / tokens.distilled for role, where in taught.items()}}

    return losses


class Objective(nn.Module):
    """The weighted sum of the models' losses, as one module that Trainer can train.

    weights: of each named loss; a loss's name begins with the role of the model it trains.
    Its state is the adapters alone: the frozen bases never enter a checkpoint.
    """

    is_whole = False
    """Whether all of a model's weights train, instead of an adapter."""

    def __init__(self, tuned: Sequence[Tuned], losses: Losses, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({one.role: one.model for one in tuned})
        self.last: dict[str, Tensor] = {}
        self.tuned = tuple(tuned)
        self._losses = losses
        self._weights = dict(weights)
        self._longest_packed = min(one.longest_packed for one in tuned)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.parameters()).device

    def collate(self, examples: Sequence[Example], step: Tokens | None = None) -> Batch:
        """A batch in a layout that all the models take, with tokens: those of the step that it is part of, [2].

        step: None if the batch is the whole step.
        """
        batch = collate(examples, longest_packed=self._longest_packed, device=self.device)
        return batch | {"tokens": torch.tensor(step or Tokens.of(examples), dtype=torch.float32)}

    def parts(self, batch: Batch, tokens: Tokens, turn: str | None = None) -> dict[str, Tensor]:
        """Every named loss on a batch; with a turn, gradients reach that model alone."""
        logits: dict[str, Tensor] = {}
        for one in self.tuned:
            learns = torch.is_grad_enabled() and turn in (None, one.role)
            device = batch["input_ids"].device.type
            with torch.set_grad_enabled(learns), torch.autocast(device, torch.bfloat16, enabled=one.autocast):
                logits[one.role] = answer_logits(one.model, batch)
        return self.losses_of(logits, batch, tokens)

    def losses_of(self, logits: Mapping[str, Tensor], batch: Batch, tokens: Tokens) -> dict[str, Tensor]:
        """Every named loss, from the models' logits of a batch."""
        return self._losses({**logits, ROWS: batch[ROWS]}, batch["labels"], tokens)

    def forward(self, *, tokens: Tensor, turn: str | None = None, **batch: Any) -> dict[str, Tensor]:
        """The loss of one micro-batch, its share of that of the whole optimiser step.

        Trainer hands over a count of its own too, num_items_in_batch, in batch; having done so, it does not divide the
        loss by the number of micro-batches.
        """
        losses = self.parts(batch, Tokens(*tokens), turn)
        parts = {name: loss for name, loss in losses.items() if name[:3] == (turn or name[:3])}
        for name, loss in parts.items():
            self.last[name] = self.last.get(name, 0.0) + loss.detach()
        return {"loss": torch.stack([self._weights[name] * loss for name, loss in parts.items()]).sum()}

    def pop_losses(self) -> dict[str, float]:
        """The named losses since the last call, summed over micro-batches."""
        losses, self.last = {name: float(loss) for name, loss in self.last.items()}, {}
        return losses

    def weighted(self, losses: Mapping[str, float], role: str) -> float:
        """What one model is trained to lower, of these named losses."""
        return sum(self._weights[name] * loss for name, loss in losses.items() if name.startswith(role))

    @torch.no_grad()
    def measure(self, examples: Sequence[Example], rows: int, *, most: int = LOSS_SAMPLE) -> dict[str, float]:
        """The named losses without dropout, per token, over an even sample of at most so many examples."""
        count = min(len(examples), most)
        sample = [examples[i * len(examples) // count] for i in range(count)]
        tokens = Tokens.of(sample)
        totals: dict[str, float] = {}
        was_training = self.training
        self.eval()
        for start in range(0, len(sample), rows):
            batch = self.collate(sample[start : start + rows])
            parts = self.parts({name: tensor.to(self.device) for name, tensor in batch.items()}, tokens)
            totals = {name: totals.get(name, 0.0) + float(loss) for name, loss in parts.items()}
        self.train(was_training)
        return totals

    def adapter_parameters(self, role: str) -> list[nn.Parameter]:
        """What is trained of one model."""
        return [parameter for parameter in self.models[role].parameters() if parameter.requires_grad]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters' tensors."""
        return {name: parameter.data for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Put back all that state_dict gave. Raises BadNumbers for the state of other models."""
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            raise BadNumbers("the checkpoint is of another model", mend="give the command again with --overwrite")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])
