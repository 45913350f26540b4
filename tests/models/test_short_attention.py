"""Attention over short rows in bfloat16: torch's own forwards, and no further from the exact gradient backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from stages.data.examples import Example
from stages.models import short_attention
from stages.models.packing import answer_logits, packed, padded

ROWS, HEADS, WIDTH = 3, 4, 16


def drawn(tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> list[Tensor]:
    """Query, key, value and a gradient, in the memory layout that packed rows have."""
    torch.manual_seed(seed)
    shape = (ROWS, tokens, HEADS, WIDTH)
    return [torch.randn(shape).to(torch.bfloat16).to(dtype).transpose(1, 2) for _ in range(4)]


def gradients(attend: object, tensors: list[Tensor], scale: float | None) -> list[Tensor]:
    leaves = [one.detach().requires_grad_() for one in tensors[:3]]
    attend(*leaves, scale=scale).backward(tensors[3])  # type: ignore[operator]
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def torchs(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


@pytest.mark.parametrize("tokens", [1, 2, 37, 128])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_gradients_are_no_further_from_the_exact_ones_than_those_of_torch(tokens: int, scale: float | None) -> None:
    exact = gradients(torchs, drawn(tokens, torch.float64), scale)
    ours = gradients(short_attention.attend, drawn(tokens), scale)
    theirs = gradients(torchs, drawn(tokens), scale)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - right).norm() <= 1.05 * (other - right).norm() + 1e-6 * right.norm()


def test_the_forward_pass_is_that_of_torch_to_the_bit() -> None:
    query, key, value, _ = drawn(21)
    query.requires_grad_()
    assert torch.equal(short_attention.attend(query, key, value), torchs(query, key, value, None))


def test_it_is_meant_for_short_rows_in_bfloat16_that_will_go_back_and_for_nothing_else() -> None:
    def is_meant(
        tokens: int = 8, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0, learns: bool = True
    ) -> bool:
        query, key, value, _ = drawn(tokens, dtype)
        return short_attention.is_meant_for(query.requires_grad_(learns), key, value, dropout=dropout)

    assert is_meant()
    assert is_meant(short_attention.LONGEST)
    assert not is_meant(short_attention.LONGEST + 1)
    assert not is_meant(dtype=torch.float32)
    assert not is_meant(dropout=0.1)
    assert not is_meant(learns=False)
    with torch.no_grad():
        assert not is_meant()


def test_a_packed_step_of_a_model_whose_heads_share_keys_has_the_gradient_of_separate_rows() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    examples = [Example([3, 1, 4, 1, 5, 9, 2], 3), Example([2, 7, 1, 8], 2)]

    def gradient(batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = answer_logits(model, batch)
        torch.nn.functional.cross_entropy(logits.float(), batch["labels"]).backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    exact = gradient(padded(examples), torch.float32)
    assert (gradient(packed(examples), torch.bfloat16) - exact).norm() <= 0.02 * exact.norm()
