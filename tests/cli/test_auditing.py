"""audit on the command line: a line for each check, exit codes a script can act on, and JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome

Fedcollm = Callable[..., Outcome]
CLIENT = "exchange/round-0001/client-2"


def test_a_clean_workspace_has_a_line_for_each_check_and_ends_well(finished_once: Path, fedcollm: Fedcollm) -> None:
    outcome = fedcollm("audit", "--strict", "-w", finished_once)
    assert outcome.code == 0
    *lines, last = outcome.out.splitlines()
    assert last == "result: clean (exit 0)"
    assert all(re.match(r"A\d+ +(OK  |SKIP) [a-z]+ +\S", line) for line in lines)
    checks = [line[:2] for line in lines if " OK " in line]
    assert checks == ["A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8"]


def test_the_workspace_is_found_from_a_folder_in_it(
    finished_once: Path, fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_once / "private")
    assert "14 manifests" in fedcollm("audit").out
    assert "4 manifests" in fedcollm("audit", "../exchange/round-0001").out


def test_outside_a_workspace_it_needs_a_path(
    finished_once: Path, fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fedcollm("audit")
    assert outcome.code == 2
    assert "mend" in outcome.err
    shutil.copytree(finished_once / CLIENT, tmp_path / "got")
    outcome = fedcollm("audit", "got")
    assert outcome.code == 0
    assert "A2  OK   files    3 files in 1 folder" in outcome.out


def test_a_warning_is_an_exit_code_only_if_strict(finished: Path, fedcollm: Fedcollm) -> None:
    (finished / CLIENT / "notes.txt").touch()
    relaxed, strict = fedcollm("audit", "-w", finished), fedcollm("audit", "--strict", "-w", finished)
    assert (relaxed.code, strict.code) == (0, 10)
    assert relaxed.out.endswith("result: 1 warning (exit 0)\n")
    assert strict.out.endswith("result: 1 warning (exit 10)\n")
    assert f"A2  WARN files    {CLIENT}/notes.txt: no manifest names it" in relaxed.out


def test_a_failure_is_exit_code_4_and_no_summary_claims_otherwise(finished: Path, fedcollm: Fedcollm) -> None:
    weights = finished / CLIENT / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    outcome = fedcollm("audit", "-w", finished)
    assert outcome.code == 4
    assert "result: 1 failure (exit 4)" in outcome.out
    assert re.search(
        rf"A2  FAIL files    {CLIENT}/adapter_model.safetensors: sha256 \w+\.\.\.; expected \w+", outcome.out
    )
    assert "all sha256" not in outcome.out


def test_json_is_a_list_of_findings_with_all_that_was_measured(finished_once: Path, fedcollm: Fedcollm) -> None:
    found = json.loads(fedcollm("audit", "--json", "-w", finished_once).out)
    assert all({"id", "level", "check", "where", "found", "expected", "text"} <= set(one) for one in found)
    measured = [one for one in found if one["id"] == "A4" and "measured" in one]
    assert len(measured) == 14
    assert all(one["measured"]["largest"] > 0 for one in measured)


def test_canaries_and_clients_are_options(finished: Path, fedcollm: Fedcollm) -> None:
    (finished / "exchange/round-0001/client-1/notes.txt").write_text("the patient Zed")
    words = ("--canary", "Zed", "--canary", "another")
    assert fedcollm("audit", *words, "-w", finished).code == 4
    outcome = fedcollm("audit", *words, "--client", 2, "-w", finished)
    assert outcome.code == 0
    assert "2 canary strings searched in every byte" in outcome.out
    assert "client-1" not in outcome.out
    outcome = fedcollm("audit", "--client", 9, "-w", finished)
    assert outcome.code == 2
    assert "there is no client 9" in outcome.err


def test_the_report_shows_what_the_audit_found(finished: Path, fedcollm: Fedcollm) -> None:
    (finished / CLIENT / "notes.txt").touch()
    assert fedcollm("report", "-w", finished).code == 0
    page = (finished / "results/report/index.html").read_text()
    assert '<section id="audit">' in page
    assert "result: 1 warning (exit 0)" in page
    assert f"<td>WARN</td><td>files</td><td>{CLIENT}/notes.txt: no manifest names it" in page
