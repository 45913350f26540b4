"""report: a whole page from whatever is there, that names what is not, and nothing of the machine it was made on."""

from __future__ import annotations

import base64
import getpass
import json
import platform
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

from builders import Outcome, edit
from stages.report.report import verdicts
from stages.study.statistics import Difference
from stages.study.table_rows import Row

Fedcollm = Callable[..., Outcome]


def page_of(folder: Path) -> str:
    return (folder / "results" / "report" / "index.html").read_text()


def text_of(page: str) -> str:
    """What people read: no tags, no data, no spaces that mean nothing."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S))).split())


def test_the_page_has_every_chart_table_and_setting(reported_once: Path) -> None:
    report = reported_once / "results" / "report"
    names = {path.stem for path in report.glob("*.csv")}
    assert names == {
        *("accuracy-llm", "accuracy-slm", "accuracy-clients", "loss-client-train", "loss-co-distill-slm"),
        *("loss-co-distill-llm", "bytes", "lost-by-averaging", "drift-norm", "drift-cosine", "wall-time"),
    }
    page = page_of(reported_once)
    assert set(re.findall(r'<figure id="([\w-]+)"', page)) == names
    assert page.count("<svg") == len(names)
    text = text_of(page)
    assert "FedCoLLM, beside FedAvg: 3 clients, 2 rounds, seed 7." in text
    assert "FedCoLLM minus the other methods, points" in text
    assert "[client_training] steps = 6" in text
    assert "From one seed no difference between methods can be claimed" in text


def test_ids_are_unique_so_that_charts_do_not_borrow_from_each_other(reported_once: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page_of(reported_once))
    assert len(ids) == len(set(ids))


def test_the_page_needs_no_script_no_network_and_no_other_file(reported_once: Path) -> None:
    page = page_of(reported_once)
    assert "<script" not in page
    assert "<img" not in page
    links = {link for link in re.findall(r'href="([^"]*)"', page) if not link.startswith(("#", "data:"))}
    assert links == {path.name for path in (reported_once / "results" / "report").glob("*.csv")}
    assert "default-src 'none'" in page


def test_nothing_of_this_machine_is_in_it_nor_a_row_of_the_data(reported_once: Path) -> None:
    page = page_of(reported_once)
    page += "".join(base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", page))
    for secret in (str(reported_once), str(reported_once.parent), "/tmp", platform.node()):
        assert secret not in page
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text_of(page))
    assert "what colour is" not in page


def test_a_report_made_again_has_the_same_bytes_and_keeps_no_chart_that_is_gone(
    fedcollm: Fedcollm, reported_once: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(reported_once, tmp_path / "study", symlinks=True)
    report = folder / "results" / "report"
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    assert fedcollm("report", "-w", folder).out == "results/report/index.html\n"
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before
    shutil.rmtree(folder / "private" / "server" / "round-0001")
    shutil.rmtree(folder / "private" / "server" / "round-0002")
    fedcollm("report", "-w", folder)
    assert not (report / "lost-by-averaging.csv").exists()


def test_without_anything_it_says_what_to_do_first(fedcollm: Fedcollm, workspace_folder: Path) -> None:
    outcome = fedcollm("report", "-w", workspace_folder)
    assert outcome.code == 3
    assert "nothing to report yet" in outcome.err
    assert "mend  fedcollm broadcast --round 1" in outcome.err
    assert not (workspace_folder / "results").exists()


def test_logs_alone_are_reported_without_an_audit(fedcollm: Fedcollm, finished: Path) -> None:
    shutil.rmtree(finished / "exchange")
    for adapters in finished.glob("private/*/round-*/*/"):
        shutil.rmtree(adapters)
    assert fedcollm("report", "-w", finished).code == 0
    assert "nothing has been exchanged yet: nothing was checked" in text_of(page_of(finished))


def test_a_data_split_alone_is_nothing_to_report(fedcollm: Fedcollm, workspace_folder: Path) -> None:
    split = {"parties": {"client-1": {"labels": {"0": 3}, "sources": {"colours": 3}}}}
    (workspace_folder / "private" / "split.json").write_text(json.dumps(split))
    outcome = fedcollm("report", "-w", workspace_folder)
    assert outcome.code == 3
    assert "nothing to report yet" in outcome.err


def test_what_was_not_scored_is_left_out_with_the_command_that_scores_it(fedcollm: Fedcollm, finished: Path) -> None:
    written = json.loads(fedcollm("report", "-w", finished, "--json").out)
    assert {"accuracy-llm", "tables"} <= set(written["left_out"])
    assert "fedcollm compare --seeds 7 --methods fedcollm" in written["left_out"]["tables"]
    assert "bytes" in written["charts"]
    text = text_of(page_of(finished))
    assert "Nothing has been scored yet: fedcollm run scores every round" in text
    assert "Left out. 7 results are not there" in text


def test_a_clients_own_copy_shows_what_is_there_and_names_who_has_the_rest(fedcollm: Fedcollm, finished: Path) -> None:
    shutil.rmtree(finished / "private" / "server")
    for other in (1, 3):
        shutil.rmtree(finished / "private" / f"client-{other}")
    fedcollm("report", "-w", finished)
    text = text_of(page_of(finished))
    assert "No log of co-distill is on this machine: the server has it" in text
    losses = (finished / "results" / "report" / "loss-client-train.csv").read_text()
    assert {line.partition(",")[0] for line in losses.splitlines()[1:]} == {"client 2"}


def test_a_damaged_adapter_costs_its_charts_and_no_more(fedcollm: Fedcollm, finished: Path) -> None:
    weights = finished / "exchange" / "round-0001" / "client-3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert fedcollm("report", "-w", finished).code == 0
    report = finished / "results" / "report"
    assert not (report / "drift-norm.csv").exists()
    assert (report / "lost-by-averaging.csv").exists()
    assert "copy the folder again from its origin" in text_of(page_of(finished))


def test_settings_are_shown_escaped_and_without_the_folders_of_this_machine(
    fedcollm: Fedcollm, finished: Path, base_models: Path
) -> None:
    settings = finished / "fedcollm.toml"
    edit(settings, 'model = "models/slm"', f'model = "{base_models}/slm"  # <b>from {base_models}/slm</b>')
    assert fedcollm("report", "-w", finished).code == 0
    page = page_of(finished)
    assert str(base_models) not in page
    assert "<b>" not in page
    assert 'model = ".../slm"' in text_of(page)


def test_a_metric_that_was_not_measured_is_named_with_those_that_were(
    fedcollm: Fedcollm, reported_once: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(reported_once, tmp_path / "study", symlinks=True)
    written = json.loads(fedcollm("report", "-w", folder, "--metric", "acc_norm", "--json").out)
    assert "--metric with one of its metrics: acc" in written["left_out"]["accuracy-slm"]


def test_a_difference_is_named_only_where_the_error_bars_support_it() -> None:
    def found(mean: float, half_width: float | None) -> dict[str, Difference]:
        is_supported = half_width is not None and abs(mean) > half_width
        return {"all tasks": Difference(mean, 0.01, 0.01, half_width, is_supported)}

    differences: dict[Row, dict[str, Difference]] = {
        "zero-shot": found(0.25, 0.1),
        "standalone": found(0.2, 0.1),
        "fedavg": found(0.1, 0.15),
        "centralized": found(-0.05, 0.01),
    }
    assert verdicts(differences) == [
        "higher than Zero-Shot and Standalone",
        "lower than Centralized",
        "no difference shown from FedAvg",
    ]
    assert verdicts({"fedavg": found(0.5, None)}) == []
