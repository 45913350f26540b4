"""report: its options, and its result in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fedcollm_cli.session import Session, in_workspace
from fedcollm_cli.views.sheets import Sheet
from fedcollm_cli.views.tables import notes, sheets

if TYPE_CHECKING:
    from stages.study.comparison import Comparison


@in_workspace("quiet")
def report(
    *,
    metric: Annotated[str, typer.Option("--metric", help="acc or acc_norm.")] = "acc",
    opened: Session,
) -> None:
    """Write one page of charts and tables on all that is here.

    Reads results/, manifests, exchanged adapters and this machine's private logs. For the comparison, it also reads
    these in baselines/ and seeds/. Writes results/report: index.html, and every chart's data as CSV. The page is one
    file without scripts, and needs no network. What is not on this machine is left out, and the page says why.

    Example: fedcollm report
    """
    from stages.report.report import write_report

    written = write_report(opened.workspace, in_words=in_words, metric=metric, report=opened.console.report)
    opened.console.result(asdict(written), written.path)


def in_words(found: Comparison) -> tuple[list[Sheet], list[str]]:
    """What compare found, as tables in words and the notes below them."""
    return sheets(found), notes(found)
