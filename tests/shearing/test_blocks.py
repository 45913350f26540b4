"""The blocks of a model: found whatever they are called, chosen by influence, taken out with what is said of them."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from builders import Family, tiny_model
from stages.runtime.errors import UsageProblem
from stages.runtime.events import ignore
from stages.shearing.blocks import blocks_of, influence, most_influential, shorten, shortened

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]


@pytest.mark.parametrize("family", get_args(Family))
def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_what_comes_out(family: Family) -> None:
    model = tiny_model(family, layers=6)
    blocks = blocks_of(model).blocks
    seen: list[torch.Tensor] = []  # what goes into each block, and into whatever comes after the last one
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or kwargs["hidden_states"],)[0][0]), with_kwargs=True
        )
        for block in blocks
    ]
    hooks.append(
        blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    )
    with torch.no_grad():
        model(torch.tensor(ROWS))
    for hook in hooks:
        hook.remove()
    expected = [
        1 - float(F.cosine_similarity(before.double(), after.double(), dim=-1).mean())
        for before, after in itertools.pairwise(seen)
    ]
    found = influence(model, ROWS, autocast=False, report=ignore)
    assert found == pytest.approx(expected, abs=1e-5)
    assert min(found) > 1e-3


def test_a_block_that_does_nothing_has_no_influence_and_goes_first() -> None:
    model = tiny_model("llama", layers=5)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        nn.init.zeros_(blocks_of(model).blocks[2].get_submodule(name).weight)
    found = influence(model, ROWS, autocast=False, report=ignore)
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert most_influential(found, 4) == [0, 1, 3, 4]
    cut = shortened(model, [0, 1, 3, 4])
    with torch.no_grad():
        torch.testing.assert_close(cut(torch.tensor(ROWS)).logits, model(torch.tensor(ROWS)).logits)


def test_of_equal_blocks_the_later_go_first() -> None:
    assert most_influential([0.5, 0.2, 0.2, 0.9, 0.2], 3) == [0, 1, 3]


@pytest.mark.parametrize("family", get_args(Family))
def test_a_cut_model_has_the_kept_blocks_and_shares_nothing(family: Family) -> None:
    model = tiny_model(family, layers=6)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    cut = shortened(model, [1, 3, 5])
    assert len(blocks_of(model).blocks) == model.config.num_hidden_layers == 6
    ours, theirs = blocks_of(cut).blocks, blocks_of(model).blocks
    for number, kept in enumerate([1, 3, 5]):
        for one, other in zip(ours[number].parameters(), theirs[kept].parameters(), strict=True):
            assert torch.equal(one, other)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (cut.get_input_embeddings().weight is cut.get_output_embeddings().weight) == tied
    with torch.no_grad():
        for weight in cut.parameters():
            weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", get_args(Family))
def test_a_cut_model_is_the_one_that_its_configuration_makes(family: Family) -> None:
    model = tiny_model(family, layers=6)
    cut = shortened(model, [0, 5])  # of Gemma, the last one alone attends to all
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**cut.config.to_dict())).eval()
    made.load_state_dict(cut.state_dict())
    with torch.no_grad():
        assert torch.equal(made(torch.tensor(ROWS)).logits, cut(torch.tensor(ROWS)).logits)


def test_what_a_configuration_says_of_each_layer_is_cut_likewise() -> None:
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=5, layer_types=types, eos_token_id=[1, 2, 3, 4, 5])
    shorten(config, [0, 2, 4])
    assert config.num_hidden_layers == 3
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert config.eos_token_id == [1, 2, 3, 4, 5]


def test_a_model_whose_layers_stand_in_no_one_list_is_refused() -> None:
    config = AutoConfig.for_model("xlm", n_layers=3, emb_dim=16, n_heads=2, vocab_size=40)
    with pytest.raises(UsageProblem, match=r"\(xlm\) has 4 lists of 3 layers") as refused:
        blocks_of(AutoModelForCausalLM.from_config(config))
    assert "Llama" in str(refused.value.mend)
