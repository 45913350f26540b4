"""Attention over rows that stand one after the other in one, each attending to itself only.

A mask of the whole would cost the square of all tokens together. Here attention alone sees the rows apart, padded on
the right to the longest, where a causal mask keeps real tokens from the padding; every other layer sees no padding.
This is transformers' own attention by torch, which takes such a batch too from now on: where the batch says so by a
mask of whole numbers, `places`. A model that computes attention in some other way is found out by `packing.packs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from stages.models import short_attention


def places(lengths: Sequence[int]) -> Tensor:
    """What takes a mask's place, [1, 2, rows, longest]: transformers hands on whatever has four dimensions.

    First where each row's tokens stand in the packed row, the padding standing at 0. Then, flat and padded with 0,
    where each packed token stands in [rows, longest].
    """
    positions, rows = torch.arange(max(lengths)), torch.tensor(lengths)
    is_token = positions < rows[:, None]  # (rows, longest)
    starts = rows.cumsum(0) - rows
    there, back = torch.zeros(2, *is_token.shape, dtype=torch.long)
    there[is_token] = (starts[:, None] + positions)[is_token]
    found = is_token.flatten().nonzero()[:, 0]
    back.view(-1)[: len(found)] = found
    return torch.stack([there, back])[None]


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
    _, _, rows, longest = attention_mask.shape
    there, back = attention_mask[0, 0].flatten(), attention_mask[0, 1].flatten()[: query.shape[2]]
    spread = [
        _Spread.apply(one[0].transpose(0, 1), there, back).view(rows, longest, *one.shape[1::2]).transpose(1, 2)  # type: ignore[no-untyped-call]
        for one in (query, key, value)
    ]
    found = _causal(module, *spread, **settings)
    return _Gather.apply(found.flatten(0, 1), back)[None], None  # type: ignore[no-untyped-call]


def _causal(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """[rows, longest, heads, width of a head]: each token attends to those of its row up to itself."""
    groups = query.shape[1] // key.shape[1]
    heads = query, repeat_kv(key, groups), repeat_kv(value, groups)
    if short_attention.is_meant_for(*heads, dropout=settings.get("dropout", 0.0)):
        return short_attention.attend(*heads, scale=settings.get("scaling")).transpose(1, 2)
    found: Tensor = sdpa_attention_forward(module, query, key, value, None, **(settings | {"is_causal": True}))[0]
    return found


AttentionInterface.register("sdpa", attend)
