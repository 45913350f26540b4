"""Results, logs and rows: what was changed since it was written is noticed, and by whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from damages import problems
from stages.audit import audit
from stages.parts import files, records
from stages.parts.errors import Damaged
from stages.parts.workspace import Workspace
from stages.status import status

RESULT = "results/round-0001/slm.json"


@pytest.fixture
def scored(finished: Path) -> Path:
    """A finished workspace with one result."""
    result = {"subject": "slm", "round": 1, "tasks": {"colours": {"metrics": {"acc": 0.3333}}}}
    (finished / RESULT).parent.mkdir(parents=True, exist_ok=True)
    (finished / RESULT).write_bytes(files.json_bytes(records.stamped(result)))
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
    files.write_log(
        Workspace(scored).log("client-train", 2, 1), [{"inputs": {"data": files.sha256(data.read_bytes())}}]
    )
    assert problems(audit([scored])) == []
    assert status(Workspace(scored), verify=True).changed == []
    data.write_bytes(data.read_bytes() + b"\n")
    (scored / RESULT).write_text((scored / RESULT).read_text().replace("0.3333", "0.7333"))
    named = [RESULT, "private/client-1/train.jsonl"]
    assert [one.where for one in audit([scored]) if one.level == "FAIL"] == named
    assert [one.partition(": ")[0] for one in status(Workspace(scored), verify=True).changed] == named
    assert status(Workspace(scored)).changed == []  # by sizes alone
