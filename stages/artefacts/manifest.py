"""The manifest of an adapter folder: what an auditor asks, and the chain from each file to those it was made from.

A manifest holds nothing that changes from one run to the next on one machine (times go to the private log), so that a
stage repeated gives the same bytes, and nothing that names a person, a host or a path. Once a federation has a roster,
its maker signs its exact bytes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from stages.parties import names
from stages.workspace.agreement import Lora
from stages.workspace.names import ENCRYPTED, OPENED
from stages.workspace.settings import Quantization, Role

FORMAT: Literal["fedcollm/1"] = "fedcollm/1"
LIBRARIES = ("fedcollm", "torch", "transformers", "peft", "safetensors", "numpy")

Stage = Literal[
    "broadcast",
    "client-train",
    "aggregate",
    "capture",
    "co-distill",
    "close",
    "reveal",
    "align",
    "share-knowledge",
    "client-distill",
]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[int, Field(ge=1, le=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Part):
    """One file beside the manifest."""

    sha256: Sha256
    size_bytes: Count


class BaseIdentity(_Part):
    """Which base model and tokenizer an adapter belongs to, by content: of the weights as published.

    settings_sha256: of the configuration, how it generates and the special tokens; earlier versions wrote none.
    quantization: how the weights are held while an adapter is trained on them; another way is another base. Where there
    is none it is not written either.
    """

    architecture: str
    weights_sha256: Sha256
    tokenizer_sha256: Sha256
    settings_sha256: Sha256 | None = None
    quantization: Quantization | None = None

    def differs(self, other: BaseIdentity) -> str | None:
        """The first field that another base differs in, None if it is this one; settings count where both tell them."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs and not (name == "settings_sha256" and None in (ours, theirs)):
                return name
        return None

    def is_of(self, other: BaseIdentity) -> bool:
        """Whether both are of one base."""
        return self.differs(other) is None

    @model_serializer(mode="wrap")
    def _without_what_is_not(self, whole: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {name: value for name, value in whole(self).items() if value is not None}


class Opening(_Part):
    """What a broadcast says in secure mode: with which keys, in this order, by these clients, a round is masked."""

    slot: Count
    clients: list[Number]
    prekeys: list[Sha256]
    threshold: Annotated[int, Field(ge=3)]
    previous_sha256: Sha256


class Masking(_Part):
    """What a masked update says of itself: the digest of its vector, and commitments to every secret behind it."""

    y_sha256: Sha256
    commit_self: Sha256
    commit_pairs: dict[str, Sha256]


class Unmasking(_Part):
    """How a sum was opened: whose updates are in it, and who revealed."""

    survivors: list[int]
    revealed: list[int]
    count: Count


class PrivacyClaim(_Part):
    """What differential privacy promises: epsilon and delta of all rounds so far, where one unit is changed.

    unit: an example is one row of one client's training data.
    reset: whether the client has ever counted from zero again; epsilon is then of the rounds since alone.
    ledger_sha256: the last line of the client's ledger when this was made: one without that line is not the whole.
    """

    unit: Literal["example"]
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    reset: bool = False
    ledger_sha256: Sha256 | None = None


class Manifest(_Part):
    """Everything that is said of one adapter folder."""

    format: Literal["fedcollm/1"] = FORMAT
    federation: str
    agreement_sha256: Sha256
    federation_sha256: Sha256 | None = None
    stage: Stage
    role: Role = "slm"
    round: Number
    attempt: Count = 0
    client: Number | None = None
    parents: dict[str, Sha256]
    files: dict[str, FileEntry]
    base: BaseIdentity
    lora: Lora
    parameters: Count
    seed: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    steps: Count = 0
    examples: Count = 0
    tokens: Count = 0
    metrics: dict[str, Finite] = {}
    transcript: Sha256 | None = None
    opening: Opening | None = None
    masking: Masking | None = None
    closing: dict[str, Sha256] | None = None
    unmasking: Unmasking | None = None
    privacy: PrivacyClaim | None = None
    versions: dict[str, str]

    @property
    def party(self) -> str:
        """Who made it, and signs it."""
        return names.of(self.client)

    @property
    def hidden_by(self) -> str | None:
        """The mode of aggregation that alone has such a folder; None where any has."""
        if self.files.keys() & {ENCRYPTED, OPENED}:
            return "encrypted"
        return "secure" if self.masking else None


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of every library that has a part in the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}
