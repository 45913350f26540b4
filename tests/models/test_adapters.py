"""adapters: fresh ones from a seed, in and out of a model exactly, readable by PEFT, proven to act."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from builders import AGREEMENT, ROOT, Family, random_adapter, tiny_model, tuned
from stages.artefacts.adapter_files import Tensors
from stages.artefacts.draft import Draft
from stages.artefacts.publishing import publish
from stages.models import adapters
from stages.parties.party import Party
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.workspace.agreement import Lora, Model
from stages.workspace.paths import Workspace

FAMILIES = pytest.mark.parametrize("family", get_args(Family))
IDS = torch.tensor([[2, 7, 1, 8, 2, 8]])
TINY = Model(model="tiny", lora=Lora(r=4, alpha=8))


def fresh(seed: int, *, before: int = 3, **shape: int) -> Tensors:
    """A new adapter, in a model that held another one before."""
    model = tuned("slm", **shape).model
    adapters.put(model, random_adapter(adapters.layout(model), seed=before))
    adapters.make_fresh(model, seed)
    return adapters.take(model)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_fresh_adapter_changes_nothing_yet() -> None:
    model = tuned("slm").model
    adapters.make_fresh(model, 1)
    for name, tensor in adapters.take(model).items():
        assert tensor.any() == ("lora_A" in name)
    assert torch.equal(model(input_ids=IDS).logits, tiny_model(seed=1)(input_ids=IDS).logits)


def test_a_fresh_adapter_is_drawn_from_its_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    expected = fresh(7)
    torch.manual_seed(2)
    torch.rand(5)
    assert same(fresh(7, before=99), expected)
    assert not same(fresh(8), expected)


def test_drawing_a_fresh_adapter_leaves_the_random_numbers_of_others_alone() -> None:
    model = tuned("slm").model
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    adapters.make_fresh(model, 5)
    assert torch.equal(torch.rand(3), expected)


def test_a_is_drawn_from_kaiming_uniform_as_peft_does() -> None:
    # kaiming_uniform_(a = sqrt 5): uniform within sqrt(6 / ((1 + 5) inputs)) = 1/sqrt(inputs); deviation bound/sqrt 3
    bound = 256**-0.5
    ours = [tensor for name, tensor in fresh(1, width=256).items() if "lora_A" in name]
    model = get_peft_model(tiny_model(width=256), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"]))
    pefts = [p.detach().numpy() for name, p in model.named_parameters() if "lora_A" in name]
    for drawn in (ours, pefts):
        values = np.concatenate([tensor.ravel() for tensor in drawn])  # 2 layers x 4 x 256 = 2048
        assert 0.99 * bound < np.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert values.mean() == pytest.approx(0, abs=0.1 * bound)
    assert not np.array_equal(*ours), "two layers have the same A"


@pytest.mark.parametrize(
    ("family", "layers"),
    [("gpt2", ["c_attn"]), *((family, ["q_proj", "v_proj"]) for family in ("llama", "gemma3_text", "qwen2", "opt"))],
)
def test_pefts_default_layers_are_those_that_the_template_names(family: Family, layers: list[str]) -> None:
    assert adapters.modules(tuned("slm", family=family).model) == layers
    comment = " ".join((ROOT / "workspace_template/fedcollm.toml").read_text().replace("#", "").split())
    assert "for Llama, Gemma, Mistral, Qwen2 and OPT q_proj and v_proj alone, for GPT-2 c_attn" in comment


def test_layers_that_peft_names_by_a_pattern_are_told_by_their_names() -> None:
    pattern = r".*\.(q_proj|v_proj)"
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=pattern))
    assert adapters.modules(model) == ["q_proj", "v_proj"]


@FAMILIES
def test_what_is_put_in_is_taken_out_bit_for_bit(family: Family) -> None:
    model = tuned("slm", family=family).model
    tensors = random_adapter(adapters.layout(model), seed=11)
    first = next(iter(tensors.values()))
    first.flat[:4] = [-0.0, 1e-40, np.finfo(np.float32).max, np.nextafter(np.float32(1), np.float32(2))]
    adapters.put(model, tensors)
    assert same(adapters.take(model), tensors)


def test_what_is_taken_is_a_copy() -> None:
    model = tuned("slm").model
    taken = adapters.take(model)
    adapters.make_fresh(model, 1)
    assert all(tensor.any() for tensor in taken.values())


@pytest.mark.parametrize("extra", [False, True], ids=["one missing", "one too many"])
def test_a_tensor_that_does_not_arrive_is_noticed(extra: bool) -> None:
    model = tuned("slm").model
    tensors = random_adapter(adapters.layout(model), seed=11)
    name, tensor = sorted(tensors.items())[0]
    if extra:
        tensors[name.replace(".h.0.", ".h.9.")] = tensor
    else:
        del tensors[name]
    with pytest.raises(BadNumbers, match="did not arrive"):
        adapters.put(model, tensors)


@FAMILIES
def test_a_published_folder_gives_the_same_logits_by_peft_itself(family: Family, tmp_path: Path) -> None:
    (tmp_path / "fedcollm.toml").write_text(AGREEMENT)
    workspace, one = Workspace(tmp_path), tuned("slm", family=family)
    contents = adapters.as_files(one.model, workspace.agreement.slm.lora)
    count = adapters.count(one.model)
    folder = workspace.broadcast(1)
    publish(
        folder,
        contents,
        Draft(
            stage="broadcast",
            round=1,
            parents={},
            base=one.identity,
            parameters=count,
        ),
        by=Party.server(workspace),
    )
    theirs = PeftModel.from_pretrained(tiny_model(family, seed=1), folder).eval()
    assert torch.equal(theirs(input_ids=IDS).logits, one.model(input_ids=IDS).logits)
    assert same(adapters.take(theirs), adapters.take(one.model))


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_is_trainable_and_it_is_float32(family: Family, dtype: torch.dtype) -> None:
    model = adapters.attach(tiny_model(family).to(dtype), TINY)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtype)


def test_target_modules_that_do_not_exist_are_answered_with_those_that_do() -> None:
    with pytest.raises(UsageProblem, match="query") as caught:
        adapters.attach(tiny_model(), Model(model="tiny", lora=Lora(target_modules=["query"])))
    assert str(caught.value.mend) == "set lora.target_modules among: c_attn, c_fc, c_proj"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["c_attn", "c_prjo"], "'c_prjo' fits no layer"),
        (["c_attn", ""], "'' fits no layer"),
        (["c_attn", "c_attn"], "c_attn is named 2 times"),
        (["c_attn", "attn"], "attn fits transformer.h.0.attn, which is no linear layer but GPT2Attention"),
        (["c_attn", "wpe"], "wpe fits transformer.wpe, which is no linear layer but Embedding"),
        (["c_attn", "h.1.mlp.c_fc"], "h.1.mlp.c_fc fits 1 of the 2 layers in transformer.h"),
    ],
)
def test_each_of_the_target_modules_must_fit_linear_layers_in_every_block(targets: list[str], said: str) -> None:
    base = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    with pytest.raises(UsageProblem) as caught:
        adapters.attach(base, Model(model="tiny", lora=Lora(target_modules=targets)))
    assert said in caught.value.message
    assert str(caught.value.mend) == "set lora.target_modules among: c_attn, c_fc, c_proj"


@pytest.mark.parametrize(
    ("settings", "lora", "expected"),
    [
        # 12 layers x r (768 inputs + 3 x 768 outputs)
        ({"model_type": "gpt2"}, Lora(r=8, target_modules=["c_attn"]), 12 * 8 * (768 + 2304)),
        # 24 layers x 2 modules x r (2048 + 2048)
        (
            {"model_type": "opt", "num_hidden_layers": 24, "hidden_size": 2048, "word_embed_proj_dim": 2048}
            | {"num_attention_heads": 32, "ffn_dim": 8192},
            Lora(r=16, target_modules=["q_proj", "v_proj"]),
            24 * 2 * 16 * 4096,
        ),
    ],
    ids=["0.29 M for GPT-2", "3.15 M for OPT-1.3B"],
)
def test_what_travels_is_as_large_as_table_3_says(settings: dict[str, Any], lora: Lora, expected: int) -> None:
    assert expected in (294_912, 3_145_728)
    with torch.device("meta"):  # shapes without memory
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    assert adapters.count(adapters.attach(base, Model(model="tiny", lora=lora))) == expected


def norm(*arrays: np.ndarray) -> float:
    return float(np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in arrays)))


def test_training_that_did_something_is_told_by_its_norms() -> None:
    before = {"x.lora_A.weight": np.ones((1, 4), np.float32), "x.lora_B.weight": np.zeros((2, 1), np.float32)}
    after = {"x.lora_A.weight": np.full((1, 4), 3, np.float32), "x.lora_B.weight": np.full((2, 1), 3, np.float32)}
    # moved: sqrt(4 x 2^2 + 2 x 3^2) = sqrt 34; B: sqrt(2 x 3^2) = sqrt 18
    found = adapters.check_trained(before, after)
    assert found == pytest.approx({"update_norm": 34**0.5, "lora_b_norm": 18**0.5})


def test_an_adapter_whose_b_is_zero_is_not_trained() -> None:
    before, after = fresh(1), fresh(2)
    with pytest.raises(BadNumbers, match="B is all zero") as caught:
        adapters.check_trained(before, after)
    assert "more steps" in str(caught.value.mend)


def test_an_adapter_that_stayed_where_it_was_is_not_trained() -> None:
    tensors = random_adapter(adapters.layout(tuned("slm").model), seed=1)
    with pytest.raises(BadNumbers, match="where it was"):
        adapters.check_trained(tensors, {name: tensor.copy() for name, tensor in tensors.items()})


def test_an_adapter_that_acts_is_told_by_the_largest_change_of_a_logit() -> None:
    model = tuned("slm").model
    with torch.no_grad():
        change = model(input_ids=IDS).logits - tiny_model(seed=1)(input_ids=IDS).logits
    assert adapters.check_acts(model.train(), IDS[0].tolist()) == pytest.approx(change.abs().max().item())
    assert model.training


def test_an_adapter_that_does_not_act_is_refused() -> None:
    model = tuned("slm").model
    adapters.make_fresh(model, 1)
    with pytest.raises(BadNumbers, match="does not change the model"):
        adapters.check_acts(model, IDS[0].tolist())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_holds_no_numbers_is_never_written(value: float) -> None:
    model = tuned("slm").model
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = value
    with pytest.raises(BadNumbers, match="holds NaN or infinity"):
        adapters.as_files(model, TINY.lora)


def test_an_update_is_shortened_as_one_vector_and_keeps_its_direction() -> None:
    before = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([[5.0]], np.float32)}
    after = {"a": np.array([4.0, 2.0], np.float32), "b": np.array([[9.0]], np.float32)}  # moved by 3, 0 and 4: norm 5
    short = adapters.shortened(before, after, 1.0)
    np.testing.assert_allclose(short["a"], [1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(short["b"], [[5.8]], rtol=1e-6)
    assert short["a"].dtype == np.float32
    assert all(np.array_equal(adapters.shortened(before, after, 5.0)[name], after[name]) for name in after)
