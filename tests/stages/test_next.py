"""next: one step, of the party that is asked; on one machine all the way; never what a person must decide."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, adapters, edit, make_workspace, published, rows, write_rows
from federations import CLIENTS, agreement, with_keys
from stages.join import join
from stages.next import next as step
from stages.parts import roster
from stages.parts.errors import NotReady, Refused
from stages.parts.workspace import Workspace
from stages.run import run
from stages.status import status

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
        given.append(done.removeprefix("fedcollm "))


def test_on_one_machine_next_goes_from_an_empty_secure_workspace_to_the_end(tmp_path: Path, base_models: Path) -> None:
    folder = with_keys(make_workspace(tmp_path / "study", base_models), tmp_path / "own keys")
    toml = folder / "fedcollm.toml"
    toml.write_text(f'{agreement(rounds=1)}\n[data]\ntasks = ["colours"]\n')
    shutil.rmtree(folder / "private")
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
    assert step(workspace, party=party) == f"fedcollm {first} --round 1"


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
    with pytest.raises((NotReady, Refused)) as caught:
        step(Workspace(enrolled), party="client-2")
    assert caught.value.mend


def test_everything_done_is_no_error(summed: Path, fedcollm: Callable[..., Outcome]) -> None:
    run(Workspace(summed))
    outcome = fedcollm("next", "--json", "-w", summed)
    assert (outcome.code, outcome.out) == (0, '{\n  "command": ""\n}\n')
    assert fedcollm("next", "-w", summed).out == "nothing is left to do\n"
    for client in CLIENTS:
        assert fedcollm("next", "--client", client, "-w", summed).out == "nothing is left to do\n"
