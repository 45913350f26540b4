"""tables: the rows of CSV and Parquet are those of the same JSON lines, and nothing in a cell is guessed."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from builders import Outcome, rows, write_rows
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.data.prepare import prepare
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.progress.status import status
from stages.runtime.errors import Damaged, Refused
from stages.workspace.paths import Workspace

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def write_csv(path: Path, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *cells])
    return path


def write_parquet(path: Path, values: list[dict[str, Any]]) -> Path:
    datasets.Dataset.from_list(values).to_parquet(path)
    return path


def test_in_csv_every_cell_is_text_and_an_empty_one_is_none(tmp_path: Path) -> None:
    cells = [["Is it, or not?", " NA", "007"], ["two\nlines", ' "1.0"', ""]]
    path = write_csv(tmp_path / "train.csv", ["prompt", "completion", "label"], cells)
    found, digest = read_rows(path)
    assert found == [Row("Is it, or not?", " NA", label="007"), Row("two\nlines", ' "1.0"')]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_spreadsheet_s_mark_and_line_ends_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes("prompt,completion\r\nQ,é\r\n".encode("utf-8-sig"))
    assert read_rows(path)[0] == [Row("Q", "é")]


def test_messages_in_csv_are_json(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", ["messages"], [[json.dumps(CHAT)]])
    assert read_rows(path)[0] == read_rows(write_rows(tmp_path / "x.jsonl", [{"messages": CHAT}]))[0]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "values",
    [
        [{"prompt": "Q", "completion": " A", "id": 3}, {"prompt": "R", "completion": " B", "id": 4}],
        [{"messages": CHAT}, {"messages": CHAT * 2}],
        [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
        [{"instruction": "I", "input": None, "output": "O"}, {"instruction": "I", "input": "x", "output": "P"}],
    ],
    ids=["texts", "messages", "turns", "instructions"],
)
def test_parquet_as_datasets_writes_it_gives_the_rows_of_the_same_json_lines(
    values: list[dict[str, Any]], tmp_path: Path
) -> None:
    found, _ = read_rows(write_parquet(tmp_path / "x.parquet", values))
    assert found == read_rows(write_rows(tmp_path / "x.jsonl", values))[0]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"prompt,completion\nQ,A\nQ\n", "row 2 of x.csv: 1 cells, under 2 columns"),
        (b"prompt,completion\nQ,A\n,A\n", "row 2 of x.csv: no prompt"),
        (b"prompt,completion\nQ,A\n\nQ,A\n", "row 2 of x.csv: an empty line"),
        (b"messages\n[\n", "row 1 of x.csv: messages is not JSON"),
        (b"prompt;completion\nQ;A\n", "x.csv has no column of rows: 'prompt;completion'"),
        (b"prompt,prompt\nQ,A\n", "x.csv has the column 'prompt' twice"),
        (b"", "x.csv has no column of rows: it is empty"),
        (b"prompt,completion\n", "x.csv is empty"),
        (b'prompt,completion\n"Q"x,A\n', "x.csv is no CSV from line 2 on"),
        (b"prompt,completion\nQ,\xe9\n", "x.csv is not UTF-8"),
    ],
)
def test_a_table_that_is_none_is_told_by_its_row(content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(Damaged) as caught:
        read_rows(tmp_path / "x.csv")
    assert caught.value.message.startswith(found)
    assert caught.value.mend


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(20) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(Damaged, match=r"x\.parquet is no Parquet that can be read"):
        read_rows(tmp_path / "x.parquet")


@pytest.fixture
def tabled(workspace_folder: Path) -> Path:
    """A workspace where client 2 has its rows as CSV and client 3 as Parquet."""
    for k, end in ((2, "csv"), (3, "parquet")):
        path = workspace_folder / f"private/client-{k}/train.jsonl"
        values = [json.loads(line) for line in path.read_text().splitlines()]
        if end == "csv":
            write_csv(path.with_suffix(".csv"), ["prompt", "completion"], [list(one.values()) for one in values])
        else:
            write_parquet(path.with_suffix(".parquet"), values)
    return workspace_folder


def without_lines(folder: Path) -> Workspace:
    for k in (2, 3):
        (folder / f"private/client-{k}/train.jsonl").unlink()
    return Workspace(folder)


def test_a_client_trains_on_a_table_as_on_the_same_lines(tabled: Path) -> None:
    kept = {k: (tabled / f"private/client-{k}/train.jsonl").read_bytes() for k in (2, 3)}
    workspace = without_lines(tabled)
    broadcast(workspace, round=1)
    by_table = {k: client_train(workspace, client=k, round=1) for k in (2, 3)}
    for k, lines in kept.items():
        workspace.client_data(k).unlink()
        (tabled / f"private/client-{k}/train.jsonl").write_bytes(lines)
        by_lines = client_train(workspace, client=k, round=1, overwrite=True)
        assert by_lines.metrics == by_table[k].metrics
        assert by_lines.files["adapter_model.safetensors"] == by_table[k].files["adapter_model.safetensors"]


def test_two_files_of_rows_are_refused_by_every_command(tabled: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("client-train", "--client", "2", "--round", "1", "-w", tabled)
    assert outcome.code == Refused.exit_code
    assert "client 2 has several files of rows: train.jsonl, train.csv" in outcome.err
    assert fedcollm("status", "-w", tabled).code == Refused.exit_code


def test_check_rows_counts_rows_of_a_table_and_mends_none(tabled: Path, fedcollm: Callable[..., Outcome]) -> None:
    workspace = without_lines(tabled)
    path = workspace.client_data(2)
    path.write_text("prompt,completion\nQ : red ? A :,blue\nQ : red ? A :, blue\n,x\n")
    outcome = fedcollm("check-rows", path, "--fix", "-w", tabled)
    assert outcome.code == 4
    assert "private/client-2/train.csv: 2 rows" in outcome.out
    assert "FAIL no prompt: row 3" in outcome.out
    assert "WARN no space between prompt and completion: row 1" in outcome.out
    assert not list(path.parent.glob("*.mended.*"))


def test_prepare_writes_over_no_table_and_status_knows_its_party(tabled: Path) -> None:
    workspace = without_lines(tabled)
    assert all(step.here for step in status(workspace).rounds[0].steps if step.party.startswith("client"))
    agreement = tabled / "fedcollm.toml"
    agreement.write_text(agreement.read_text() + '\n[data]\nfiles = ["data/all.jsonl"]\n')
    write_rows(tabled / "data/all.jsonl", rows(30))
    with pytest.raises(Refused, match=r"client 2 has rows of its own in private/client-2/train\.csv"):
        prepare(Workspace(tabled), overwrite=True)
