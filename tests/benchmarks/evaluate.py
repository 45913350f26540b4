"""evaluate: the likelihoods of ARC-Easy's choices, against lm-eval's own Hugging Face model on the same questions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from builders import SHARED_DATA
from stages.data.examples import encode_row
from stages.data.rows import Row
from stages.evaluation.harness import Harness
from tests.benchmarks import gpt2_on_arc as arc
from tests.benchmarks.repeats import shown

QUESTIONS, BATCH = 60, 16


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    if not arc.available():
        return []
    rows = [row for precision in reversed(arc.precisions()) for row in in_precision(getattr(torch, precision), repeats)]
    return rows if "bfloat16" in arc.precisions() else [*rows, arc.NO_BFLOAT16]


def in_precision(dtype: torch.dtype, repeats: int) -> list[tuple[str, str, str]]:
    """The rows of a model whose weights are of this precision, as on a GPU those of a bfloat16 model are."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "tokenizers" / "gpt2")
    lm, plain = (harness(tokenizer, dtype, as_loaded=as_loaded) for as_loaded in (True, False))
    requests = asked(tokenizer)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: lm._loglikelihood_tokens(requests),
        "lm-eval's": lambda: HFLM._loglikelihood_tokens(plain, requests, disable_tqdm=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - started)
    faster = shown([theirs / ours for ours, theirs in zip(seconds["ours"], seconds["lm-eval's"], strict=True)])
    apart = max(abs(one - other) for (one, _), (other, _) in zip(found["ours"], found["lm-eval's"], strict=True))
    name, is_exact = str(dtype).removeprefix("torch."), dtype == torch.float32
    what = f"{len(requests)} choices, {name}: times faster than lm-eval's HFLM"
    return [
        (what, faster, ">= 3" if is_exact else ">= 4"),
        (
            f"the same, {name}: largest difference of a log-likelihood, nats",
            f"{apart:.0e}",
            "<= 1e-4" if is_exact else "",
        ),
    ]


def harness(tokenizer: Any, dtype: torch.dtype, *, as_loaded: bool) -> Harness:
    """GPT-2 small with an adapter; as_loaded: as a stage has it, not as transformers leaves it."""
    model = arc.model("slm", 12, autocast=False, as_loaded=as_loaded).model.to(dtype)
    lm = Harness(pretrained=model.get_base_model(), tokenizer=tokenizer)
    lm.batch_size_per_gpu, lm.report = BATCH, lambda event: None
    return lm


def asked(tokenizer: Any) -> list[Any]:
    """Each choice of the first test questions, as lm-eval asks it."""
    found = []
    for line in (SHARED_DATA / "datasets" / "arc_easy" / "test.jsonl").read_text().splitlines()[:QUESTIONS]:
        question = json.loads(line)
        for choice in question["choices"]["text"]:
            one = encode_row(Row(f"Question: {question['question']}\nAnswer:", f" {choice}"), tokenizer)
            found.append((("", ""), one.input_ids[: one.prompt_tokens], one.input_ids[one.prompt_tokens :]))
    return found
