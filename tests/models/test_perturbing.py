"""perturbing: how far embeddings are moved, which, and where to."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from builders import Family, examples, tuned
from stages.data.examples import Example
from stages.models import packing
from stages.models.perturbing import Ascent, Perturbation
from stages.models.tuned import Tuned

ROWS = examples([(5, 2), (1, 1), (9, 4), (3, 1), (4, 3)])
FAMILIES = pytest.mark.parametrize("family", get_args(Family))


def climb(one: Tuned, batch: packing.Batch, rows: list[Example], ascent: Ascent) -> Tensor:
    """The change of a batch's embeddings, [tokens of all rows, width], padding left out."""
    where = packing.prompts(rows, batch)
    found = Perturbation(one.model, ascent, where)
    for _ in range(ascent.steps):
        with found.applied():
            logits = packing.answer_logits(one.model, batch)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        found.ascend(torch.autograd.grad(loss, found.change)[0])
    assert found.change is not None
    mask = batch["attention_mask"]
    return found.change[mask == 1] if mask.dim() == 2 else found.change[0]


def by_hand(one: Tuned, rows: list[Example], *, radius: float, sizes: list[float]) -> Tensor:
    """The same from the formula, row by row and token by token, through inputs_embeds: no batch and no hook."""
    whole = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        embedded = one.model.get_input_embeddings()(ids).detach()
        moved = torch.zeros_like(embedded)
        for size in sizes:
            at = (embedded + moved).requires_grad_()
            answers = one.model(inputs_embeds=at).logits[0, row.prompt_tokens - 1 : -1]
            loss = torch.nn.functional.cross_entropy(answers, ids[0, row.prompt_tokens :], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, at)
            for token in range(row.prompt_tokens):
                length = embedded[0, token].norm()
                step = moved[0, token] + size * length * gradient[0, token] / gradient[0, token].norm()
                moved[0, token] = step if step.norm() <= radius * length else step * radius * length / step.norm()
        whole.append(moved[0])
    return torch.cat(whole)


@FAMILIES
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_change_is_that_of_a_plain_loop_in_any_family_and_layout(family: Family, layout: str) -> None:
    one = tuned("slm", family=family, width=16)
    one.model.eval()
    if layout == "packed" and not one.longest_packed:
        pytest.skip(f"{family} takes no packed rows")
    batch = getattr(packing, layout)(ROWS)
    found = climb(one, batch, ROWS, Ascent(0.2, steps=3))
    expected = by_hand(one, ROWS, radius=0.2, sizes=[0.1, 0.1, 0.1])  # 2 radius / (steps + 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("ascent", "sizes"), [(Ascent(0.2), [0.2]), (Ascent(0.2, 2, 0.3), [0.3, 0.3])])
def test_one_step_goes_to_the_radius_and_a_longer_one_is_brought_back(ascent: Ascent, sizes: list[float]) -> None:
    one = tuned("slm", width=16)
    found = climb(one, packing.packed(ROWS), ROWS, ascent)
    torch.testing.assert_close(found, by_hand(one, ROWS, radius=0.2, sizes=sizes), rtol=1e-3, atol=1e-5)
    lengths = torch.cat([one.model.get_input_embeddings()(torch.tensor(row.input_ids)) for row in ROWS]).norm(dim=-1)
    is_prompt = torch.cat([torch.arange(len(row.input_ids)) < row.prompt_tokens for row in ROWS])
    torch.testing.assert_close(found.norm(dim=-1), 0.2 * lengths * is_prompt)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_leaves_its_radius_and_none_of_an_answer_moves(steps: int, dtype: torch.dtype) -> None:
    one = tuned("slm", width=16)
    one.model.to(dtype)
    batch = packing.padded(ROWS)
    found = climb(one, batch, ROWS, Ascent(0.1, steps, 0.09))
    ids = batch["input_ids"][batch["attention_mask"] == 1]
    shares = found.norm(dim=-1) / one.model.get_input_embeddings()(ids).float().norm(dim=-1)
    is_prompt = packing.prompts(ROWS, batch)[batch["attention_mask"] == 1]
    assert float(shares[is_prompt].max()) <= 0.1 * (1 + 1e-6)
    assert float(shares[is_prompt].min()) > (0.01 if steps > 1 else 0.0899)
    assert float(shares[~is_prompt].max()) == 0


def test_a_token_whose_gradient_is_zero_stays_and_a_tiny_gradient_points_as_a_large_one() -> None:
    one = tuned("slm", width=16)
    ids, where = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.bool)
    way = torch.randn(16, generator=torch.Generator().manual_seed(1))
    found = Perturbation(one.model, Ascent(0.1), where)
    with found.applied():
        one.model(input_ids=ids)
    found.ascend(torch.stack([torch.zeros(16), 1e-30 * way, 1e30 * way])[None])
    lengths = one.model.get_input_embeddings()(ids)[0].norm(dim=-1)
    change: Any = found.change
    assert not change[0, 0].any()
    for token in (1, 2):
        torch.testing.assert_close(change[0, token], 0.1 * lengths[token] * way / way.norm())


def test_outside_the_model_is_as_it_was() -> None:
    one = tuned("slm", width=16)
    one.model.eval()
    ids = torch.tensor([[3, 4, 5]])
    before = one.model(input_ids=ids).logits
    found = Perturbation(one.model, Ascent(0.5), torch.ones(1, 3, dtype=torch.bool))
    with found.applied():
        assert torch.equal(one.model(input_ids=ids).logits, before)  # it begins at zero
    assert found.change is not None
    found.ascend(torch.ones_like(found.change))
    with found.applied():
        assert not torch.equal(one.model(input_ids=ids).logits, before)
    assert torch.equal(one.model(input_ids=ids).logits, before)
