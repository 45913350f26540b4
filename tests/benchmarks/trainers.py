"""What a user would pick in place of client-train: transformers' Trainer + PEFT, padded or not, and trl's SFTTrainer.

All see the rows of client-train's own schedule, in its order, with its learning rate and without dropout. A step's loss
is the mean over its answer tokens in each, so that losses can be compared.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithFlattening,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from builders import SHARED_DATA
from stages.data.examples import NO_LABEL, Example
from stages.runtime.quiet import libraries
from tests.benchmarks import gpt2_on_arc as arc


def has_trl() -> bool:
    """Whether trl can be imported."""
    return importlib.util.find_spec("trl") is not None


def padded(steps: Sequence[Sequence[Example]], layers: int, rate: float, *, bfloat16: bool = False) -> arc.Clock:
    """Trainer as most people write it: a padding collator, full logits and the model's own loss."""
    examples = [example for step in steps for example in step]
    return _trained(
        Trainer,
        TrainingArguments,
        _settings(len(steps), rate, bfloat16=bfloat16),
        layers,
        train_dataset=examples,
        data_collator=arc.padded_as_usual,
    )


def flattened(steps: Sequence[Sequence[Example]], layers: int, rate: float, *, bfloat16: bool) -> arc.Clock:
    """Trainer with DataCollatorWithFlattening: a batch is one row without padding, full logits.

    transformers finds the rows by their positions, which begin at 0 again, and masks them from each other. It does so
    only without a cache of keys and values; Trainer turns that off.
    """
    return _trained(
        Trainer,
        TrainingArguments,
        _settings(len(steps), rate, bfloat16=bfloat16),
        layers,
        train_dataset=_labelled(steps),
        data_collator=DataCollatorWithFlattening(),
    )


def sft(
    steps: Sequence[Sequence[Example]], layers: int, rate: float, *, bfloat16: bool, packs: bool = False
) -> arc.Clock:
    """trl's SFTTrainer, padding-free, with its fused loss, which never holds the logits of all positions.

    packs: have trl fill rows of the mean length of a step with whole examples, by an order of its own; then the
    clock's seconds are scaled to the tokens of these steps.
    """
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(_labelled(steps))
    tokens = [sum(len(example.input_ids) for example in step) for step in steps]
    settings = _settings(len(steps), rate, bfloat16=bfloat16) | {
        "gradient_checkpointing": False,  # trl's default trades time for memory
        "shuffle_dataset": False,
        "packing": packs,
        "padding_free": True,
        "max_length": -(-sum(tokens) // len(steps)) if packs else None,
    }
    if packs:
        settings["per_device_train_batch_size"] = 1
    clock = _trained(
        SFTTrainer,
        SFTConfig,
        settings,
        layers,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(SHARED_DATA / "tokenizers" / "gpt2"),
    )
    if packs:
        seen = clock.losses[-1]["num_tokens"] - clock.losses[0]["num_tokens"]
        clock.times = [time * sum(tokens[1:]) / seen for time in clock.times]
    return clock


def _labelled(steps: Sequence[Sequence[Example]]) -> list[dict[str, list[int]]]:
    """The rows of all steps as token ids, and labels at their answers alone."""
    rows = []
    for example in (example for step in steps for example in step):
        ids, prompt = list(example.input_ids), example.prompt_tokens
        rows.append({"input_ids": ids, "labels": [NO_LABEL] * prompt + ids[prompt:]})
    return rows


def _settings(steps: int, rate: float, *, bfloat16: bool) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": arc.BATCH,
        "train_sampling_strategy": "sequential",
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": bfloat16,
        "disable_tqdm": True,
        "report_to": [],
        "remove_unused_columns": False,
    }


def _trained(
    kind: Callable[..., Trainer],
    arguments: Callable[..., TrainingArguments],
    settings: dict[str, Any],
    layers: int,
    **data: Any,
) -> arc.Clock:
    clock = arc.Clock()

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" in logs:
                clock.step({"slm_ft": logs["loss"], **{name: logs[name] for name in ("num_tokens",) if name in logs}})

    with tempfile.TemporaryDirectory() as folder, libraries():
        model = arc.model("slm", layers, autocast=False, as_loaded=False).model
        trainer = kind(model=model, args=arguments(output_dir=folder, **settings), callbacks=[Watch()], **data)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return clock
