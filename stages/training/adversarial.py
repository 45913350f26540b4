"""Eq. 3 under attack: a client's loss on its rows and on the same rows with the worst small change of their prompts.

As FedEAT has it (Pang et al., 2025, arXiv 2502.11863), the change is of embeddings. The first pass over a batch is the
plain one. It gives the plain loss, the gradient of the adapter and that of the change; each further pass is with the
change that the one before it led to. No more than one pass is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stages.data.examples import Example
from stages.models.packing import PROMPTS, Batch, prompts
from stages.models.perturbing import Ascent, Perturbation
from stages.models.tuned import Tuned
from stages.training.objective import Objective, Tokens, task_loss
from stages.workspace.attacks import Adversarial

PLAIN, ATTACKED = "slm_ft", "slm_adv"


class AdversarialObjective(Objective):
    """The plain loss and that under attack, which has this weight; the plain loss has the rest."""

    def __init__(self, slm: Tuned, ascent: Ascent, *, weight: float) -> None:
        super().__init__([slm], task_loss, {PLAIN: 1 - weight, ATTACKED: weight})
        self._ascent = ascent

    def collate(self, examples: Sequence[Example], step: Tokens | None = None) -> Batch:
        """As of any objective, and which tokens are of prompts."""
        batch = super().collate(examples, step)
        return batch | {PROMPTS: prompts(examples, batch)}

    def parts(self, batch: Batch, tokens: Tokens, turn: str | None = None) -> dict[str, Tensor]:
        """Both losses on a batch. Gradients are taken of the change where none are of the adapter, too."""
        learns = torch.is_grad_enabled() and self._weights[PLAIN] > 0
        trained = self.adapter_parameters("slm") if learns else []
        perturbation = Perturbation(self.tuned[0].model, self._ascent, batch[PROMPTS])
        plain = None
        for _ in range(self._ascent.steps):
            with torch.enable_grad(), perturbation.applied():
                loss = super().parts(batch, tokens, turn)[PLAIN]
            assert perturbation.change is not None
            wanted = [perturbation.change, *trained]
            of_change, *of_trained = torch.autograd.grad(loss, wanted, allow_unused=True)
            perturbation.ascend(of_change)
            if plain is None:
                plain = _with_gradients(loss.detach(), trained, of_trained)
                trained = []
        with perturbation.applied():
            attacked = super().parts(batch, tokens, turn)[PLAIN]
        assert plain is not None
        return {PLAIN: plain, ATTACKED: attacked}


def _with_gradients(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """A value whose backward pass gives parameters the gradients that are known already."""
    if not parameters:
        return value
    found: Tensor = _Known.apply(value, gradients, *parameters)  # type: ignore[no-untyped-call]
    return found


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if one is None else above * one for one in ctx.gradients)


def objective_of(slm: Tuned, settings: Adversarial) -> Objective:
    """What a client minimises: Eq. 3, under attack if that is agreed."""
    ascent = Ascent.of(settings)
    if ascent is None:
        return Objective([slm], task_loss, {PLAIN: 1.0})
    return AdversarialObjective(slm, ascent, weight=settings.weight)
