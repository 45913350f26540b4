"""figures: what stands around the charts is true of their rows, however many there are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from builders import edit
from stages.files import reading, writing
from stages.report.charts import Chart
from stages.report.drawing import Absent, draw
from stages.report.figures import figures
from stages.workspace.paths import Workspace


def drawn(name: str, folder: Path) -> Chart | Absent:
    [figure] = [figure for figure in figures("acc") if figure.name == name]
    return draw(figure, Workspace(folder))


def chart(name: str, folder: Path) -> Chart:
    found = drawn(name, folder)
    assert isinstance(found, Chart), found
    return found


def test_rare_labels_are_counted_together_and_no_row_is_lost(workspace_folder: Path) -> None:
    labels = {f"label {i}": 20 - i for i in range(10)}
    parties = {"client-1": {"labels": labels}, "server": {"labels": {"label 9": 5}}}
    writing.write(Workspace(workspace_folder).split, reading.json_bytes({"parties": parties}))
    found = chart("split-labels", workspace_folder)
    totals = Counter[str]()
    for row in found.rows:
        totals[row["label"]] += row["rows"]
    # 155 and 5 rows; the server's five make label 9 the fifth most common: 20 19 18 17 16 16 15
    assert sum(totals.values()) == 160
    assert len(totals) == 8
    assert totals["label 9"] == 16
    assert totals["others"] == 14 + 13 + 12
    assert found.caption.startswith("160 rows")


def test_of_many_parties_some_are_drawn_and_all_are_in_the_data(workspace_folder: Path) -> None:
    parties = {f"client-{k}": {"labels": {"0": k}} for k in range(1, 151)}
    writing.write(Workspace(workspace_folder).split, reading.json_bytes({"parties": parties}))
    found = chart("split-labels", workspace_folder)
    assert len(found.rows) == 150
    assert [row["party"] for row in found.spec["data"]["values"]][-2:] == ["client-147", "client-150"]
    assert "50 of 150 are drawn" in found.caption  # every third: at most 60


@pytest.mark.parametrize(("rounds", "ends"), [(10, True), (11, False)])
def test_lines_of_losses_end_with_their_round_while_rounds_are_few(
    rounds: int, ends: bool, workspace_folder: Path
) -> None:
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", f"rounds = {rounds}")
    workspace = Workspace(workspace_folder)
    for round in range(1, rounds + 1):
        log = [{"inputs": {}}, {"step": 1, "slm_ft": 1.0}, {"step": 2, "slm_ft": 0.5}, {"wall_s": 1.0}]
        writing.write_log(workspace.log("client-train", round, 1), log)
    found = chart("loss-client-train", workspace_folder)
    assert ("detail" in found.spec["encoding"]) == ends
    assert ("a line ends with its round" in found.caption) == ends


def write_result(workspace: Workspace, round: int | None) -> None:
    """A result of the LLM as evaluate leaves it, two of four questions right."""
    belongs = {"agreement_sha256": workspace.agreement_sha256, "tasks_sha256": workspace.tasks_sha256()}
    value = {"tasks": {"colours": {"correct": {"acc": "1100"}}}, **belongs}
    writing.write(workspace.result(round, "llm"), reading.json_bytes(value))


def test_the_caption_of_accuracies_says_what_the_bars_are(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    write_result(workspace, 1)
    found = chart("accuracy-llm", workspace_folder)
    assert "One seed: bars are the binomial standard error of 4 questions." in found.caption


def test_a_base_alone_is_no_accuracy_over_rounds(workspace_folder: Path) -> None:
    workspace = Workspace(workspace_folder)
    write_result(workspace, None)
    found = drawn("accuracy-llm", workspace_folder)
    assert isinstance(found, Absent)
    assert "fedcollm run" in found.reason


def test_every_figure_has_a_name_of_its_own_and_a_sentence_for_its_absence(workspace_folder: Path) -> None:
    planned = figures("acc")
    assert len({figure.name for figure in planned}) == len(planned) == 13
    for figure in planned:
        absent = draw(figure, Workspace(workspace_folder))
        assert isinstance(absent, Absent)
        assert absent.reason.endswith(".")
