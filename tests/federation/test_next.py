"""next: one step, of the party that is asked; on one machine all the way; never what a person must decide."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, adapters, edit, make_workspace, published, rows, write_rows
from federations import CLIENTS, agreement, with_keys
from stages.federation.next import next as step
from stages.federation.run import run
from stages.parties import roster
from stages.parties.join import join
from stages.progress.status import status
from stages.runtime.errors import NotReady, Refused
from stages.workspace.paths import Workspace

A_ROUND = [
    "broadcast --round {0}",
    *(f"client-train --client {k} --round {{0}}" for k in CLIENTS),
    "aggregate --round {0}",
    *(f"reveal --client {k} --round {{0}}" for k in CLIENTS),
    "aggregate --round {0}",
    "co-distill --round {0}",
]


def all_steps(folder: Path) -> list[str]:
    """What next does until nothing is left, with a person who joins."""
    workspace, given = Workspace(folder), []
    while True:
        try:
            done = step(workspace)
        except NotReady as problem:
            if "a person to compare the roster's fingerprint" not in problem.message:
                raise
            found = roster.fingerprint(workspace.federation.read_bytes())
            for client in CLIENTS:
                join(workspace, client=client, fingerprint=found)
            continue
        if not done:
            return given
        given.append(str(done).removeprefix("fedcollm "))


def test_on_one_machine_next_goes_from_an_empty_secure_workspace_to_the_end(tmp_path: Path, base_models: Path) -> None:
    folder = with_keys(make_workspace(tmp_path / "study", base_models), tmp_path / "own keys")
    toml = folder / "fedcollm.toml"
    toml.write_text(f'{agreement(rounds=1)}\n[data]\ntasks = ["colours"]\n')
    shutil.rmtree(folder / "private")
    machine = folder / "machine.toml"
    machine.write_text(f"simulation = true\n{machine.read_text() if machine.exists() else ''}")
    assert all_steps(folder) == [
        "prepare",
        *(f"keys --client {k}" for k in CLIENTS),
        "enroll",
        *(line.format(1) for line in A_ROUND),
        "evaluate --round 1 --model slm",
    ]
    assert all(round.is_done for round in status(Workspace(folder), verify=True).rounds)


def test_in_plain_mode_it_ends_where_run_ends(workspace_folder: Path, finished_once: Path) -> None:
    assert all_steps(workspace_folder)[-1] == "evaluate --round 2 --model slm"
    shutil.rmtree(workspace_folder / "results")
    assert adapters(workspace_folder) == adapters(finished_once)


@pytest.mark.parametrize(("party", "first"), [("client-2", "client-train --client 2"), ("server", "broadcast")])
def test_it_takes_the_step_of_the_party_that_is_asked(party: str, first: str, enrolled: Path) -> None:
    workspace = Workspace(enrolled)
    if party == "client-2":
        with pytest.raises(NotReady, match="waiting for the broadcast of round 1, in exchange/") as caught:
            step(workspace, party=party)
        assert caught.value.exit_code == 3
        step(workspace, party="server")
    assert str(step(workspace, party=party)) == f"fedcollm {first} --round 1"


def test_what_would_replace_something_is_left_to_a_person(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    write_rows(finished / "private/client-2/train.jsonl", rows(7))
    run_again = "client-train", "--client", 2, "--round", 1, "--overwrite"
    assert fedcollm(*run_again, "-w", finished).code == 0
    before = published(finished)
    outcome = fedcollm("next", "-w", finished)
    assert outcome.code == 3
    assert "the next step replaces what is there: fedcollm aggregate --round 1 --overwrite" in outcome.err
    assert "mend  look at `fedcollm status`, then give that command" in outcome.err
    assert published(finished) == before


def test_a_refusal_of_the_step_itself_is_told_as_it_is(enrolled: Path) -> None:
    workspace = Workspace(enrolled)
    step(workspace)
    edit(enrolled / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused) as caught:
        step(Workspace(enrolled), party="client-2")
    assert caught.value.mend


def test_everything_done_is_no_error(summed: Path, fedcollm: Callable[..., Outcome]) -> None:
    run(Workspace(summed))
    outcome = fedcollm("next", "--json", "-w", summed)
    assert (outcome.code, outcome.out) == (9, '{\n  "command": ""\n}\n')
    assert fedcollm("next", "-w", summed).out == "nothing is left to do\n"
    for client in CLIENTS:
        outcome = fedcollm("next", "--client", client, "-w", summed)
        assert (outcome.code, outcome.out) == (9, "nothing is left to do\n")


@pytest.mark.parametrize("setting", ["", "simulation = false\n", "simulation = true\n"])
def test_a_party_without_rows_never_makes_them_up(
    setting: str, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\ntasks = ["colours"]\n')
    (workspace_folder / "machine.toml").write_text(setting)
    step(Workspace(workspace_folder), party="server")
    shutil.rmtree(workspace_folder / "private")
    asked = ["--client 2", "--server"] if "true" in setting else ["--client 2", "--server", ""]
    for words in asked:
        outcome = fedcollm("next", *words.split(), "-w", workspace_folder)
        assert outcome.code == 3
        assert ("client-2/train.jsonl" if "2" in words else "server/auxiliary.jsonl") in outcome.err
    assert not (workspace_folder / "private").exists()
    for command in ("status", "plan"):
        assert ("fedcollm prepare" in fedcollm(command, "-w", workspace_folder).out) == ("true" in setting)
    assert fedcollm("prepare", "-w", workspace_folder).code == (0 if "true" in setting else 5)


def test_a_party_waits_for_its_own_rows_where_anothers_are(enrolled: Path) -> None:
    step(Workspace(enrolled), party="server")
    (enrolled / "private/client-2/train.jsonl").unlink()
    with pytest.raises(NotReady, match="waiting for data of client-2: JSONL rows of its own, in private/client-2/"):
        step(Workspace(enrolled), party="client-2")


def test_after_an_edit_of_the_agreement_the_edit_is_undone_first(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before = published(finished)
    edit(finished / "fedcollm.toml", "seed = 7", "seed = 8")
    outcome = fedcollm("next", "-w", finished)
    assert outcome.code == 5
    edited = "fedcollm.toml was edited after 14 steps had been made under it: federation.seed was 7, is 8 (cp private/"
    assert edited in outcome.err
    said = fedcollm("status", "-w", finished).out
    assert edited in said
    assert said.index("Undo the edit first") < said.index("next, only where all parties have agreed on the edit: ")
    assert published(finished) == before


@pytest.mark.parametrize("party", ["client-2", "server", None])
def test_who_enrolled_under_another_agreement_does_not_wait_for_a_round(party: str | None, enrolled: Path) -> None:
    edit(enrolled / "fedcollm.toml", "seed = 7", "seed = 8")
    with pytest.raises(Refused, match=r"fedcollm\.toml has changed since the parties enrolled"):
        step(Workspace(enrolled), party=party)


def test_a_score_of_another_adapter_is_missing(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert all_steps(workspace_folder)[-1] == "evaluate --round 2 --model slm"
    result = workspace_folder / "results/round-0002/slm.json"
    edit(result, '"adapter_sha256": "', '"adapter_sha256": "0')
    again = "fedcollm evaluate --round 2 --model slm --overwrite"
    assert str(status(Workspace(workspace_folder)).next_command) == again
    result.unlink()
    assert str(status(Workspace(workspace_folder)).next_command) == again.removesuffix(" --overwrite")
