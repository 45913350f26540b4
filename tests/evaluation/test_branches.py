"""branches: a prompt that is read once gives its answers the likelihoods that lm-eval gives them one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from stages.evaluation import branches
from stages.evaluation.branches import Question, batch_of, batches, likelihoods, questions_of
from stages.evaluation.harness import Harness
from stages.runtime.events import Event

SIZES = {"vocab_size": 90, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = SIZES | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOW = 24
MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **SMALL)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(head_dim=8, sliding_window=WINDOW, max_position_embeddings=64, **SMALL)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SIZES)),  # has no positions
}
REQUESTS = [
    ([5, 6, 7, 8], [9]),
    ([5, 6, 7, 8], [10, 11, 12]),
    ([3], [4, 5]),
    ([5, 6, 7, 8], [13, 14]),
    ([*range(20, 50)], [60, 61]),
    ([3], [7]),
    ([*range(10, 80)], [1, 2]),  # too long for 64 tokens: lm-eval drops its beginning
    ([5, 6, 7, 8], [9]),  # asked twice
]


def model_of(kind: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():  # else each answer is as likely as any
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def harness_of(kind: str, tokenizer: Any) -> Harness:
    lm = Harness(pretrained=model_of(kind), tokenizer=tokenizer, batch_size=4, max_length=64)
    lm.report = lambda event: None
    return lm


@pytest.fixture
def tokenizer(base_models: Any) -> Any:
    return AutoTokenizer.from_pretrained(base_models / "slm")


def asked(requests: list[Any]) -> list[Any]:
    return [(("", ""), *pair) for pair in requests]


@pytest.mark.parametrize("kind", MODELS)
def test_answers_are_as_likely_as_lm_eval_finds_them(kind: str, tokenizer: Any) -> None:
    lm = harness_of(kind, tokenizer)
    found = lm._loglikelihood_tokens(asked(REQUESTS))
    known = HFLM._loglikelihood_tokens(lm, asked(REQUESTS), disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in known], abs=2e-4)
    assert [is_likeliest for _, is_likeliest in found] == [is_likeliest for _, is_likeliest in known]
    assert len({round(one, 3) for one, _ in found}) == len(REQUESTS) - 1


@pytest.mark.parametrize(("kind", "rows"), [("gpt2", 1), ("llama", 1), ("gemma3", 2 + 1), ("bloom", 4)])
def test_a_prompt_is_read_once_where_the_model_takes_that(
    kind: str, rows: int, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rows: those that lm-eval itself reads: one question to hold against it; all where that differs, or is too long.

    The first prompt, with 30 tokens, is longer than gemma3's window.
    """
    lm, read = harness_of(kind, tokenizer), list[int]()
    real = HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", lambda self, inps, **_: (read.append(len(inps)), real(self, inps))[1])
    requests = [([*range(20, 50)], [60, 61]), ([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [10, 11, 12]), ([8, 7], [6])]
    lm._loglikelihood_tokens(asked(requests))
    assert sum(read) == rows


def test_a_model_that_makes_something_else_of_the_mask_is_asked_as_lm_eval_does(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = harness_of("gpt2", tokenizer)
    known = HFLM._loglikelihood_tokens(lm, asked(REQUESTS), disable_tqdm=True)
    real = branches.batch_of
    blind = lambda questions: real(questions)._replace(  # noqa: E731
        attention_mask=torch.ones_like(real(questions).attention_mask).tril()
    )
    monkeypatch.setattr(branches, "batch_of", blind)
    assert lm._loglikelihood_tokens(asked([REQUESTS[place] for place in (0, 1, 3, 2)])) == [
        pytest.approx(known[place], abs=1e-6) for place in (0, 1, 3, 2)
    ]


def test_progress_counts_each_answer_once(tokenizer: Any) -> None:
    lm, told = harness_of("llama", tokenizer), list[Event]()
    lm.report = told.append
    lm._total = len(REQUESTS)
    lm._loglikelihood_tokens(asked(REQUESTS))
    assert told[-1].step == len(REQUESTS)


def test_a_branch_reads_the_prompt_and_itself() -> None:
    batch = batch_of([Question((5, 6), [[7, 8, 9], [1], [2, 3]], [0, 1, 2]), Question((4,), [[1, 2]], [3])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 2], [0, 0, 0, 4, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 0, 0, 0, 1]]
    assert batch.kept == 4
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert batch.attention_mask[0, 0].int().tolist() == expected
    assert batch.attention_mask[1, 0, 3:].int().tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert batch.attention_mask[1, 0].any(-1).all()  # no row of a softmax without an entry


def test_batches_have_no_more_tokens_than_rows_of_one_answer_would() -> None:
    questions = [Question((0,) * length, [[1] * 5] * 4, []) for length in (30, 3, 12, 12, 7, 1)]
    for rows, lengths in ((3, [2, 1, 1, 1, 1]), (8, [5, 1]), (1, [1] * 6)):
        found = list(batches(questions, rows))
        assert [len(batch) for batch in found] == lengths
        assert [one.tokens for batch in found for one in batch] == [46, 28, 28, 23, 19, 17]  # the longest first
        for batch in found:
            assert len(batch) == 1 or len(batch) * batch[0].tokens <= rows * batch[0].longest
    assert list(batches([], rows=3)) == []


def test_requests_of_one_prompt_are_one_question() -> None:
    found = questions_of(REQUESTS)
    assert [one.places for one in found] == [[0, 1, 3, 7], [2, 5], [4], [6]]
    assert found[0].answers == [[9], [10, 11, 12], [13, 14], [9]]


@pytest.mark.parametrize(
    ("told", "longest"),
    [
        ({}, 1 << 30),
        ({"sliding_window": 8}, 8),
        ({"sliding_window": 8, "use_sliding_window": False}, 1 << 30),
        ({"sliding_window": None}, 1 << 30),
        ({"attention_chunk_size": 8}, 0),
    ],
)
def test_the_longest_row_is_that_of_the_window(told: dict[str, Any], longest: int) -> None:
    config = SimpleNamespace(**told)
    config.get_text_config = lambda: config
    assert branches.longest_row(config) == longest


def test_probabilities_have_the_precision_that_is_asked_for() -> None:
    model = model_of("llama").to(torch.bfloat16)
    question = Question((5, 6), [[7, 8], [9]], [0, 1])
    [coarse], [fine] = (likelihoods(model, [question], softmax_dtype=dtype) for dtype in (None, torch.float32))
    assert coarse != fine
    assert [one for one, _ in coarse] == pytest.approx([one for one, _ in fine], rel=2e-2)


def test_an_auto_class_gives_what_its_own_class_gives(base_models: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_models / "slm").eval()
    [[(together, _), (other, _)]] = likelihoods(model, [Question((1, 2, 3), [[4, 5], [6]], [0, 1])])
    with torch.no_grad():
        chances = model(torch.tensor([[1, 2, 3, 4]])).logits[0].log_softmax(-1)
    assert together == pytest.approx(float(chances[2, 4] + chances[3, 5]), abs=1e-5)
    assert other == pytest.approx(float(chances[2, 6]), abs=1e-5)
