"""Attention over rows that stand one after the other in one, each attending to itself only.

A mask of the whole would cost the square of all tokens together. Here attention alone sees the rows apart, padded on
the right to the longest, where a causal mask keeps real tokens from the padding; every other layer sees no padding.
This is transformers' own attention by torch, which takes such a batch too from now on: where the batch says so by a
mask of whole numbers, `places`. A model that computes attention in some other way is found out by `packing.packs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from stages.models import short_attention
from stages.models.short_attention import Slots

ANOTHER = 32
"""What another rectangle costs, as that many slots: measured, on a CPU."""


def places(lengths: Sequence[int], *, by_length: bool = False) -> Tensor:
    """What takes a mask's place: where each row's tokens stand in the packed row, and the way back.

    [1, 2, rows, longest], since transformers hands on whatever has four dimensions: the rows below each other, padded
    on the right. First, for each of their slots, which packed token is in it, the padding being token 0. Then, flat and
    padded with 0, which slot each packed token is in.

    by_length: rows of about one length stand in a rectangle of their own, if that spares more than it costs. Then it is
    [1, 3, .., longest], all flat, and last are the rectangles: how many rows, how long, again and again until 0. This
    is for CPUs: to read sizes from a GPU is to wait for it.
    """
    groups = _of_about_one_length(lengths) if by_length else [list(range(len(lengths)))]
    rectangles = [(len(group), max(lengths[row] for row in group)) for group in groups]
    order, sizes = torch.tensor([row for group in groups for row in group]), torch.tensor(lengths)
    longest = torch.tensor([length for rows, length in rectangles for _ in range(rows)])
    begins = torch.empty_like(order)
    begins[order] = longest.cumsum(0) - longest  # the slot at which each row begins
    tokens, row = torch.arange(sum(lengths)), torch.arange(len(lengths)).repeat_interleave(sizes)
    slot = tokens + (begins - sizes.cumsum(0) + sizes)[row]
    lines = -(-sum(rows * length for rows, length in rectangles) // max(lengths))
    found = torch.zeros(3, lines * max(lengths), dtype=torch.long)
    found[0, slot] = tokens
    found[1, : len(tokens)] = slot
    if len(rectangles) == 1:
        return found[:2].view(1, 2, lines, max(lengths))
    found[2, : 2 * len(rectangles)] = torch.tensor(rectangles).flatten()
    return found.view(1, 3, lines, max(lengths))


def _of_about_one_length(lengths: Sequence[int]) -> list[list[int]]:
    """The rows in groups, the longest first; one is full where its padding would be more than another costs."""
    found: list[list[int]] = []
    padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        padding += lengths[found[-1][0]] - lengths[row] if found else 0
        if not found or padding > ANOTHER:
            found.append([])
            padding = 0
        found[-1].append(row)
    return found


def reading(mask: Tensor, own: Tensor) -> Tensor:
    """What takes a mask's place where it is not the causal one: [rows, 1, longest + 2, longest].

    mask: bool [rows, 1, longest, longest], whom each token reads; the padding reads itself. own: bool [rows, longest],
    which slots are no padding. Packed tokens stand in their order. Below the mask, as of places: which token is in each
    slot, and which slot each token is in.
    """
    there = torch.where(own.flatten(), own.flatten().cumsum(0) - 1, 0)
    back = torch.zeros_like(there)
    back[: int(own.sum())] = own.flatten().nonzero()[:, 0]
    return torch.cat([mask.long(), there.view(len(own), 1, 1, -1), back.view(len(own), 1, 1, -1)], dim=2)


def slots_of(places: Tensor, tokens: int) -> Slots:
    """What places or reading tells of a packed row of so many tokens."""
    rows, planes, lines, longest = places.shape
    if planes == 1:
        mask, there, back = torch.split(places, [longest, 1, 1], dim=2)
        return Slots(there.flatten(), back.flatten()[:tokens], [(rows, longest)], mask.bool())
    rectangles = [(lines, longest)]
    if planes > 2:
        sizes = takewhile(bool, places[0, 2].flatten().tolist())
        rectangles = list(zip(sizes, sizes, strict=True))
    slots = sum(rows * longest for rows, longest in rectangles)
    return Slots(places[0, 0].flatten()[:slots], places[0, 1].flatten()[:tokens], rectangles)


class _Spread(torch.autograd.Function):
    """Packed tokens [tokens, ...] into rows padded on the right, [rows x longest, ...]; padding has no gradient."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.set_materialize_grads(False)  # a model that does not learn is left without a gradient, not with zeros
        return packed.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        (back,) = ctx.saved_tensors
        return None if gradient is None else gradient.index_select(0, back), None, None


class _Gather(torch.autograd.Function):
    """The way back: the padding's results are dropped, and its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, spread: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.set_materialize_grads(False)
        ctx.rows = spread.shape[0]
        return spread.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        (back,) = ctx.saved_tensors
        if gradient is None:
            return None, None
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy(0, back, gradient), None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Transformers' attention by torch, for packed rows too. query, key, value: [1, heads, tokens, width of a head].

    Returns [1, tokens, heads, width of a head]. Raises ValueError for packed rows with a bias between positions.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return plain
    if settings.get("position_bias") is not None:
        raise ValueError("packed rows take no bias between positions")
    slots = slots_of(attention_mask, query.shape[2])
    if short_attention.is_meant_for(query, key, value, slots.rectangles, dropout=settings.get("dropout", 0.0)):
        groups = query.shape[1] // key.shape[1]
        q, k, v = (one[0].transpose(0, 1) for one in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
        return short_attention.attend(q, k, v, slots, scale=settings.get("scaling"))[None], None
    spread = [
        torch.split(_Spread.apply(one[0].transpose(0, 1), slots.there, slots.back), slots.sizes)  # type: ignore[no-untyped-call]
        for one in (query, key, value)
    ]
    found = [
        _apart(module, [one.view(*sides, *one.shape[1:]).transpose(1, 2) for one in three], slots.mask, settings)
        for sides, *three in zip(slots.rectangles, *spread, strict=True)
    ]
    return _Gather.apply(torch.cat(found) if len(found) > 1 else found[0], slots.back)[None], None  # type: ignore[no-untyped-call]


def _apart(module: nn.Module, heads: list[Tensor], mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """[rows x longest, heads, width of a head]. heads: query, key, value: [rows, heads, longest, width of a head]."""
    query, key, value = heads
    settings = settings | {"is_causal": mask is None}
    found: Tensor = sdpa_attention_forward(module, query, key, value, mask, **settings)[0]
    return found.flatten(0, 1)


AttentionInterface.register("sdpa", attend)
