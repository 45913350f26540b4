"""evaluate --rows: loss, perplexity and exact match of one model on rows of one's own; no task file is needed.

Reads a file of rows, and the adapter as evaluate does. Writes results/own-rows/round-t/*.json, apart from scores.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.artefacts import records, row_records
from stages.artefacts.manifest import versions
from stages.artefacts.reading import Artefact
from stages.artefacts.row_records import AskedRows, MeasuredRows, RowScores, RowsResult
from stages.artefacts.steps import Over, Step
from stages.artefacts.subjects import Subject, adapter_of, subject_of
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.files import reading, writing
from stages.parties.party import Party
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.workspace.names import ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.workspace.settings import Role


def evaluate_rows(
    workspace: Workspace,
    rows: Path,
    *,
    model: Subject = "slm",
    round: int | None = None,
    client: int | None = None,
    generate: bool = False,
    overwrite: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> RowsResult:
    """Score one model on a file of rows, and write down how well it knows their answers. Returns what the file says.

    model, round, client: as evaluate has them. generate: let the model write answers itself, too, and compare them.
    Raises as read_rows and encode do for rows that cannot be read or do not fit into the model's context.
    """
    subject, rows = subject_of(model, client), Path(os.path.normpath(rows.absolute()))
    target = workspace.rows_result(round, subject, rows)
    return EvaluateRows(
        party=Party.of(workspace, client),
        rows=rows,
        model=model,
        subject=subject,
        round=round,
        client=client,
        generate=generate,
        publishes=[target],
        log=target,
        overwrite=overwrite,
        models=models,
        processes=processes,
        report=report,
    ).take()


class Opened(NamedTuple):
    """The rows, the adapter, None for the base alone, and what decides the scores."""

    rows: list[Row]
    adapter: Artefact | None
    asked: AskedRows


@dataclass(frozen=True, kw_only=True)
class EvaluateRows(Step[Opened, MeasuredRows, RowsResult]):
    """Score one model on a file of rows."""

    rows: Path
    model: Subject
    subject: str
    round: int | None
    client: int | None
    generate: bool
    models: Models | None

    @property
    def role(self) -> Role:
        """The base that is scored."""
        return "llm" if self.subject == "llm" else "slm"

    @property
    def lock(self) -> Path:
        """Hidden, beside the result."""
        return self.log.with_name(f".{self.log.stem}.lock")

    def open(self) -> Opened:
        """Read the rows, and receive the adapter; without one, the base is loaded to know which it is."""
        name = self.subject if self.round is None else f"{self.subject}, round {self.round}"
        self.report(Event("stage", f"evaluate {name} on {self.workspace.shown(self.rows)}"))
        rows, rows_sha256 = read_rows(self.rows)
        if self.round is None:
            adapter, base = None, self._models.get(self.role).identity
        else:
            adapter = adapter_of(self.workspace, self.model, self.round, self.client)
            base = adapter.manifest.base
        agreement = self.workspace.agreement
        asked: AskedRows = {
            "subject": self.subject,
            "round": self.round,
            "rows": self.workspace.shown(self.rows),
            "rows_sha256": rows_sha256,
            "adapter_sha256": adapter.manifest.files[ADAPTER_WEIGHTS].sha256 if adapter else None,
            "manifest_sha256": adapter.sha256 if adapter else None,
            "base": base.model_dump(),
            "dtype": self.workspace.machine.dtype or agreement.model_of(self.role).dtype,
            "precision": self.workspace.evaluation.precision,
            "batch_size": self.workspace.evaluation.batch_size,
            "generate": self.generate,
        }
        return Opened(rows, adapter, asked)

    def look(self, opened: Opened, again: bool) -> RowsResult | None:
        """A result of this adapter on these rows."""
        [target] = self.publishes
        if again or not target.exists():
            return None
        earlier = row_records.read_rows_result(target)
        return earlier if all(earlier.get(key) == value for key, value in opened.asked.items()) else None

    def compute(self, opened: Opened, again: bool) -> MeasuredRows:
        """Put the adapter into the base, prove that it is there, and score all rows that fit."""
        from stages.data.examples import encode, tell_left_out
        from stages.evaluation import own_rows
        from stages.evaluation.asking import asking
        from stages.evaluation.standing import standing

        agreement, name = self.workspace.agreement, self.workspace.shown(self.rows)
        settings, role = self.workspace.evaluation, self.role
        tuned, has_adapter = standing(self._models, role, opened.adapter, agreement, self.report)
        limits = {"max_length": tuned.context, "context": tuned.context}
        examples = encode(opened.rows, tuned.tokenizer, **limits, too_long=agreement.data.too_long, path=self.rows)
        ready = asking(
            tuned,
            with_adapter=has_adapter,
            batch_size=settings.batch_size,
            as_trained=settings.precision == "training",
            processes=self.processes,
            shares=role not in self.workspace.machine.sharding,
            report=self.report,
        )
        with ready as lm:
            scores: RowScores = own_rows.known(lm, examples, name)
            if self.generate:
                scores["written"] = own_rows.written(lm, examples, name)
        if tell_left_out(opened.rows, examples, self.rows, self.report):
            scores["rows_left_out"] = len(opened.rows) - len(examples)
        dtype = tuned.dtype if settings.precision == "training" else str(tuned.model.dtype).removeprefix("torch.")
        return {"weights_dtype": dtype, "versions": versions(), "scores": scores}

    def publish(self, opened: Opened, computed: MeasuredRows, over: Over) -> RowsResult:
        """Write the result down."""
        [target] = self.publishes
        result: RowsResult = {**opened.asked, **computed}
        writing.write(target, reading.json_bytes(records.stamped(result)), over=over[target])
        return result

    @cached_property
    def _models(self) -> Models:
        from stages.models.loading import Models

        return self.models.of(self.workspace) if self.models else Models(self.workspace, self.processes)
