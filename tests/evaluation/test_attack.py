"""attack: which questions stay right is what a plain loop finds, answer by answer, with one change for all of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from builders import Family, tiny_model
from stages.evaluation.attack import Asked, attacked, withstood
from stages.evaluation.branches import Question
from stages.evaluation.harness import Harness
from stages.models.perturbing import Ascent
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event


def questions(count: int) -> list[Asked]:
    """Questions of random tokens with three or four answers of one to three tokens; of some, two are right."""
    draw, found = random.Random(5), []
    for number in range(1, count + 1):
        prompt = tuple(draw.choices(range(2, 40), k=draw.randint(1, 9)))
        answers = [draw.choices(range(2, 40), k=draw.randint(1, 3)) for _ in range(draw.randint(3, 4))]
        found.append(Asked(number, Question(prompt, answers, list(range(len(answers)))), [0] if number % 4 else [0, 2]))
    return found


@pytest.fixture
def harness(base_models: Any) -> Callable[..., Harness]:
    def of(model: Any, **more: Any) -> Harness:
        tokenizer = AutoTokenizer.from_pretrained(base_models / "slm")
        lm = Harness(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64)
        lm.report = more.get("report", lambda event: None)
        return lm

    return of


def likelihood(model: Any, embedded: Tensor, answer: Sequence[int]) -> Tensor:
    """Of one answer behind a prompt's embeddings, [prompt, width]: a row of its own."""
    behind = model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long)).detach()
    logits = model(inputs_embeds=torch.cat([embedded, behind])[None]).logits[0, len(embedded) - 1 : -1]
    return torch.stack([logits[i].log_softmax(-1)[token] for i, token in enumerate(answer)]).sum()


def right_at_each_step(model: Any, one: Asked, *, radius: float, steps: int) -> list[bool]:
    """From the formula, token by token: up the margin of the best wrong answer over the best right one."""
    embedded = model.get_input_embeddings()(torch.tensor(one.question.prompt)).detach()
    moved, found = torch.zeros_like(embedded), []
    for _ in range(steps + 1):
        at = (embedded + moved).requires_grad_()
        each = [likelihood(model, at, answer) for answer in one.question.answers]
        found.append(int(torch.stack(each).argmax()) in one.right)
        wrong = max(value for place, value in enumerate(each) if place not in one.right)
        (way,) = torch.autograd.grad(wrong - max(each[place] for place in one.right), at)
        for token in range(len(embedded)):
            length = embedded[token].norm()
            moved[token] += 2 * radius / (steps + 1) * length * way[token] / way[token].norm()
            moved[token] *= min(1.0, float(radius * length / moved[token].norm()))
    return found


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma3_text"])
@pytest.mark.parametrize(("radius", "steps"), [(0.05, 1), (0.1, 3)])
def test_a_question_counts_if_a_plain_loop_finds_it_right_at_every_step(
    family: Family, radius: float, steps: int, harness: Callable[..., Harness]
) -> None:
    model, asked = tiny_model(family), questions(24)
    expected = [right_at_each_step(model, one, radius=radius, steps=steps) for one in asked]
    found = withstood(harness(model), asked, Ascent(radius, steps), "t")
    assert found == [all(one) for one in expected]
    assert sum(one[0] for one in expected) > sum(found) > 0  # some are right only as long as nothing is changed


def test_the_farther_and_the_longer_the_fewer_and_what_is_not_changed_is_the_plain_answer(
    harness: Callable[..., Harness],
) -> None:
    model, asked = tiny_model("gpt2"), questions(40)
    lm = harness(model)
    plain = [right_at_each_step(model, one, radius=0.1, steps=0)[0] for one in asked]
    assert withstood(lm, asked, Ascent(1e-7), "t") == plain
    by_radius = [sum(withstood(lm, asked, Ascent(radius, 3), "t")) for radius in (1e-7, 0.05, 0.2, 0.8)]
    assert by_radius == sorted(by_radius, reverse=True)
    assert by_radius[0] == sum(plain) > by_radius[-1]
    longer = [withstood(lm, asked, Ascent(0.2, steps, 0.05), "t") for steps in (1, 2, 6)]
    for few, many in itertools.pairwise(longer):
        assert all(few[place] for place, is_kept in enumerate(many) if is_kept)


def test_the_model_is_left_as_it_was_and_progress_is_told(harness: Callable[..., Harness]) -> None:
    model, told = tiny_model("gpt2"), list[Event]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[3, 4, 5]])
    said = model(input_ids=ids).logits
    withstood(harness(model, report=told.append), questions(10), Ascent(0.3, 2), "t")
    assert [event.step for event in told if event.kind == "step"][-1] == 10
    assert torch.equal(model(input_ids=ids).logits, said)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_question_whose_answers_are_all_right_withstands(harness: Callable[..., Harness]) -> None:
    one = Asked(1, Question((3, 4), [[5], [6, 7]], [0, 1]), [0, 1])
    assert withstood(harness(tiny_model("gpt2")), [one], Ascent(0.9, 3), "t") == [True]


def test_numbers_that_are_none_are_refused(harness: Callable[..., Harness]) -> None:
    model = tiny_model("gpt2")
    lm = harness(model)
    assert lm.room
    model.transformer.h[0].ln_1.weight.data[0] = torch.nan
    with pytest.raises(BadNumbers, match="question 1 of task t: an answer's likelihood is NaN under attack"):
        withstood(lm, questions(1), Ascent(0.1), "t")


def task_of(*texts: tuple[str, list[str]]) -> Any:
    """A task with these prompts and choices, as lm-eval holds one that has been asked."""
    instances = [
        SimpleNamespace(doc_id=number, idx=place, doc={"choices": choices}, args=(prompt, f" {choice}"))
        for number, (prompt, choices) in enumerate(texts)
        for place, choice in enumerate(choices)
    ]
    return SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        multiple_input=False,
        config=SimpleNamespace(task="colours"),
        instances=instances,
        doc_to_choice=lambda doc: doc["choices"],
        doc_to_target=lambda doc: 0,
    )


def test_what_cannot_be_attacked_is_refused_by_name(harness: Callable[..., Harness]) -> None:
    lm = harness(tiny_model("gpt2"))
    long = task_of(("red", ["blue"]), ("red " * 60, ["blue green star"] * 3))
    with pytest.raises(
        UsageProblem, match=r"question 2 of task colours is 66 tokens long .* this model reads 64 at most"
    ):
        attacked(lm, [long], lm.report)  # type: ignore[arg-type]
    said: Any = SimpleNamespace(OUTPUT_TYPE="generate_until", config=SimpleNamespace(task="said"), multiple_input=False)
    with pytest.raises(UsageProblem, match="nothing to attack: no task is multiple choice"):
        attacked(lm, [said], lm.report)  # type: ignore[arg-type]
    lm._longest_row = 0  # as of BLOOM, whose attention counts no positions
    with pytest.raises(UsageProblem, match="this model takes no answers side by side"):
        attacked(lm, [task_of(("red", ["blue"]))], lm.report)  # type: ignore[arg-type]
