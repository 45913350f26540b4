"""progress: secure mode's folders among the others, and what of them is done, missing, damaged or stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from federations import enrol
from stages.progress.rounds import Reader
from stages.progress.steps import Step
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

ROUND = "exchange/round-0001"


def steps(folder: Path, number: int = 1, *, verify: bool = False) -> dict[str, Step]:
    reader = Reader(Workspace(folder), verify)
    return {step.name: step for step in [reader.round(n) for n in range(1, number + 1)][-1].steps}


def test_a_finished_secure_round_has_a_close_and_reveals_between_updates_and_average(summed: Path) -> None:
    for number in (1, 2):
        found = steps(summed, number, verify=True)
        assert list(found) == [
            "broadcast",
            *(f"client-{k}" for k in (1, 2, 3)),
            "close",
            *(f"reveal-{k}" for k in (1, 2, 3)),
            "aggregate",
            "llm",
            "slm",
        ]
        assert {step.condition for step in found.values()} == {"done"}


def test_a_fresh_secure_round_has_the_same_steps_each_with_its_command(enrolled: Path) -> None:
    found = steps(enrolled)
    assert {step.condition for step in found.values()} == {"missing"}
    assert found["close"].command == found["aggregate"].command == Command("aggregate", round=1)
    assert (found["reveal-2"].command, found["reveal-2"].party) == (Command("reveal", client=2, round=1), "client-2")
    assert [step.party for step in found.values() if step.name in ("broadcast", "close", "llm")] == ["server"] * 3


def test_reveals_that_a_finished_average_did_without_are_not_waited_for(summed: Path) -> None:
    shutil.rmtree(summed / ROUND / "reveal-2")
    assert "reveal-2" not in steps(summed)
    shutil.rmtree(summed / "private/server/round-0001/aggregate")
    assert steps(summed)["reveal-2"].condition == "missing"


def test_a_reveal_for_another_close_is_stale(summed: Path) -> None:
    shutil.rmtree(summed / ROUND / "reveal-2")
    shutil.copytree(summed / "exchange/round-0002/reveal-2", summed / ROUND / "reveal-2")
    found = steps(summed)["reveal-2"]
    assert (found.condition, found.reason) == (
        "damaged",
        "is round-0002/reveal-2, here it should be round-0001/reveal-2",
    )
    assert (
        str(found.command) == "fedcollm reveal --client 2 --round 1"
    )  # which sends the stored bytes again: no --overwrite


def test_what_was_made_before_a_new_roster_is_stale(summed: Path) -> None:
    enrol(Workspace(summed), renew=True)
    found = steps(summed)
    assert {step.condition for step in found.values()} == {"stale"}
    assert found["broadcast"].reason == "made from another roster"
    assert str(found["broadcast"].command) == "fedcollm broadcast --round 1 --overwrite"


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("client-2/shares.safetensors", "shares.safetensors is missing"),
        ("client-2/manifest.json", "client-2 has no manifest.json yet"),
        ("client-2/manifest.json.sig", "manifest.json.sig is missing"),
        ("close/manifest.json.sig", "manifest.json.sig is missing"),
    ],
)
def test_half_a_folder_is_missing_where_it_is_copied_to_and_damaged_where_it_was_made(
    file: str, reason: str, summed: Path
) -> None:
    (summed / ROUND / file).unlink()
    name = file.partition("/")[0]
    found = steps(summed)[name]
    assert (found.condition, found.reason, found.here) == ("damaged", reason, True)
    (summed / "private/client-2/train.jsonl").unlink()
    (summed / "private/server/auxiliary.jsonl").unlink()
    found = steps(summed)[name]
    assert (found.condition, found.reason, found.here) == ("missing", reason, False)


def test_a_close_without_the_inboxes_of_others_is_whole(summed: Path) -> None:
    for k in (1, 3):
        (summed / ROUND / f"close/client-{k}.safetensors").unlink()
    assert steps(summed, verify=True)["close"].condition == "done"
    content = bytearray((summed / ROUND / "close/client-2.safetensors").read_bytes())
    content[-1] ^= 1
    (summed / ROUND / "close/client-2.safetensors").write_bytes(content)
    assert steps(summed)["close"].condition == "done"  # sizes alone
    assert steps(summed, verify=True)["close"].condition == "damaged"


def test_a_link_in_place_of_a_folder_is_damaged(summed: Path, tmp_path: Path) -> None:
    shutil.move(summed / ROUND / "client-2", tmp_path / "elsewhere")
    (summed / ROUND / "client-2").symlink_to(tmp_path / "elsewhere")
    found = steps(summed)["client-2"]
    assert found.condition == "damaged"
    assert "symbolic link" in found.reason
    assert str(found.command) == "fedcollm client-train --client 2 --round 1 --overwrite"
