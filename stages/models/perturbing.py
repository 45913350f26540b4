"""A small change of token embeddings that raises a loss: projected gradient ascent (Miyato et al., 2017).

What is changed is what a model's table of token embeddings gives, before positions are added. A model that scales it
afterwards, as Gemma, scales the change alike. Each token's change is at most a share of the length of its own
embedding, in L2; so the share means the same in every model, and no token's change depends on the other rows of a
batch, however they are packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.workspace.attacks import Attack


@dataclass(frozen=True)
class Ascent:
    """How far, and in how many steps. radius, step_size: shares of the length of each token's embedding.

    step_size: None for 2 radius / (steps + 1): one step goes to the radius, and more can turn on the way.
    """

    radius: float
    steps: int = 1
    step_size: float | None = None

    @staticmethod
    def of(settings: Attack) -> Ascent | None:
        """As settings have it; None where they have no attack."""
        return None if settings.radius is None else Ascent(settings.radius, settings.steps, settings.step_size)

    @property
    def step(self) -> float:
        """The length of each step."""
        return 2 * self.radius / (self.steps + 1) if self.step_size is None else self.step_size


class Perturbation:
    """The change of one batch's embeddings: zero at first, and one step farther whenever it is told a gradient.

    where: bool [rows, length], the tokens that may be changed.
    """

    def __init__(self, model: Any, ascent: Ascent, where: Tensor) -> None:
        self._embeddings, self._ascent = model.get_input_embeddings(), ascent
        self._where = where[..., None]
        self._lengths = torch.zeros(())  # of the embeddings that may be changed, [rows, length, 1]
        self.change: Tensor | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model reads changed embeddings; where gradients are enabled, they reach the change too."""
        hook = self._embeddings.register_forward_hook(lambda _, __, found: self._changed(found))
        try:
            yield
        finally:
            hook.remove()

    def _changed(self, embeddings: Tensor) -> Tensor:
        if self.change is None:
            wide = embeddings.detach().float()
            self._lengths = wide.norm(dim=-1, keepdim=True) * self._where
            self.change = torch.zeros_like(wide)
        self.change = self.change.detach().requires_grad_(torch.is_grad_enabled())
        return embeddings + self.change.to(embeddings.dtype)

    @torch.no_grad()
    def ascend(self, gradient: Tensor) -> None:
        """Go a step along the gradient of what is to rise, each token by itself, and back to the radius if beyond."""
        assert self.change is not None
        gone = self.change + self._ascent.step * self._lengths * _unit(gradient.float())
        most = self._ascent.radius * self._lengths
        self.change = gone * (most / gone.norm(dim=-1, keepdim=True).clamp(min=_tiny(gone))).clamp(max=1.0)


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1 along the last dimension, or 0. Divided by the largest first, whose square need not be a number."""
    scaled: Tensor = vectors / vectors.abs().amax(dim=-1, keepdim=True).clamp(min=_tiny(vectors))
    length: Tensor = scaled.norm(dim=-1, keepdim=True)
    return scaled / length.clamp(min=_tiny(scaled))


def _tiny(one: Tensor) -> float:
    return torch.finfo(one.dtype).tiny
