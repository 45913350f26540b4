"""How well a model knows the answers of rows of one's own: loss, exact match, and what it writes itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from stages.artefacts.row_records import RowScores, WrittenScores
from stages.data.examples import Example
from stages.evaluation.harness import Harness
from stages.evaluation.rouge import rouge_l
from stages.models import adapters
from stages.runtime.errors import BadNumbers

LINE = "\n"


class Turn(NamedTuple):
    """One answer of a row. doc_id: the row, from 0; task_name: what messages call the rows; both as lm-eval's."""

    doc_id: int
    task_name: str
    prompt: list[int]
    answer: list[int]


def known(lm: Harness, examples: Sequence[Example], name: str) -> RowScores:
    """Loss per answer token in nats, perplexity, and the share of rows of which each answer token is the likeliest.

    Each answer is scored as lm-eval scores a continuation. Raises BadNumbers where a likelihood is no number.
    """
    asked = [
        Turn(row, name, one.input_ids[:first], one.input_ids[first:end])
        for row, one in enumerate(examples)
        for first, end in one.turns
    ]
    likelihoods = lm.of_tokens(asked)
    tokens = sum(len(turn.answer) for turn in asked)
    loss = -math.fsum(nats for nats, _ in likelihoods) / tokens
    if not math.isfinite(loss):
        raise BadNumbers(f"the loss on {name} is {loss}", mend=adapters.NO_SETTING_OF_TRAINING)
    missed = {turn.doc_id for turn, (_, is_likeliest) in zip(asked, likelihoods, strict=True) if not is_likeliest}
    return {
        "rows": len(examples),
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "exact_match": (len(examples) - len(missed)) / len(examples),
    }


def written(lm: Harness, examples: Sequence[Example], name: str) -> WrittenScores:
    """How what the model writes after each row's last prompt compares with the answer: a match of texts, and Rouge-L.

    The likeliest token is taken each time, up to the most tokens that an answer of these rows has. Text ends at a
    special token that ends a text or an answer; where no answer has more than one line, at the end of the first line.
    Spaces around both texts do not count.
    """
    tokenizer: Any = lm.tokenizer
    last = [one.turns[-1] for one in examples]
    asked = [
        Turn(row, name, one.input_ids[:first], one.input_ids[first:end])
        for row, (one, (first, end)) in enumerate(zip(examples, last, strict=True))
    ]
    expected = [tokenizer.decode(turn.answer, skip_special_tokens=True).strip() for turn in asked]
    until = None if any(LINE in text for text in expected) else LINE
    most = max(len(turn.answer) for turn in asked)
    ends = {tokenizer.eos_token_id} | ({turn.answer[-1] for turn in asked} & set(tokenizer.all_special_ids))
    found = lm.generated(asked, most, sorted(end for end in ends if end is not None))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found]
    texts = [text.partition(until)[0].strip() if until else text for text in texts]
    pairs = list(zip(expected, texts, strict=True))
    return {
        "generated_match": sum(one == other for one, other in pairs) / len(pairs),
        "rouge_l": math.fsum(rouge_l(*pair) for pair in pairs) / len(pairs),
        "most_tokens": most,
        "until": until,
    }
