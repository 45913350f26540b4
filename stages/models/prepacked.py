"""Frozen linear layers in bfloat16 whose weights lie as a CPU's matrix instructions read them.

torch lays a weight out anew in each product; with tens of tokens that takes as long as the product. Laid out once, the
same numbers come out, to the bit. The operations are those that torch's own compiler uses for frozen weights.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TOKENS = 256
"""Of a product, about: what the layout is chosen for. Others are as fast with it."""


class Prepacked:
    """Takes the place of a linear layer's forward. Its weight, [outputs, inputs], is kept in the new layout alone.

    What is multiplied is cast to bfloat16, as autocast would. The layout of the way back comes with the first gradient.
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self._layer = layer
        self.there = _laid_out(weight.t() if isinstance(layer, Conv1D) else weight)

    @cached_property
    def back(self) -> Tensor:
        """The transposed weight, laid out."""
        return _laid_out(self.there.to_dense().t())

    def weight(self) -> Tensor:
        """The weight as the layer had it, to the bit."""
        plain = self.there.to_dense()
        return plain.t().contiguous() if isinstance(self._layer, Conv1D) else plain

    def __call__(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        found: Tensor = _Product.apply(x.bfloat16(), self, self._layer.bias)  # type: ignore[no-untyped-call]
        return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Prepacked, bias: Tensor | None) -> Tensor:
        ctx.by = by
        return _product(x, by.there, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _product(gradient, ctx.by.back, None), None, None


def takes(layer: nn.Module) -> bool:
    """Whether a layer can be prepacked here: a plain one on a processor that multiplies bfloat16, all of it frozen."""
    return (
        type(layer) in (nn.Linear, Conv1D)
        and "forward" not in vars(layer)  # some library's own, such as one that fetches the weight from elsewhere
        and layer.weight.device.type == "cpu"
        and not any(parameter.requires_grad for parameter in layer.parameters())
        and _are_at_hand()
    )


@cache
def _are_at_hand() -> bool:
    """Whether the processor has instructions for bfloat16, and torch these operations of its compiler's."""
    one = torch.eye(16, dtype=torch.bfloat16)
    try:
        return torch.cpu._is_avx512_bf16_supported() and torch.equal(_product(one, _laid_out(one), None), one)
    except (AttributeError, RuntimeError):
        return False


def _laid_out(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TOKENS)
    return found


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
