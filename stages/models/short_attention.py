"""Causal attention over short packed rows in bfloat16 on a CPU, with a backward pass of its own.

torch's fused kernel multiplies the matrices of each row and head by themselves. With rows of tens of tokens it is
mostly the cost of starting thousands of products: a third of a LoRA step of GPT-2's shape. Here all rows and heads of
about one length are taken in one product, forwards and backwards. Scores, shares and their gradients are float32, as in
torch's kernel, but shares are rounded to bfloat16 once they sum to one. So results are up to a third further from those
of float64 than torch's, which both are within the rounding of bfloat16; gradients are nearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST = 128
"""Tokens of a row up to which this was faster in every shape tried; at 192 torch's kernel is."""

Rectangle = tuple[int, int]
"""How many rows stand below each other, and the length that they are padded to."""


class Slots(NamedTuple):
    """Where packed tokens stand in rectangles, one rectangle after the other.

    there: [slots], which token is in each slot; the padding is token 0. back: [tokens], which slot each token is in.
    mask: where there is one rectangle, bool [rows, 1, longest, longest], whom each token reads; None: those of its row
    up to itself.
    """

    there: Tensor
    back: Tensor
    rectangles: list[Rectangle]
    mask: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        """The slots of each rectangle."""
        return [rows * longest for rows, longest in self.rectangles]


def is_meant_for(query: Tensor, key: Tensor, value: Tensor, rectangles: Sequence[Rectangle], *, dropout: float) -> bool:
    """Whether `attend` takes the place of torch's attention: rows are short, from a token's view on average.

    query, key, value: [1, heads, tokens, width of a head].
    """
    slots = sum(rows * longest for rows, longest in rectangles)
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.shape[3] == key.shape[3] == value.shape[3]
        and dropout == 0
        and sum(rows * longest**2 for rows, longest in rectangles) <= LONGEST * slots
    )


def attend(query: Tensor, key: Tensor, value: Tensor, slots: Slots, *, scale: float | None = None) -> Tensor:
    """Attention of each token to those that it reads: [tokens, heads, width], as the three are.

    scale: of the scores; None: 1 / sqrt(width), as everywhere.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = _Attention.apply(query, key, value, (slots, scale))  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: tuple[Slots, float]) -> Tensor:
        slots, scale = how
        kept, found = list[Tensor](), list[Tensor]()
        spread = (_apart(one.index_select(0, slots.there), slots) for one in (query, key, value))
        with torch.autocast("cpu", enabled=False):  # scores stay float32
            for (rows, longest), *three in zip(slots.rectangles, *spread, strict=True):
                own_query, own_key, own_value = three
                unread = torch.full((longest, longest), -torch.inf).triu(1) if slots.mask is None else torch.zeros(())
                scores = torch.baddbmm(unread, own_query.float(), own_key.float().transpose(1, 2), alpha=scale)
                if slots.mask is not None:
                    scores.view(rows, -1, longest, longest).masked_fill_(~slots.mask, -torch.inf)
                shares = scores.softmax(-1)
                kept += [*three, shares]
                found.append(_together(torch.bmm(shares.bfloat16(), own_value), rows))
        ctx.save_for_backward(slots.there, slots.back, *kept)
        ctx.set_materialize_grads(False)  # a model that does not learn is left without a gradient, not with zeros
        ctx.rectangles, ctx.scale = slots.rectangles, scale
        return torch.cat(found).index_select(0, slots.back)

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        there, back, *kept = ctx.saved_tensors
        slots, found = Slots(there, back, ctx.rectangles), list[tuple[Tensor, ...]]()
        spread = gradient.new_zeros(len(there), *gradient.shape[1:]).index_copy_(0, back, gradient)  # none for padding
        for number, ((rows, _), own) in enumerate(zip(slots.rectangles, _apart(spread, slots), strict=True)):
            query, key, value, shares = kept[4 * number : 4 * number + 4]
            by_shares = torch.bmm(own.float(), value.float().transpose(1, 2))  # [rows x heads, longest, longest]
            by_scores = torch._softmax_backward_data(by_shares, shares, -1, torch.float32).mul_(ctx.scale).bfloat16()
            by_query = torch.bmm(by_scores, key)
            by_key = torch.bmm(by_scores.transpose(1, 2), query)
            by_value = torch.bmm(shares.bfloat16().transpose(1, 2), own)
            found.append(tuple(_together(one, rows) for one in (by_query, by_key, by_value)))
        return *(torch.cat(one).index_select(0, back) for one in zip(*found, strict=True)), None


def _apart(spread: Tensor, slots: Slots) -> list[Tensor]:
    """Tokens in slots, [slots, heads, width], as matrices for each rectangle: [rows x heads, longest, width]."""
    heads, width = spread.shape[1:]
    parts = torch.split(spread, slots.sizes)
    return [
        part.view(rows, longest, heads, width).transpose(1, 2).reshape(rows * heads, longest, width)
        for part, (rows, longest) in zip(parts, slots.rectangles, strict=True)
    ]


def _together(matrices: Tensor, rows: int) -> Tensor:
    """The way back, of one rectangle: [rows x longest, heads, width]."""
    _, longest, width = matrices.shape
    return matrices.view(rows, -1, longest, width).transpose(1, 2).reshape(rows * longest, -1, width)
