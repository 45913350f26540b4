"""fused: only what is GELU is replaced by GELU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from builders import tiny_model
from stages.models.fused import FusedGELU, fuse, fused_in


@pytest.mark.parametrize(
    ("name", "approximate"),
    [
        ("gelu_new", "tanh"),
        ("gelu_fast", "tanh"),
        ("gelu_accurate", "tanh"),
        ("gelu_pytorch_tanh", "tanh"),
        ("gelu_python_tanh", "tanh"),
        ("gelu", "none"),
        ("gelu_python", "none"),
        ("quick_gelu", None),
        ("gelu_10", None),
        ("silu", None),
        ("relu2", None),
        ("relu", None),
        ("laplace", None),
        ("xielu", None),
    ],
)
def test_an_activation_is_replaced_where_it_is_torchs_own_gelu(name: str, approximate: str | None) -> None:
    model = nn.Sequential(ACT2FN[name])
    before, x = model[0], torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    fuse(model)
    assert getattr(model[0], "approximate", None) == approximate if approximate else model[0] is before
    torch.testing.assert_close(model(x), before(x), rtol=1e-5, atol=1e-6)


def test_all_of_a_models_are_replaced_and_counted_and_its_logits_stay() -> None:
    model, ids = tiny_model("gpt2"), torch.tensor([[3, 1, 4, 1, 5]])
    before = model(input_ids=ids).logits
    fuse(model)
    assert fused_in(model) == {"NewGELUActivation": 2}
    assert isinstance(model.transformer.h[0].mlp.act, FusedGELU)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)


def test_the_fused_one_is_nearer_to_the_truth_in_bfloat16() -> None:
    x = torch.linspace(-4, 4, 2001)
    truth = ACT2FN["gelu_new"](x.double())
    [fused] = [nn.Sequential(ACT2FN["gelu_new"])]
    fuse(fused)
    apart = [(one(x.bfloat16()).double() - truth).abs().mean() for one in (ACT2FN["gelu_new"], fused)]
    assert apart[1] < apart[0]
