"""Healing's losses and gradients, beside the same written out plainly; what of it trains, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from builders import Family, tiny_model
from stages.artefacts.manifest import BaseIdentity
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.shearing import healing
from stages.shearing.divergence import Heads, divergence
from stages.shearing.healing import Healing, as_examples, check_head
from stages.training.stopping import refuse_runaways, snapshot

ROWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3], [2, 7, 1, 8, 2, 8, 1, 8]]


def held(model: Any) -> Tuned:
    nobody, no_tokenizer = BaseIdentity(architecture="tiny", weights_sha256="0" * 64, tokenizer_sha256="0" * 64), None
    return Tuned("slm", model, no_tokenizer, nobody, autocast=False, longest_packed=0)  # type: ignore[arg-type]


def pair(family: Family, cap: float | None = None) -> tuple[Any, Any, Healing]:
    """A student, a teacher and what trains the one by the other; neither drops out."""
    student, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
    for model in (student, teacher):
        if cap:
            model.config.final_logit_softcapping = cap
    teacher.requires_grad_(False)
    return student, teacher, Healing(held(student), held(teacher))


def plainly(student: Any, teacher: Any) -> dict[str, torch.Tensor]:
    """Both losses a token, from whole matrices of logits that the models make themselves."""
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        taught = teacher(ids, output_hidden_states=True)
    said = student(ids, output_hidden_states=True)
    logs, wanted = (F.log_softmax(one.logits[:, :-1].double(), dim=-1) for one in (said, taught))
    tokens = len(ROWS) * (len(ROWS[0]) - 1)
    cosine = F.cosine_similarity(said.hidden_states[-1][:, :-1], taught.hidden_states[-1][:, :-1], dim=-1)
    divergence = F.kl_div(logs, wanted, reduction="sum", log_target=True) / tokens
    return {"slm_kd": divergence, "slm_hidden": (1 - cosine).mean()}


@pytest.mark.parametrize("at_once", [40 * 4, 1 << 24], ids=["four answers at a time", "all at once"])
@pytest.mark.parametrize(("family", "cap"), [*((family, None) for family in get_args(Family)), ("gemma3_text", 2.0)])
def test_losses_and_gradients_are_those_of_whole_matrices(
    family: Family, cap: float | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "LOGITS_AT_ONCE", at_once)
    student, teacher, objective = pair(family, cap)
    expected = plainly(student, teacher)
    (expected["slm_kd"] + expected["slm_hidden"]).backward()
    gradients = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()

    objective.eval()
    loss = objective(**objective.collate(as_examples(ROWS)))["loss"]
    loss.backward()
    found = objective.pop_losses()
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    assert float(loss) == pytest.approx(sum(found.values()), rel=1e-6)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-5)
    assert all(weight.grad is None for weight in teacher.parameters())


def test_the_gradient_is_that_of_autograd_and_as_steep_as_the_loss_that_it_is_part_of() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, taught = (torch.randn(7, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    weight, known = (torch.randn(9, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    heads = Heads(lambda few: few @ weight.T, lambda few: few @ known.T, [weight])
    plain = F.kl_div(
        (hidden @ weight.T).log_softmax(-1), (taught @ known.T).log_softmax(-1), reduction="sum", log_target=True
    )
    for at_once in (1, 3, 7, 100):
        found = divergence(hidden, taught, heads, at_once=at_once)
        torch.testing.assert_close(found.double(), plain.detach(), rtol=1e-6, atol=0)
        ours = torch.autograd.grad(3 * found, leaves)
        theirs = torch.autograd.grad(3 * plain, leaves, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


def test_a_head_that_is_frozen_passes_its_gradient_on_and_gets_none() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden, taught, weight = (torch.randn(5, 4, generator=draw) for _ in range(3))
    heads = Heads(lambda few: few @ weight.T, lambda few: few @ weight.T, [])
    divergence(hidden.requires_grad_(), taught, heads, at_once=2).backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


def test_a_model_that_says_what_its_teacher_says_has_nothing_to_learn() -> None:
    student, teacher, objective = pair("llama")
    student.load_state_dict(teacher.state_dict())
    assert objective.measure(as_examples(ROWS), 2) == pytest.approx({"slm_kd": 0, "slm_hidden": 0}, abs=1e-6)


def test_all_weights_of_the_student_train_and_none_of_the_teacher() -> None:
    student, teacher, objective = pair("gpt2")
    trained = objective.adapter_parameters("slm")
    assert {id(one) for one in trained} == {id(one) for one in student.parameters()}
    state = objective.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == sum(one.numel() for one in student.parameters())
    objective.train()
    assert student.training
    assert not teacher.training


def test_of_a_whole_model_no_further_copy_is_kept_and_a_weight_beyond_float16_is_refused() -> None:
    student, _, objective = pair("llama")
    assert snapshot(objective) == {}
    better, worse = {"slm_kd": 1.0, "slm_hidden": 1.0}, {"slm_kd": 2.0, "slm_hidden": 1.0}
    refuse_runaways(objective, {}, better, worse)
    with torch.no_grad():
        student.lm_head.weight[0, 0] = 1e5
    with pytest.raises(BadNumbers, match=r"the SLM has a weight of 1e\+05; float16 ends at 65504"):
        refuse_runaways(objective, {}, better, worse)


@pytest.mark.parametrize("family", get_args(Family))
def test_the_output_layer_of_each_family_is_known(family: Family) -> None:
    check_head(tiny_model(family), ROWS[0])


def test_an_output_layer_that_does_more_is_refused() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("cohere", vocab_size=40, initializer_range=0.2, logit_scale=0.0625, **shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageProblem, match="how cohere makes logits") as refused:
        check_head(model, ROWS[0])
    assert "without --heal" in str(refused.value.mend)
