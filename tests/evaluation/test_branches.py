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
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    OPTConfig,
)

from stages.evaluation import branches
from stages.evaluation.branches import Question, batch_of, batches, likelihoods, questions_of
from stages.evaluation.harness import Harness
from stages.runtime.errors import UsageProblem
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
    "opt": lambda: AutoModelForCausalLM.from_config(  # adds the mask to what it attends with, and 2 to each position
        OPTConfig(
            ffn_dim=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32, **SIZES
        ),
        attn_implementation="eager",
    ),
    "gpt-neo": lambda: GPTNeoForCausalLM(  # a window in every other layer
        GPTNeoConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            **SIZES,
        )
    ),
    "lfm2": lambda: Lfm2ForCausalLM(  # convolutions, which read on across branches
        Lfm2Config(num_key_value_heads=2, layer_types=["conv", "full_attention"], **SMALL)
    ),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1, **SIZES)
    ),
}
BRANCHING = {"gpt2": 1 << 30, "llama": 1 << 30, "gemma3": WINDOW, "opt": 1 << 30, "gpt-neo": 16}
"""Which of them take branches, and how long a row may be."""
PACKED = {"gpt2", "llama", "gemma3"}
"""Which of them take rows one after the other: those that attend as torch does."""
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
    assert lm._longest_row == BRANCHING.get(kind, 0)
    assert lm.packs == (kind in PACKED)
    found = lm._loglikelihood_tokens(asked(REQUESTS))
    known = HFLM._loglikelihood_tokens(lm, asked(REQUESTS), disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in known], abs=2e-4)
    assert [is_likeliest for _, is_likeliest in found] == [is_likeliest for _, is_likeliest in known]
    assert len({round(one, 3) for one, _ in found}) == len(REQUESTS) - 1


LETTERS = [(range(5, 5 + length), [letter]) for length in (12, 9, 17, 3) for letter in (1, 2, 3, 4)]
ONE_ANSWER = [(range(3, 3 + length), range(40, 40 + k)) for length, k in ((12, 2), (9, 1), (17, 3), (1, 4))]
YES_OR_NO = [(range(7, 7 + length), answer) for length in (12, 9, 17, 1) for answer in ([1], [2, 3])]
TWO_CONTEXTS = [([*range(length), other], range(50, 54)) for length in (12, 9, 17) for other in (60, 61)]
UNEQUAL = {"letters": LETTERS, "one answer": ONE_ANSWER, "yes or no": YES_OR_NO, "two contexts": TWO_CONTEXTS}


@pytest.mark.parametrize("shape", UNEQUAL)
@pytest.mark.parametrize("kind", MODELS)
def test_so_they_are_in_tasks_of_other_shapes(kind: str, shape: str, tokenizer: Any) -> None:
    lm, requests = harness_of(kind, tokenizer), [(list(one), list(other)) for one, other in UNEQUAL[shape]]
    found = [one for one, _ in lm._loglikelihood_tokens(asked(requests))]
    known = [one for one, _ in HFLM._loglikelihood_tokens(lm, asked(requests), disable_tqdm=True)]
    assert found == pytest.approx(known, abs=2e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_is_read_once_where_the_model_takes_that(
    kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt, of 30 tokens, is longer than some models' windows: its answer is left to lm-eval."""
    lm, read = harness_of(kind, tokenizer), list[int]()
    longest = lm._longest_row  # found out before anything is counted
    real = HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", lambda self, inps, **_: (read.append(len(inps)), real(self, inps))[1])
    requests = [([*range(20, 50)], [60, 61]), ([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [10, 11, 12]), ([8, 7], [6])]
    lm._loglikelihood_tokens(asked(requests))
    assert sum(read) == (4 if not longest else 1 if longest < 31 else 0)


def test_a_model_that_makes_something_else_of_the_mask_is_asked_as_lm_eval_does(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, real = harness_of("gpt2", tokenizer), branches.batch_of

    def blind(questions: Any, *, packs: bool) -> branches.Batch:
        batch = real(questions, packs=packs)
        if not packs:
            return batch._replace(attention_mask=torch.ones_like(batch.attention_mask).tril())
        rows, _, _, length = batch.attention_mask.shape
        all_before = torch.ones(rows, 1, length, length, dtype=torch.long).tril()
        return batch._replace(attention_mask=torch.cat([all_before, batch.attention_mask[:, :, length:]], dim=2))

    monkeypatch.setattr(branches, "batch_of", blind)
    assert not lm.packs
    assert lm._longest_row == 0


def test_a_window_of_a_long_text_is_left_to_lm_eval(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares its prompt with others by accident."""
    lm, left = harness_of("llama", tokenizer), list[int]()
    assert lm._longest_row

    def apart(_: Harness, requests: list[Any], **__: Any) -> list[tuple[float, bool]]:
        left.append(len(requests))
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", apart)
    assert lm._loglikelihood_tokens([(None, [0], [*range(1, 9)])] * 9) == [(0.0, True)] * 9
    assert left == [9]


def test_many_answers_of_one_prompt_make_no_longer_row_than_a_batch_has(tokenizer: Any) -> None:
    requests = [([3], [*range(5, 15)])] * 400
    found = questions_of(requests, rows=8)
    assert sum(len(one.answers) for one in found) == 400
    assert max(one.tokens for one in found) <= 8 * 10
    assert [place for one in found for place in one.places] == [*range(400)]
    assert max(one.tokens for one in questions_of(requests, rows=8, most=30)) <= 30
    assert len(questions_of(requests, rows=1)) == 400


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
    assert batch.kept.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]  # of the last four places
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
    found = questions_of(REQUESTS, rows=4)
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
        ({"window_size": 8}, 8),
        ({"sliding_window": 9, "attention_window_size": 8}, 8),
        ({"original_max_position_embeddings": 8}, 8),
        (
            {"sliding_window": 16, "rope_parameters": {"original_max_position_embeddings": 8, "rope_type": "longrope"}},
            8,
        ),
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


def test_of_tokens_that_are_equally_likely_the_first_is_the_likeliest() -> None:
    model = model_of("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    [found] = likelihoods(model, [Question((5, 6), [[0], [1], [0, 0], [0, 1]], [0, 1, 2, 3])])
    assert [is_likeliest for _, is_likeliest in found] == [True, False, True, False]


def test_an_auto_class_gives_what_its_own_class_gives(base_models: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_models / "slm").eval()
    [[(together, _), (other, _)]] = likelihoods(model, [Question((1, 2, 3), [[4, 5], [6]], [0, 1])])
    with torch.no_grad():
        chances = model(torch.tensor([[1, 2, 3, 4]])).logits[0].log_softmax(-1)
    assert together == pytest.approx(float(chances[2, 4] + chances[3, 5]), abs=1e-5)
    assert other == pytest.approx(float(chances[2, 6]), abs=1e-5)


def test_a_question_without_a_token_is_named(tokenizer: Any) -> None:
    lm = harness_of("llama", tokenizer)
    asked_ = SimpleNamespace(request_type="loglikelihood", args=("\n", "red"), doc_id=2, task_name="colours")
    with pytest.raises(UsageProblem, match="the text of question 3 of task colours has no token"):
        lm.cut([asked_])
