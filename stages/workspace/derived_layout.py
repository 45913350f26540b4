"""Where workspaces are that are derived from another: other methods, seeds or settings on the same data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class Derived(ABC):
    """The folders of the workspaces that are derived from this one, and whether this is one itself."""

    root: Path

    @property
    @abstractmethod
    def home(self) -> Path:
        """Where relative paths of the settings, and tasks/, start."""

    def baseline(self, method: str) -> Path:
        """Another method on the same data, with the same budgets."""
        return self.root / "baselines" / method

    def replica(self, seed: int) -> Path:
        """The same federation from another seed."""
        return self.root / "seeds" / f"seed-{seed}"

    def sweep_point(self, name: str) -> Path:
        """The same federation with other settings, which name it."""
        return self.root / "sweeps" / name

    @property
    def is_baseline(self) -> bool:
        """Whether this one was derived from another as its baseline: methods are run and compared from there."""
        return self.home != self.root and self.baseline("").name == self.root.parent.name
