"""GELU in one pass, where a model's own takes eight: transformers writes several of them out in Python.

An activation is replaced only where it is torch's own GELU, value and slope, as far as float32 can tell: both are
computed in float64 over all that matters. Single results differ in the last digits of the precision computed in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SAME = 1e-9
"""How far two functions of float64 may be apart, relative, and be one to float32, whose digits end at 6e-8."""


class FusedGELU(nn.Module):
    """x Phi(x), or its approximation by tanh (Hendrycks and Gimpel, 2016)."""

    def __init__(self, approximate: str, instead_of: str) -> None:
        super().__init__()
        self.approximate, self.instead_of = approximate, instead_of

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return F.gelu(x, approximate=self.approximate)


def fuse(model: nn.Module) -> None:
    """Put the fused GELU wherever the model has one that is written out."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if approximate := _gelu_of(child):
                setattr(parent, name, FusedGELU(approximate, type(child).__name__))


def fused_in(model: nn.Module) -> dict[str, int]:
    """What was replaced, and how often."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, FusedGELU):
            found[module.instead_of] = found.get(module.instead_of, 0) + 1
    return found


def _gelu_of(module: nn.Module) -> str | None:
    """Which of torch's GELUs an activation of transformers is, if it is one."""
    if not type(module).__module__.startswith("transformers.activations") or any(module.parameters()):
        return None
    values, slopes = _traced(module)
    for approximate in ("tanh", "none"):
        value, slope = _traced(functools.partial(F.gelu, approximate=approximate))
        if _are_one(values, value) and _are_one(slopes, slope):
            return approximate
    return None


def _traced(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Values and slopes: beyond 12 each GELU is 0 or x to all digits of float32."""
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        values = function(x)
        (slopes,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), slopes


def _are_one(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= SAME * expected.abs().clamp(min=1.0)).all())
