"""evaluate: the likelihoods of ARC-Easy's choices, against lm-eval's own Hugging Face model on the same questions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoTokenizer

from builders import SHARED_DATA
from stages.data.examples import encode_row
from stages.data.rows import Row
from stages.evaluation.asking import asking
from stages.models.tuned import Tuned
from stages.runtime.events import ignore
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
    """The rows of one precision: bfloat16 as `evaluation.precision = "training"` computes, against weights in it."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "tokenizers" / "gpt2")
    requests, is_exact = asked(tokenizer), dtype == torch.float32
    plain = HFLM(pretrained=model(as_loaded=False).get_base_model().to(dtype), tokenizer=tokenizer, batch_size=BATCH)
    tuned = Tuned("slm", model(as_loaded=True), tokenizer, arc.IDENTITY, autocast=not is_exact, longest_packed=0)
    seconds: dict[str, list[float]] = {"ours": [], "lm-eval's": []}
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {"with_adapter": True, "batch_size": BATCH, "as_trained": not is_exact}
    with asking(tuned, **settings, report=ignore) as lm:
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: lm._loglikelihood_tokens(requests),
            "lm-eval's": lambda: plain._loglikelihood_tokens(requests, disable_tqdm=True),
        }
        for _ in range(repeats):
            for name, way in ways.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=name == "ours" and not is_exact):
                    started = time.perf_counter()
                    found[name] = way()
                    seconds[name].append(time.perf_counter() - started)
    faster = shown([theirs / ours for ours, theirs in zip(seconds["ours"], seconds["lm-eval's"], strict=True)])
    apart = max(abs(one - other) for (one, _), (other, _) in zip(found["ours"], found["lm-eval's"], strict=True))
    ours, theirs = (chosen(requests, found[name]) for name in ways)
    alike = sum(one == other for one, other in zip(ours, theirs, strict=True))
    name = str(dtype).removeprefix("torch.")
    what = f"{len(requests)} choices, {name}: times faster than lm-eval's HFLM"
    return [
        (what, faster, ">= 3" if is_exact else ">= 4"),
        (
            f"the same, {name}: largest difference of a log-likelihood, nats",
            f"{apart:.0e}",
            "<= 1e-4" if is_exact else "",
        ),
        (
            f"the same, {name}: questions with the same choice",
            f"{alike} of {QUESTIONS}",
            f"{QUESTIONS}" if is_exact else "",
        ),
    ]


def model(*, as_loaded: bool) -> PeftModel:
    """GPT-2 small with an adapter that acts; as_loaded: as a stage has it, not as transformers leaves it."""
    found = arc.model("slm", 12, autocast=False, as_loaded=as_loaded).model
    torch.manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return found


def chosen(requests: list[Any], found: list[tuple[float, bool]]) -> list[int]:
    """The likeliest choice of each question, by its place among the requests."""
    best: dict[tuple[int, ...], int] = {}
    for place, (_, prompt, _) in enumerate(requests):
        one = best.setdefault(tuple(prompt), place)
        if found[place][0] > found[one][0]:
            best[tuple(prompt)] = place
    return list(best.values())


def asked(tokenizer: Any) -> list[Any]:
    """Each choice of the first test questions, as lm-eval asks it."""
    found = []
    for line in (SHARED_DATA / "datasets" / "arc_easy" / "test.jsonl").read_text().splitlines()[:QUESTIONS]:
        question = json.loads(line)
        for choice in question["choices"]["text"]:
            one = encode_row(Row(f"Question: {question['question']}\nAnswer:", f" {choice}"), tokenizer)
            found.append((("", ""), one.input_ids[: one.prompt_tokens], one.input_ids[one.prompt_tokens :]))
    return found
