"""Causal attention over short rows in bfloat16 on a CPU, with a backward pass of its own.

torch's fused kernel multiplies the matrices of each row and head by themselves. With rows of tens of tokens its
backward pass is mostly the cost of starting thousands of products: a third of a LoRA step of GPT-2's shape. Here
the forward pass is torch's, to the bit, and the backward pass takes all rows and heads in one product. Scores and their
gradients are float32, as in torch's kernel; the gradients are at least as near to those of float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LONGEST = 128
"""Tokens of a row up to which this was faster in every shape tried; at 192 torch's kernel is."""


def is_meant_for(query: Tensor, key: Tensor, value: Tensor, *, dropout: float) -> bool:
    """Whether `attend` takes the place of torch's attention: there will be a backward pass over short rows.

    query, key, value: [rows, heads, tokens, width of a head].
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] <= LONGEST
        and query.shape == key.shape == value.shape
        and dropout == 0
        and torch.is_grad_enabled()
        and any(one.requires_grad for one in (query, key, value))
    )


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of each token to those of its row up to itself: [rows, heads, tokens, width], as the three are.

    scale: of the scores; None: 1 / sqrt(width), as everywhere.
    """
    found: Tensor = _Attention.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        shape = rows, heads, tokens, width = gradient.shape
        query, key, value = ctx.saved_tensors

        def long(one: Tensor) -> Tensor:
            return one.to(torch.float32, memory_format=torch.contiguous_format).view(rows * heads, tokens, width)

        def short(one: Tensor) -> Tensor:
            return one.reshape(rows * heads, tokens, width)

        later = query.new_full((tokens, tokens), -torch.inf, dtype=torch.float32).triu(1)
        shares = torch.baddbmm(later, long(query), long(key).transpose(1, 2), alpha=ctx.scale).softmax(-1)
        by_shares = torch.bmm(long(gradient), long(value).transpose(1, 2))  # [rows x heads, tokens, tokens]
        by_scores = torch._softmax_backward_data(by_shares, shares, -1, torch.float32).mul_(ctx.scale).bfloat16()
        by_query = torch.bmm(by_scores, short(key))
        by_key = torch.bmm(by_scores.transpose(1, 2), short(query))
        by_value = torch.bmm(shares.bfloat16().transpose(1, 2), short(gradient))
        return by_query.view(shape), by_key.view(shape), by_value.view(shape), None
