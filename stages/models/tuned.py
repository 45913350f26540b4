"""A base model with its adapter, and what must be known of it without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from stages.artefacts.manifest import BaseIdentity
from stages.workspace.settings import Role


@dataclass(frozen=True)
class Outline:
    """What is known of a base model without its weights.

    vocabulary: how many token ids it has logits for, padding included. context: the longest sequence it takes.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Tuned:
    """A base model with an adapter attached, its tokenizer and its identity.

    autocast: whether it computes in bfloat16 (the adapter stays float32). longest_packed: see packing.packs.
    """

    role: Role
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity
    autocast: bool
    longest_packed: int

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The precision it computes in."""
        return "bfloat16" if self.autocast else "float32"

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return context_of(self.model)

    @property
    def outline(self) -> Outline:
        """What would be known of it without its weights."""
        rows = int(self.model.get_output_embeddings().weight.shape[0])
        return Outline(self.tokenizer, rows, self.context)


def context_of(model: PeftModel) -> int:
    """The longest sequence a model takes, in tokens, as its configuration says."""
    return context_in(model.config)


def context_in(config: Any) -> int:
    """The longest sequence of a configuration, in tokens; 2**30 where it names none."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 30))
