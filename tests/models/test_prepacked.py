"""prepacked: the numbers of the layer itself, to the bit, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.models import prepacked

pytestmark = pytest.mark.skipif(
    not prepacked.takes(nn.Linear(2, 2).requires_grad_(False)), reason="this processor has no bfloat16 products"
)


def layer(kind: str, bias: bool = True) -> Any:
    torch.manual_seed(0)
    one: Any = Conv1D(48, 32) if kind == "conv1d" else nn.Linear(32, 48, bias=bias)
    nn.init.normal_(one.weight)
    if bias:
        nn.init.normal_(one.bias)
    return one.to(torch.bfloat16).requires_grad_(False)


def asked(one: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    found = one(x)
    torch.manual_seed(1)
    found.backward(torch.randn(found.shape).to(found.dtype))
    assert x.grad is not None
    return found.detach(), x.grad


@pytest.mark.parametrize("kind", ["conv1d", "linear"])
@pytest.mark.parametrize("shape", [(1, 32), (7, 32), (2, 5, 32), (300, 32), (0, 32), (1, 0, 32)])
def test_results_and_gradients_are_those_of_the_layer_to_the_bit(kind: str, shape: tuple[int, ...]) -> None:
    one, x = layer(kind), torch.randn(shape).bfloat16()
    product = prepacked.Prepacked(one, one.weight.data)
    for found, expected in zip(asked(product, x), asked(one, x), strict=True):
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


def test_a_layer_without_a_bias_and_what_does_not_lie_in_one_piece() -> None:
    one = layer("linear", bias=False)
    product = prepacked.Prepacked(one, one.weight.data)
    for x in (
        torch.randn(32, 9).bfloat16().t(),
        torch.randn(4, 6, 80).bfloat16()[..., 48:],
        torch.ones(1, 1).bfloat16().expand(5, 32),
    ):
        assert torch.equal(product(x), one(x))
    x = torch.randn(3, 32).bfloat16().requires_grad_()
    product(x).sum().backward()  # a gradient that is one number, shown many times
    assert torch.equal(x.grad, torch.ones(3, 48).bfloat16() @ one.weight)


@pytest.mark.parametrize("kind", ["conv1d", "linear"])
def test_float32_is_cast_as_autocast_casts_it(kind: str) -> None:
    one, x = layer(kind), torch.randn(5, 32)
    product = prepacked.Prepacked(one, one.weight.data)
    found = asked(product, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = asked(one, x)
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["conv1d", "linear"])
def test_the_weight_comes_back_to_the_bit(kind: str) -> None:
    one = layer(kind)
    assert torch.equal(prepacked.Prepacked(one, one.weight.data).weight(), one.weight)


def test_the_way_back_is_laid_out_only_where_a_gradient_goes_it() -> None:
    one = layer("linear")
    product = prepacked.Prepacked(one, one.weight.data)
    product(torch.randn(3, 32))
    assert "back" not in vars(product)
    asked(product, torch.randn(3, 32))
    assert "back" in vars(product)


def test_layers_that_learn_or_have_ways_of_their_own_are_left_alone() -> None:
    class Other(nn.Linear):
        """Of some library."""

    hooked = layer("linear")
    hooked.forward = lambda x: x
    learning = layer("linear")
    learning.bias.requires_grad_()
    assert prepacked.takes(layer("linear"))
    assert prepacked.takes(layer("conv1d"))
    assert not prepacked.takes(layer("linear").requires_grad_())
    assert not prepacked.takes(learning)
    assert not prepacked.takes(hooked)
    assert not prepacked.takes(Other(2, 2).requires_grad_(False))
    assert not prepacked.takes(nn.Linear(2, 2, device="meta").requires_grad_(False))
