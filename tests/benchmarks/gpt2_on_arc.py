"""What the training benchmarks share: GPT-2-shaped models with random weights, GPT-2's tokenizer, ARC-Easy rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from builders import SHARED_DATA
from stages.artefacts.manifest import BaseIdentity
from stages.data.examples import Example, encode_row
from stages.data.rows import Row
from stages.models import adapters, packing
from stages.models.fused import fuse
from stages.models.tuned import Tuned
from stages.workspace.agreement import Lora, Model
from stages.workspace.settings import Role
from tests.benchmarks.repeats import shown

BATCH, PAD = 8, 50256
SETTINGS = Model(model="gpt2", lora=Lora(r=8, alpha=16, target_modules=["c_attn"]))
IDENTITY = BaseIdentity(architecture="gpt2", weights_sha256="0" * 64, tokenizer_sha256="0" * 64)


def available() -> bool:
    """Whether the real data is there."""
    return (SHARED_DATA / "tokenizers" / "gpt2").is_dir()


def precisions() -> list[str]:
    """Those that this processor computes fast in."""
    return ["bfloat16", "float32"] if torch.cpu._is_avx512_bf16_supported() else ["float32"]


NO_BFLOAT16 = ("bfloat16 skipped: this processor has no instructions for it", "-", "-")


def examples(count: int) -> list[Example]:
    """The first training questions of ARC-Easy as the shipped task asks them."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "tokenizers" / "gpt2")
    return [encode_row(row, tokenizer) for row in rows(count)]


def rows(count: int | None = None) -> list[Row]:
    """The same as text."""
    lines = (SHARED_DATA / "datasets" / "arc_easy" / "train.jsonl").read_text().splitlines()[:count]
    found = []
    for doc in map(json.loads, lines):
        answer = doc["choices"]["text"][doc["choices"]["label"].index(doc["answerKey"])]
        found.append(Row(f"Question: {doc['question']}\nAnswer:", f" {answer}"))
    return found


def model(role: Role, layers: int, *, autocast: bool, as_loaded: bool = True) -> Tuned:
    """A GPT-2-shaped model with random weights and a LoRA adapter; without dropout, so that losses can be compared.

    as_loaded: as stages load it, not as transformers leaves it, which is what peers get.
    """
    torch.manual_seed(layers)
    base = GPT2LMHeadModel(GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    if as_loaded:
        fuse(base)
    longest_packed = packing.packs(base)
    tuned = adapters.attach(base, SETTINGS)
    adapters.make_fresh(tuned, 1)
    return Tuned(role, tuned, None, IDENTITY, autocast=autocast, longest_packed=longest_packed)  # type: ignore[arg-type]


def padded_as_usual(chunk: Sequence[Example]) -> dict[str, Tensor]:
    """A batch as people write it: padded on the right to the longest row, labels -100 on prompts and padding."""
    length = max(len(example.input_ids) for example in chunk)
    ids = torch.full((len(chunk), length), PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(chunk):
        end = len(example.input_ids)
        ids[row, :end] = torch.tensor(example.input_ids)
        labels[row, example.prompt_tokens : end] = ids[row, example.prompt_tokens : end]
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Clock:
    """A report that notes when each step ended and its losses. times: of one that has run already."""

    def __init__(self, times: Sequence[float] = ()) -> None:
        self.times = list(times)
        self.losses: list[dict[str, float]] = []

    def step(self, losses: dict[str, float]) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(losses)

    @property
    def seconds(self) -> float:
        """The median step, times their number: a moment in which the machine did something else does not count.

        Without the first step, which pays for warming up. All whose seconds are compared have the same steps.
        """
        laps = [end - start for start, end in pairwise(self.times)]
        return median(laps) * len(laps)


def in_turn(repeats: int, runs: dict[str, Callable[[], Clock]]) -> dict[str, list[Clock]]:
    """Each of the runs once, again and again, so that a machine that slows down slows them all."""
    clocks: dict[str, list[Clock]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            clocks[name].append(run())
    return clocks


def times_faster(clocks: dict[str, list[Clock]], ours: str, theirs: str) -> str:
    """Theirs / ours, repeat by repeat."""
    return shown([b.seconds / a.seconds for a, b in zip(clocks[ours], clocks[theirs], strict=True)])
