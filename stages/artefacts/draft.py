"""What a stage says of an artefact that it is about to publish; publishing adds what party, workspace and files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stages.artefacts.manifest import BaseIdentity, Masking, Opening, PrivacyClaim, Stage, Unmasking
from stages.workspace.settings import Role


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The fields of a manifest that its stage decides, under the manifest's own names."""

    stage: Stage
    round: int
    parents: Mapping[str, str]
    base: BaseIdentity
    parameters: int
    role: Role = "slm"
    attempt: int = 0
    seed: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    transcript: str | None = None
    opening: Opening | None = None
    masking: Masking | None = None
    closing: Mapping[str, str] | None = None
    unmasking: Unmasking | None = None
    privacy: PrivacyClaim | None = None
