"""An average of updates, and what is known of it before it is published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stages.artefacts.manifest import Unmasking

if TYPE_CHECKING:
    from stages.artefacts.adapter_files import Tensors


@dataclass(frozen=True)
class Average:
    """An average before the gate, and what its manifest will say of it."""

    tensors: Tensors
    parents: dict[str, str]
    examples: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    unmasking: Unmasking | None = None
