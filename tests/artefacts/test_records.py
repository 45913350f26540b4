"""Whatever a workspace keeps: what was changed since it was written is noticed, and by whom."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome
from damages import problems
from federations import secrets_of
from stages.artefacts import records
from stages.artefacts.reading import read_manifest
from stages.audit.audit import audit
from stages.files import reading, writing
from stages.progress.status import status
from stages.runtime.errors import Damaged, Problem
from stages.workspace.paths import Workspace

RESULT = "results/round-0001/slm.json"


@pytest.fixture
def scored(finished: Path) -> Path:
    """A finished workspace with one result."""
    workspace = Workspace(finished)
    result = {
        "subject": "slm",
        "round": 1,
        "agreement_sha256": workspace.agreement_sha256,
        "manifest_sha256": read_manifest(workspace.slm(1))[1],
        "tasks_sha256": workspace.tasks_sha256(),
        "tasks": {"colours": {"metrics": {"acc": 0.3333}}},
    }
    (finished / RESULT).parent.mkdir(parents=True, exist_ok=True)
    (finished / RESULT).write_bytes(reading.json_bytes(records.stamped(result)))
    return finished


def test_one_flipped_bit_anywhere_in_a_result_is_noticed(scored: Path) -> None:
    content = (scored / RESULT).read_bytes()
    assert records.read_result(scored / RESULT)["tasks"]["colours"]["metrics"]["acc"] == 0.3333
    for at in range(len(content.rstrip())):
        changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        try:
            is_same = json.loads(changed) == json.loads(content)  # white space for white space
        except ValueError:
            is_same = False
        (scored / RESULT).write_bytes(changed)
        if not is_same:
            with pytest.raises(Damaged, match=r"slm\.json"):
                records.read_result(scored / RESULT)


def test_audit_and_status_name_a_changed_result_and_changed_rows(scored: Path) -> None:
    data = scored / "private/client-1/train.jsonl"
    writing.write_log(
        Workspace(scored).log("client-train", 2, 1), [{"inputs": {"data": reading.sha256(data.read_bytes())}}]
    )
    assert problems(audit([scored])) == []
    assert status(Workspace(scored), verify=True).changed == []
    data.write_bytes(data.read_bytes() + b"\n")
    (scored / RESULT).write_text((scored / RESULT).read_text().replace("0.3333", "0.7333"))
    named = [RESULT, "private/client-1/train.jsonl"]
    assert [one.where for one in audit([scored]) if one.level == "FAIL"] == named
    assert [one.partition(": ")[0] for one in status(Workspace(scored), verify=True).changed] == named
    assert status(Workspace(scored)).changed == []  # by sizes alone


def flipped(path: Path) -> bytes:
    """Change one bit in the middle of a file. Returns what it held."""
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    return content


def by_kind(*places: Path) -> dict[str, Path]:
    """One file of each name below each of these folders, numbers aside; empty files are locks."""
    found = ((place, path) for place in places for path in sorted(place.rglob("*")))
    return {
        f"{place.name}/{re.sub('[0-9]+', 'N', path.name)}": path
        for place, path in found
        if path.is_file() and path.stat().st_size
    }


def unnoticed(folder: Path, *places: Path) -> dict[str, list[str]]:
    """Of which kinds of files one flipped bit is missed, and by what."""
    missed = {}
    for kind, path in by_kind(*places).items():
        content = flipped(path)
        try:
            found = status(Workspace(folder), verify=True)
            by_status = found.is_damaged or bool(found.edited or found.stale)
        except Problem:
            by_status = True
        by_audit = any(one.level == "FAIL" for one in audit([folder]))
        path.write_bytes(content)
        if by := [name for name, is_seen in (("status", by_status), ("audit", by_audit)) if not is_seen]:
            missed[kind] = by
    return missed


def test_one_flipped_bit_in_any_file_of_a_plain_workspace_is_noticed(scored: Path) -> None:
    folders = [scored / name for name in ("exchange", "private", "tasks", "results", "data")]
    of_tasks = ("tasks/colours.yaml", "data/train.jsonl", "data/test.jsonl")
    assert status(Workspace(scored)).stale == []
    missed = unnoticed(scored, *folders)
    missed.pop("private/manifest.json", None)  # the newest, which nobody signed: said not to be covered
    assert missed == {name: ["audit"] for name in of_tasks}  # which does not cover them
    content = flipped(scored / "fedcollm.toml")
    with pytest.raises(Problem):
        status(Workspace(scored), verify=True)
    assert any(one.where == "fedcollm.toml" for one in audit([scored]) if one.level == "FAIL")
    (scored / "fedcollm.toml").write_bytes(content)


def test_one_flipped_bit_in_any_file_of_a_secure_workspace_or_its_secrets_is_noticed(summed: Path) -> None:
    mark = "keys/.fedcollm-secrets"  # of which only the name counts
    assert unnoticed(summed, summed / "exchange", summed / "private", secrets_of(summed)).keys() == {mark}


def test_status_with_verify_ends_with_4_where_anything_is_damaged_and_says_what_it_leaves_out(
    scored: Path, fedcollm: Callable[..., Outcome]
) -> None:
    whole = fedcollm("status", "--verify", "-w", scored)
    assert whole.code == 0
    assert "not covered: machine.toml" in whole.out
    flipped(scored / "private/server/round-0001/aggregate.jsonl")
    assert fedcollm("status", "-w", scored).code == 0
    found = fedcollm("status", "--verify", "-w", scored)
    assert found.code == 4
    assert "changed since it was written: private/server/round-0001/aggregate.jsonl" in found.out
    assert json.loads(fedcollm("status", "--verify", "--json", "-w", scored).out)["changed"]


def test_rows_behind_a_link_are_held_against_their_log_and_a_link_to_nothing_is_named(finished: Path) -> None:
    rows = finished / "private/client-2/train.jsonl"
    rows.rename(elsewhere := finished.parent / "scratch.jsonl")
    rows.symlink_to(elsewhere)
    assert status(Workspace(finished), verify=True).changed == []
    elsewhere.unlink()
    (said,) = status(Workspace(finished), verify=True).changed
    assert "train.jsonl is a symbolic link to" in said
