"""What `evaluate --rows` does."""

from __future__ import annotations

from pathlib import Path

from fedcollm_cli.session import Session
from fedcollm_cli.views.rows import row_scores
from stages.artefacts.subjects import Subject
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command


def evaluate_rows(
    opened: Session,
    rows: Path | None,
    *,
    model: Subject,
    round: int | None,
    client: int | None,
    generate: bool,
    overwrite: bool,
) -> None:
    """Score a model on rows of one's own, and print what was found. Raises UsageProblem where there are none."""
    from stages.evaluate_rows import evaluate_rows as stage

    if rows is None:
        raise UsageProblem("--generate is for --rows", mend=Command("evaluate", round=1, rows=..., generate=True))
    found = stage(
        opened.workspace,
        rows,
        model=model,
        round=round,
        client=client,
        generate=generate,
        overwrite=overwrite,
        processes=opened.processes,
        report=opened.console.report,
    )
    opened.console.result(found, row_scores(found))
