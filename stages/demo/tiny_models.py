"""Tiny models trained from scratch in seconds, and the demo's two: GPT-2-shaped, with one tokenizer for both."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from stages.models.fused import fuse

END = "<|endoftext|>"
CONTEXT = (
    32  # tokens: the longest question and answer take 16; every position has to be learned, so there are no spare ones
)
# Narrow models want wider weights: with GPT-2's 0.02 the same steps gave 42 % instead of 63 %.
DEVIATION = 0.06


@dataclass(frozen=True)
class Shape:
    """A model's size and how it is trained: so many passes over its corpus, at this peak learning rate.

    context: tokens. architecture: a key of CONFIGURATIONS.
    """

    width: int
    layers: int
    heads: int
    passes: int
    learning_rate: float
    context: int = CONTEXT
    architecture: str = "gpt2"


SLM = Shape(width=128, layers=2, heads=4, passes=30, learning_rate=3e-3)  # 0.5 M parameters
LLM = Shape(width=192, layers=3, heads=6, passes=18, learning_rate=2e-3)  # 1.5 M parameters


def train_tokenizer(texts: Iterable[str], *, size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, in which every word of these texts is one token; any other text is still encoded.

    size: the most tokens; some hundred are too few for whole words.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size,  # 4,096 are never reached: merging ends when all words are whole
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def build_model(
    folder: Path,
    sentences: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    shape: Shape,
    *,
    seed: int,
    report: Callable[[int, int, float], None],
) -> None:
    """Train a model of this shape on the sentences, and save it with its tokenizer for from_pretrained.

    report: called with (step, steps in all, loss) on the way. The same seed gives the same model on one machine.
    """
    set_seed(seed)
    config = CONFIGURATIONS[shape.architecture](shape, tokenizer)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    fuse(model)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            seed=seed,
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=shape.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            adam_beta2=0.98,
            train_sampling_strategy="sequential",
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            use_cpu=True,  # seconds there, and the same bytes whether or not the machine has a GPU
            logging_steps=10,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
        )
        blocks = _Blocks(_packed(sentences, tokenizer, shape, seed))
        trainer = Trainer(model, arguments, train_dataset=blocks, callbacks=[_Progress(report)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gpt2(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=DEVIATION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _llama(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=shape.context,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        initializer_range=DEVIATION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _opt(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return OPTConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=shape.context,
        hidden_size=shape.width,
        word_embed_proj_dim=shape.width,
        ffn_dim=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        dropout=0.0,
        init_std=DEVIATION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )


CONFIGURATIONS = {"gpt2": _gpt2, "llama": _llama, "opt": _opt}
"""By transformers' name of the architecture."""


def _packed(sentences: Sequence[str], tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int) -> Tensor:
    """All passes, each in another order, cut into blocks: [blocks, context] token ids."""
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(sentences))["input_ids"]]
    order = random.Random(seed)
    stream = [token for _ in range(shape.passes) for ids in order.sample(encoded, len(encoded)) for token in ids]
    return torch.tensor(stream[: len(stream) // shape.context * shape.context]).view(-1, shape.context)


class _Blocks(Dataset[dict[str, Tensor]]):
    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index]}


class _Progress(TrainerCallback):
    """Trainer's log lines as calls of report."""

    def __init__(self, report: Callable[[int, int, float], None]) -> None:
        self._report = report

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        """Pass on a step's loss; the summary at the end has none."""
        if "loss" in kwargs["logs"]:
            self._report(state.global_step, state.max_steps, kwargs["logs"]["loss"])
