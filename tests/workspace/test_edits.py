"""edits: an edit of the agreement is told key by key, old value and new, by every command that meets it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit
from stages.workspace import edits
from stages.workspace.paths import Workspace

EDITS = {
    "a number": ("r = 4", "r = 6", "slm.lora.r was 4, is 6; llm.lora.r was 4, is 6"),
    "a name": ('name = "tiny"', 'name = "other"', 'federation.name was "tiny", is "other"'),
    "what was not set": ("clients = 3", "clients = 3\nrounds = 2", ""),  # twice the key: no agreement at all
    "fewer clients": ("clients = 3", "clients = 2", "federation.clients was 3, is 2"),
    "a section": ("[llm]", "[aggregation]\nmin_clients = 2\n[llm]", "aggregation.min_clients was not set, is 2"),
    "a default spelt out": ("seed = 7", 'seed = 7\nmethod = "fedcollm"', "comments, spaces or order alone"),
    "a comment": ("[llm]", "# the server's\n[llm]", "comments, spaces or order alone"),
}
COMMANDS = (
    "broadcast --round 1",
    "client-train --client 3 --round 2",
    "aggregate --round 2",
    "co-distill --round 2",
    "evaluate --round 2 --model slm",
    "export --round 2 --model slm",
    "pack --client 1 --round 1",
    "verify",
    "next",
    "status",
    "audit",
)


@pytest.mark.parametrize("what", EDITS)
def test_every_command_names_what_was_edited_and_how_to_undo_it(
    what: str, finished: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    agreement = finished / "fedcollm.toml"
    before, (old, new, said) = agreement.read_bytes(), EDITS[what]
    agreement.write_text(agreement.read_text().replace(old, new))
    for command in COMMANDS:
        outcome = fedcollm(*command.split(), "-w", finished)
        assert "Traceback" not in outcome.err
        text = outcome.out + outcome.err
        assert said in text, command
        assert outcome.code or command == "status"
    if said:
        undo = text[text.index("(cp ") + 1 : text.index(" undoes it")]
        subprocess.run(shlex.split(undo), cwd=finished, check=True)
        assert agreement.read_bytes() == before
        assert fedcollm("verify", "-w", finished).code == 0


def test_the_roster_too_names_what_was_edited_since(enrolled: Path, fedcollm: Callable[..., Outcome]) -> None:
    edit(enrolled / "fedcollm.toml", "seed = 7", "seed = 8")
    outcome = fedcollm("broadcast", "--round", 1, "-w", enrolled)
    assert outcome.code == 5
    assert "federation.seed was 7, is 8" in outcome.err
    assert "mend  undo the edit" in outcome.err


@pytest.mark.parametrize("how", ["gone", "another's bytes", "no agreement", "a folder"])
def test_without_a_sound_copy_no_key_is_named(how: str, finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    workspace = Workspace(finished)
    sha256, copy = workspace.agreement_sha256, workspace.agreed(workspace.agreement_sha256)
    edit(finished / "fedcollm.toml", "seed = 7", "seed = 8")
    assert edits.since(Workspace(finished), sha256)
    copy.unlink() if how != "another's bytes" else edit(copy, "seed = 7", "seed = 9")
    if how == "no agreement":
        copy.write_text("x")
    elif how == "a folder":
        copy.mkdir()
    assert edits.since(Workspace(finished), sha256) == ""
    assert edits.since_last(Workspace(finished)) == ""
    outcome = fedcollm("next", "-w", finished)
    assert (outcome.code, sha256 in outcome.err) == (5, True)
    shutil.rmtree(finished / "private/agreements")
    assert fedcollm("status", "-w", finished).code == 0


def test_many_edits_and_long_values_are_cut(finished: Path) -> None:
    agreement = finished / "fedcollm.toml"
    sha256 = Workspace(finished).agreement_sha256
    text = agreement.read_text().replace("batch_size = 4", "batch_size = 5").replace("= 1e-2", "= 2e-2")
    text = text.replace("r = 4\nalpha = 8", "r = 5\nalpha = 9").replace("seed = 7", "seed = 8")
    agreement.write_text(text.replace('"models/slm"', f'"{"m" * 500}"'))
    said = edits.since(Workspace(finished), sha256)
    assert "; and 3 more (cp " in said  # of seed, model, two r, two alpha, two batch sizes, three rates: 11
    assert "m" * 100 not in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[clients.2]\nrank = 2\n", "", "clients.2 was {"),
        ("", "[clients.2]\nrank = 2\n", "clients.2 was not set, is {"),
        ("[clients.2]\nrank = 2\n", "[clients.2]\nrank = 3\n", "clients.2.rank was 2, is 3"),
    ],
)
def test_a_clients_own_table_that_came_or_went_is_told(old: str, new: str, said: str, workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    text = toml.read_text() + '\n[aggregation]\ncombine = "product"\n'
    toml.write_text(text + old)
    before = Workspace(workspace_folder)
    edits.keep(before)
    toml.write_text(text + new)
    assert said in edits.since(Workspace(workspace_folder), before.agreement_sha256)
