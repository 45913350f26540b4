"""The neurons of a model's MLPs: judged by what they add, and taken out of every kind of layer."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from builders import Family, tiny_model
from stages.runtime.errors import UsageProblem
from stages.runtime.events import ignore
from stages.shearing.neurons import mlps_of, narrow, narrow_configuration, norms

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(ROWS)).logits
    return found


@pytest.mark.parametrize("family", get_args(Family))
def test_a_norm_is_that_of_what_a_neuron_adds_over_all_tokens(family: Family) -> None:
    model = tiny_model(family)
    taken: list[list[torch.Tensor]] = [[] for _ in mlps_of(model)]
    for number, mlp in enumerate(mlps_of(model)):
        mlp.taker.register_forward_pre_hook(lambda _, args, number=number: taken[number].append(args[0].double()))
    found = norms(model, ROWS, autocast=False, report=ignore)
    for mlp, seen, norm in zip(mlps_of(model), taken, found, strict=True):
        columns = mlp.taker.weight if isinstance(mlp.taker, Conv1D) else mlp.taker.weight.T  # [neurons, out]
        states = torch.cat([one.reshape(-1, mlp.width) for one in seen])
        added = states[:, :, None] * columns.double()[None]  # of each token and neuron, what it adds
        torch.testing.assert_close(norm, added.square().sum((0, 2)).sqrt())


@pytest.mark.parametrize("family", get_args(Family))
def test_neurons_that_add_nothing_go_first_and_leave_the_model_what_it_says(family: Family) -> None:
    model = tiny_model(family)
    width = mlps_of(model)[0].width
    idle = torch.arange(0, width, 3)
    for mlp in mlps_of(model):
        with torch.no_grad():
            (mlp.taker.weight if isinstance(mlp.taker, Conv1D) else mlp.taker.weight.T)[idle] = 0.0
    before = logits(model)
    narrow(model, norms(model, ROWS, autocast=False, report=ignore), width - len(idle))
    assert [mlp.width for mlp in mlps_of(model)] == [width - len(idle)] * 2
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("family", get_args(Family))
def test_a_narrow_model_is_the_one_that_its_configuration_makes(family: Family) -> None:
    model = tiny_model(family)
    config = AutoConfig.for_model(**model.config.to_dict())
    narrow(model, norms(model, ROWS, autocast=False, report=ignore), 5)
    narrow_configuration(config, 5)
    made = AutoModelForCausalLM.from_config(config)
    made.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(made.eval()), logits(model))


def test_of_equal_neurons_the_first_are_kept() -> None:
    model = tiny_model("llama")
    before = [mlp.taker.weight.clone() for mlp in mlps_of(model)]
    narrow(model, [torch.tensor([1.0, 2.0] + [0.5] * (mlp.width - 2)) for mlp in mlps_of(model)], 4)
    for mlp, weight in zip(mlps_of(model), before, strict=True):
        assert torch.equal(mlp.taker.weight, weight[:, :4])


def test_mlps_that_are_not_known_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj, model.model.layers[1].mlp.up = None, model.model.layers[1].mlp.up_proj
    with pytest.raises(UsageProblem, match=r"how llama makes the neurons of its MLPs is not known here"):
        mlps_of(model)
    uneven = tiny_model("llama")
    uneven.model.layers[0].mlp.down_proj = nn.Linear(3, uneven.config.hidden_size)
    with pytest.raises(UsageProblem, match="not known"):
        mlps_of(uneven)
