"""Attention over short rows in bfloat16: about as near to the exact results as torch's own, and nearer gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from stages.data.examples import Example
from stages.models import packed_attention, short_attention
from stages.models.packing import answer_logits, packed, padded

HEADS, WIDTH = 4, 16
ROWS = pytest.mark.parametrize("lengths", [[1], [2, 1], [37, 37, 21], [128], [90, 3, 41, 2, 44]])


def drawn(lengths: list[int], dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> list[Tensor]:
    """Query, key, value and a gradient, [tokens, heads, width]; the same numbers in any dtype."""
    torch.manual_seed(seed)
    return [torch.randn(sum(lengths), HEADS, WIDTH).bfloat16().to(dtype) for _ in range(4)]


def ours(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    places = packed_attention.places(lengths, by_length=True)
    return short_attention.attend(query, key, value, packed_attention.slots_of(places, len(query)), scale=scale)


def torchs(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    """Row by row."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    rows = [[one[None, first:end].transpose(1, 2) for one in (query, key, value)] for first, end in pairwise(ends)]
    found = [scaled_dot_product_attention(*row, is_causal=True, scale=scale)[0].transpose(0, 1) for row in rows]
    return torch.cat(found)


def computed(attend: object, tensors: list[Tensor], lengths: list[int], scale: float | None) -> list[Tensor]:
    """The result and the gradients."""
    leaves = [one.detach().requires_grad_() for one in tensors[:3]]
    found: Tensor = attend(*leaves, lengths, scale)  # type: ignore[operator]
    found.backward(tensors[3])  # type: ignore[no-untyped-call]
    return [found.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@ROWS
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_no_further_from_the_exact_ones_than_those_of_torch_and_results_hardly(
    lengths: list[int], scale: float | None, autocast: bool
) -> None:
    exact = computed(torchs, drawn(lengths, torch.float64), lengths, scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = computed(ours, drawn(lengths), lengths, scale)
    theirs = computed(torchs, drawn(lengths), lengths, scale)
    assert len(found) == 4
    for more, mine, other, right in zip((1.35, 1.05, 1.05, 1.05), found, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - right).norm() <= more * (other - right).norm() + 1e-6 * right.norm()


def test_what_does_not_learn_has_no_gradient() -> None:
    query, key, value, gradient = drawn([3, 2])
    key.requires_grad_()
    ours(query, key, value, [3, 2]).backward(gradient)  # type: ignore[no-untyped-call]
    assert query.grad is None
    assert value.grad is None
    assert key.grad is not None


def test_it_is_meant_for_short_rows_in_bfloat16_and_for_nothing_else() -> None:
    def is_meant(
        *rectangles: tuple[int, int], dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0, width: int = WIDTH
    ) -> bool:
        query, value = torch.zeros(1, HEADS, 5, WIDTH, dtype=dtype), torch.zeros(1, HEADS, 5, width, dtype=dtype)
        return short_attention.is_meant_for(query, query, value, rectangles or [(2, 8)], dropout=dropout)

    assert is_meant()
    assert is_meant((8, short_attention.LONGEST))
    assert not is_meant((8, short_attention.LONGEST + 1))
    assert is_meant((1, 200), (8, 40))  # of 520 tokens 320 are in rows of 40
    assert not is_meant((1, 1000), (8, 40))
    assert not is_meant(dtype=torch.float32)
    assert not is_meant(dropout=0.1)
    assert not is_meant(width=WIDTH // 2)


def test_attention_takes_this_way_with_packed_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    one = short_attention.attend
    monkeypatch.setattr(short_attention, "attend", lambda *given, **how: taken.append(given) or one(*given, **how))
    query, key, value, _ = (tensor.transpose(0, 1)[None] for tensor in drawn([3, 2]))
    packed_attention.attend(nn.Module(), query, key, value, packed_attention.places([3, 2]))
    assert len(taken) == 1
    packed_attention.attend(nn.Module(), query, key, value, None)
    packed_attention.attend(nn.Module(), query.float(), key.float(), value.float(), packed_attention.places([3, 2]))
    assert len(taken) == 1


@pytest.mark.parametrize("by_length", [False, True])
def test_a_packed_step_of_a_model_whose_heads_share_keys_has_the_gradient_of_separate_rows(by_length: bool) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    examples = [Example([3, 1, 4, 1, 5, 9, 2] * 6, 30), Example([2, 7, 1, 8], 2)]

    def gradient(batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = answer_logits(model, batch)
        torch.nn.functional.cross_entropy(logits.float(), batch["labels"]).backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    exact = gradient(padded(examples), torch.float32)
    assert (gradient(packed(examples, by_length=by_length), torch.bfloat16) - exact).norm() <= 0.02 * exact.norm()
