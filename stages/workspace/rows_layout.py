"""Where rows are in a workspace, and what was measured on them."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path

from stages.files import reading
from stages.runtime.errors import Refused
from stages.workspace.derived_layout import Derived
from stages.workspace.names import ZERO_SHOT, round_name

TABLES = (".csv", ".parquet")
"""The ends of the names of files that hold rows as tables, and not as JSON lines."""


class RowsLayout(Derived):
    """The files of rows, and results on them."""

    @property
    @abstractmethod
    def private(self) -> Path:
        """What never leaves its machine."""

    def shown(self, path: Path) -> str:
        """A path as people see it: from the workspace down."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def client_data(self, client: int) -> Path:
        """D^k: JSON lines, or a table where there is one. Raises Refused where there are several."""
        lines = self.dealt_data(client)
        here = [path for path in (lines, *map(lines.with_suffix, TABLES)) if os.path.lexists(path)]
        if len(here) > 1:
            message = f"client {client} has several files of rows: {', '.join(path.name for path in here)}"
            raise Refused(message, where=lines.parent, mend="leave the one there that is meant")
        return here[0] if here else lines

    def dealt_data(self, client: int) -> Path:
        """D^k as `prepare` writes it."""
        return self.private / f"client-{client}" / "train.jsonl"

    @property
    def auxiliary_data(self) -> Path:
        """D^a."""
        return self.private / "server" / "auxiliary.jsonl"

    @property
    def held_out_data(self) -> Path:
        """Rows that nobody trains on: the server's, for aggregate's gate."""
        return self.private / "server" / "held-out.jsonl"

    @property
    def rows_results(self) -> Path:
        """What models' losses on rows of one's own were; apart from lm-eval's scores, which are compared."""
        return self.root / "results" / "own-rows"

    def rows_result(self, round: int | None, subject: str, rows: Path) -> Path:
        """That of one model on a file of rows, named by model and file; without a round, of the base alone."""
        whole = reading.sha256(self.shown(rows).encode())[:8]
        return (
            self.rows_results
            / (ZERO_SHOT if round is None else round_name(round))
            / f"{subject}-{rows.stem}-{whole}.json"
        )
