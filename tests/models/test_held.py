"""held: weights cast once give the bits of weights cast in every step, and come back as they were."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from builders import Family, examples, tuned
from stages.models import prepacked
from stages.models.held import castable, held_in_bfloat16
from stages.models.tuned import Tuned
from stages.training.objective import Objective, task_loss

FAMILIES = pytest.mark.parametrize("family", get_args(Family))
ROWS = examples([(5, 2), (1, 1), (9, 4)])


def cast(family: Family = "gpt2", **shape: Any) -> Tuned:
    return replace(tuned("slm", family=family, **shape), autocast=True)


def step(one: Tuned) -> dict[str, Tensor]:
    """The loss and the adapter's gradients."""
    objective = Objective([one], task_loss, {"slm_ft": 1.0}).train()
    torch.manual_seed(0)  # of dropout
    loss = objective(**objective.collate(ROWS))["loss"]
    loss.backward()
    found = {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}
    objective.zero_grad()
    return {"loss": loss.detach(), **found}


def weights(one: Tuned) -> dict[str, tuple[int, Tensor]]:
    named = one.model.named_parameters(remove_duplicate=False)
    return {name: (id(parameter), parameter.detach().clone()) for name, parameter in named}


@FAMILIES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_the_same_to_the_bit_and_casts_no_weight(family: Family, dropout: float) -> None:
    one = cast(family, dropout=dropout)
    expected = step(one)
    with held_in_bfloat16(one):
        assert not castable(one.model)
        found = step(one)
    assert len(found) > 4
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nor_does_it_change_a_bit_where_an_adapter_is_given_bfloat16(dropout: float) -> None:
    """As what follows attention or an activation is; the share that is kept would be rounded by half a percent."""
    one = cast("llama", dropout=dropout, layers=["o_proj", "down_proj"])
    expected = step(one)
    with held_in_bfloat16(one):
        found = step(one)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@FAMILIES
def test_afterwards_every_weight_is_what_it_was_and_ties_hold(family: Family) -> None:
    one = cast(family)
    before = weights(one)
    with held_in_bfloat16(one):
        linear = [layer for layer in one.model.modules() if isinstance(layer, nn.Linear | Conv1D)]
        frozen = [layer.weight for layer in linear if not layer.weight.requires_grad]
        assert {weight.dtype for weight in frozen} == {torch.bfloat16}
        assert one.model.get_input_embeddings().weight.dtype == torch.float32
        assert all(weight.dtype == torch.float32 for name, (_, weight) in weights(one).items() if "norm" in name)
    after = weights(one)
    assert all(torch.equal(after[name][1], before[name][1]) for name in before)
    tied = [(a, b) for a, b in combinations(before, 2) if before[a][0] == before[b][0]]
    assert len(tied) == one.model.config.tie_word_embeddings
    assert all(after[a][0] == after[b][0] for a, b in tied)


def test_weights_that_bfloat16_holds_are_not_kept_twice_and_come_back_to_the_bit() -> None:
    one = cast("llama")
    for parameter in one.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    before = weights(one)
    layer = one.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with held_in_bfloat16(one):
        assert layer.weight.dtype == torch.bfloat16
    after = weights(one)
    assert all(torch.equal(after[name][1], before[name][1]) for name in before)
    assert {value.dtype for _, value in after.values()} == {torch.float32}
    assert not any(parameter.requires_grad for name, parameter in one.model.named_parameters() if "lora" not in name)


@FAMILIES
def test_inside_layers_are_laid_out_for_the_processor_and_afterwards_they_are_their_own_again(family: Family) -> None:
    one = cast(family)
    layers = [layer for layer, name in castable(one.model) if name == "weight"]
    can = prepacked.takes(nn.Linear(2, 2).requires_grad_(False))
    with held_in_bfloat16(one):
        assert [isinstance(layer.forward, prepacked.Prepacked) for layer in layers] == [can] * len(layers)
        assert bool(torch.isnan(layers[0].weight).all()) == can  # what nothing may read
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize(("error", "packs"), [(0.0, True), (2e-4, True), (0.1, False)])
def test_products_that_round_otherwise_are_taken_where_they_are_as_near_to_float32(
    error: float, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not prepacked.takes(nn.Linear(2, 2).requires_grad_(False)):
        pytest.skip("this processor has no bfloat16 products")
    product = prepacked._product

    def other(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = product(x, weight, bias).float()
        return (found * (1 + error * torch.randn(found.shape))).bfloat16()

    monkeypatch.setattr(prepacked, "_product", other)
    one = cast("llama")
    layer = one.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with held_in_bfloat16(one):
        assert isinstance(layer.forward, prepacked.Prepacked) == packs
        assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32


@FAMILIES
def test_gradient_checkpointing_takes_the_same_way_twice(family: Family) -> None:
    one, plain = cast(family), cast(family)
    one.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with held_in_bfloat16(one, plain):
        found, expected = step(one), step(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_that_computes_in_float32_is_left_alone() -> None:
    one = tuned("slm")
    before = {name: key for name, (key, _) in weights(one).items()}
    with held_in_bfloat16(one):
        assert {name: key for name, (key, _) in weights(one).items()} == before


def test_whatever_ends_the_stage_the_weights_come_back() -> None:
    one = cast()
    with pytest.raises(KeyboardInterrupt), held_in_bfloat16(one):
        raise KeyboardInterrupt
    assert {parameter.dtype for parameter in one.model.parameters()} == {torch.float32}


class Beside(nn.Module):
    """Stands in for layers that use a linear layer's weight in a way that autocast does not reach."""

    def __init__(self, layer: nn.Module, *, fails: bool) -> None:
        super().__init__()
        self.layer, self.fails = layer, fails

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layer.weight
        if self.fails:
            return self.layer(x) + torch.lerp(weight, weight.float(), 0.5).sum()
        return self.layer(x) + 1000 * (weight - weight.bfloat16()).abs().sum()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_would_say_something_else_is_left_as_it_is(fails: bool) -> None:
    one = cast("llama")
    block = one.model.get_submodule("base_model.model.model.layers.0.mlp")
    block.up_proj = Beside(block.up_proj, fails=fails)
    before = {name: key for name, (key, _) in weights(one).items()}
    with held_in_bfloat16(one):
        assert {name: key for name, (key, _) in weights(one).items()} == before
        step(one)
