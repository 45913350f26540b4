"""The report's table of rows of one's own: the last round of each model, and what has become another since."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from builders import rows, scale, write_rows
from stages.evaluate_rows import evaluate_rows
from stages.report import own_rows
from stages.report.report import write_report
from stages.workspace.paths import Workspace


@pytest.fixture
def scored(finished: Path) -> Workspace:
    """Client 2's adapter of both rounds, and its base, measured on client 2's rows."""
    workspace, held_out = Workspace(finished), write_rows(finished / "private/client-2/held-out.jsonl", rows(6))
    for round in (1, 2):
        evaluate_rows(workspace, held_out, round=round, client=2)
    evaluate_rows(workspace, held_out, generate=True)
    return workspace


def test_the_last_round_of_each_model_and_the_base_are_shown(scored: Workspace) -> None:
    [table] = own_rows.tables(scored)
    assert [row[:4] for row in table.rows] == [
        ["slm", "base", "private/client-2/held-out.jsonl", "6"],
        ["client-2", "2", "private/client-2/held-out.jsonl", "6"],
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert [bool(row[-1]) for row in table.rows] == [True, False]


def test_what_has_become_another_since_is_said(scored: Workspace) -> None:
    scale(scored.client_adapter(2, 2), 3)
    assert own_rows.tables(scored)[0].rows[1][2].endswith(" (of another adapter)")
    write_rows(scored.private / "client-2/held-out.jsonl", rows(7))
    assert all(row[2].endswith(" (edited since)") for row in own_rows.tables(scored)[0].rows)


def test_the_page_has_the_table_and_without_results_it_has_none(scored: Workspace) -> None:
    write_report(scored, in_words=lambda _: ([], []))
    page = (scored.report / "index.html").read_text()
    assert "<caption>Rows of one&#39;s own</caption>" in page
    shutil.rmtree(scored.rows_results)
    write_report(scored, in_words=lambda _: ([], []))
    assert "of one&#39;s own" not in (scored.report / "index.html").read_text()
