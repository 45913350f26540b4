"""What an average is made of, and what is known of it before it is published."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stages.artefacts.manifest import Unmasking
from stages.artefacts.reading import Artefact

if TYPE_CHECKING:
    from stages.artefacts.adapter_files import Tensors


@dataclass(frozen=True)
class Arrived:
    """The updates of a round that an average is made of, and the sha256 of the manifest of each parent, by name.

    updates: the folder of each client, where updates are read one by one; closed: the close, where they are summed.
    """

    parents: dict[str, str]
    updates: dict[int, Path] = field(default_factory=dict)
    closed: Artefact | None = None

    @property
    def is_decided(self) -> bool:
        """Whether it was looked which updates are here."""
        return bool(self.updates or self.closed)


@dataclass(frozen=True)
class Average:
    """An average before the gate, and what its manifest will say of it. beside: files that are published with it."""

    tensors: Tensors
    parents: dict[str, str]
    examples: int = 0
    tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    unmasking: Unmasking | None = None
    beside: dict[str, bytes] = field(default_factory=dict)
