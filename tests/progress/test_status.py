"""status: what is done, missing, damaged or stale, and the one command that this machine can give next."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, adapters, edit, rows, write_rows
from stages.progress.status import Status, status
from stages.workspace.paths import Workspace

STEPS = ["broadcast", "client-1", "client-2", "client-3", "aggregate", "llm", "slm"]


def conditions(folder: Path, round: int, *, verify: bool = False) -> dict[str, str]:
    return {step.name: step.condition for step in status(Workspace(folder), verify=verify).rounds[round - 1].steps}


def test_a_finished_workspace_is_done_and_a_fresh_one_missing(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert conditions(finished, 2) == dict.fromkeys(STEPS, "done")
    assert "next: fedcollm evaluate --round 2 --model slm" in fedcollm("status", "-w", finished).out
    assert fedcollm("evaluate", "--round", 2, "--model", "slm", "-w", finished).code == 0
    others = ["--model llm", *(f"--client {k}" for k in (1, 2, 3))]
    for done, which in enumerate(others, start=1):
        said = fedcollm("status", "-w", finished).out
        assert f"scores of round 2: {done} done; {5 - done} missing: {which.replace('--model ', '').strip('-')}" in said
        absent = ", ".join(["llm", "client 1", "client 2", "client 3"][done - 1 :])
        command = f"`fedcollm evaluate --round 2 {which} --workspace {finished}`{' and so on' if done < 4 else ''}"
        assert said.endswith(f"everything is done but scores: {absent}; {command}\n")
        assert fedcollm("evaluate", "--round", 2, *which.split(), "-w", finished).code == 0
    assert "scores of round 2: 5 done\neverything is done\n" in fedcollm("status", "-w", finished).out
    (finished / "tasks/colours.yaml").write_text((finished / "tasks/colours.yaml").read_text() + "\n")
    assert "scores of round 2: 5 missing: slm" in fedcollm("status", "-w", finished).out
    shutil.rmtree(finished / "exchange")
    shutil.rmtree(finished / "private/server/round-0001")
    assert conditions(finished, 1) == dict.fromkeys(STEPS, "missing")


def test_a_damaged_step_says_why_and_how_to_make_it_again(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    weights = finished / "exchange/round-0001/client-2/adapter_model.safetensors"
    size = weights.stat().st_size
    content = weights.read_bytes()
    weights.write_bytes(content + b"x")
    said = fedcollm("status", "-w", finished).out
    assert "clients 1 and 3 done; client 2 damaged" in said
    assert f"client-2   damaged  (adapter_model.safetensors has {size + 1} bytes, its manifest says {size})" in said
    assert "next: fedcollm client-train --client 2 --round 1 --overwrite" in said
    weights.write_bytes(content[:99])
    said = fedcollm("status", "-w", finished).out
    assert (
        f"client-2   damaged  (adapter_model.safetensors has 99 bytes of {size}: still arriving, or cut short)" in said
    )
    assert "next: fedcollm client-train --client 2 --round 1 --overwrite" in said


def test_what_other_clients_send_is_missing_at_the_server_and_elsewhere_not_on_this_machine(
    summed: Path, fedcollm: Callable[..., Outcome]
) -> None:
    for k in (1, 3):
        shutil.rmtree(summed / f"private/client-{k}")
        for kind in ("client", "reveal"):
            shutil.rmtree(summed / f"exchange/round-0001/{kind}-{k}", ignore_errors=True)
    shutil.rmtree(summed / "private/server/round-0001", ignore_errors=True)
    for place, condition in (("server", "missing"), ("client-2", "not on this machine")):
        said = fedcollm("status", "-w", summed).out
        for kind in ("clients", "reveals"):
            assert re.search(rf"{kind} .*\bclients 1 and 3 {condition}", said), (place, said)
        shutil.rmtree(summed / "private/server", ignore_errors=True)


def test_what_was_made_from_something_since_replaced_is_stale(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    write_rows(finished / "private/client-2/train.jsonl", rows(7))
    assert fedcollm("client-train", "--client", 2, "--round", 1, "--overwrite", "-w", finished).code == 0
    assert conditions(finished, 1) == dict.fromkeys(STEPS, "done") | {"aggregate": "stale"}
    said = fedcollm("status", "-w", finished).out
    assert "aggregate  stale  (made from another client-2)" in said
    assert "next: fedcollm aggregate --round 1 --overwrite" in said


def test_a_changed_agreement_makes_everything_stale(finished: Path) -> None:
    edit(finished / "fedcollm.toml", "seed = 7", "seed = 8")
    found = status(Workspace(finished))
    assert {step.condition for round in found.rounds for step in round.steps} == {"stale"}
    assert str(found.next_command) == "fedcollm broadcast --round 1 --overwrite"


def test_verify_finds_a_flipped_bit_that_sizes_do_not_show(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    weights = finished / "private/server/round-0001/llm/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "damaged" not in fedcollm("status", "-w", finished).out
    said = fedcollm("status", "--verify", "-w", finished).out
    assert "llm        damaged  (adapter_model.safetensors is not the file its manifest names" in said
    assert "next: fedcollm co-distill --round 1 --overwrite" in said


def test_the_next_command_is_right_all_the_way_from_an_empty_workspace_to_the_end(
    workspace_folder: Path, fedcollm: Callable[..., Outcome], tmp_path: Path
) -> None:
    shutil.rmtree(workspace_folder / "private")
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\ntasks = ["colours"]\n')
    (workspace_folder / "machine.toml").write_text("simulation = true\n")
    folder = workspace_folder.rename(tmp_path / "a study")  # what is printed can be pasted, spaces and all
    given = []
    while "next: " in (said := fedcollm("status", "-w", folder).out):
        command = shlex.split(said[said.index("next: ") + len("next: ") :])
        assert command[0] == "fedcollm"
        outcome = fedcollm(*command[1:])
        assert outcome.code == 0, outcome.err
        assert "already done" not in outcome.err
        given.append(" ".join(command[1 : command.index("--workspace")]))
    assert said.splitlines()[-1].startswith("everything is done but scores")
    trains = ["client-train --client 1", "client-train --client 2", "client-train --client 3"]
    by_hand = [
        f"{command} --round {round}"
        for round in (1, 2)
        for command in ("broadcast", *trains, "aggregate", "co-distill")
    ]
    assert given == ["prepare", *by_hand, "evaluate --round 2 --model slm"]


def next_of(folder: Path) -> tuple[str, str]:
    found: Status = status(Workspace(folder))
    return str(found.next_command or ""), found.waiting_for


def test_a_client_is_told_its_own_next_command_or_what_it_waits_for(finished: Path, tmp_path: Path) -> None:
    client = tmp_path / "client"
    client.mkdir()
    shutil.copy(finished / "fedcollm.toml", client)
    shutil.copytree(finished / "private/client-2", client / "private/client-2")
    assert next_of(client) == ("", "the broadcast of round 1, in exchange/")
    for round in (1, 2):
        exchange = f"exchange/round-000{round}"
        shutil.copytree(finished / exchange / "broadcast", client / exchange / "broadcast")
        assert next_of(client) == (f"fedcollm client-train --client 2 --round {round}", "")
        shutil.copytree(finished / exchange / "client-2", client / exchange / "client-2")
        if round == 1:
            assert next_of(client) == ("", "the broadcast of round 2, in exchange/")
    assert next_of(client) == ("", "")


def test_a_server_without_clients_waits_for_their_updates(answered: Path) -> None:
    for client in (1, 2, 3):
        shutil.rmtree(answered / f"private/client-{client}")
    exchange = answered / "exchange/round-0001"
    for client in (1, 3):
        shutil.move(exchange / f"client-{client}", answered / f"client-{client}")
    assert next_of(answered) == ("", "the updates of clients 1 and 3, round 1 (exchange/round-0001/client-1, ...)")
    for client in (1, 3):
        shutil.move(answered / f"client-{client}", exchange / f"client-{client}")
    assert next_of(answered) == ("fedcollm aggregate --round 1", "")


def test_a_workspace_without_data_is_told_to_bring_some(workspace_folder: Path) -> None:
    shutil.rmtree(workspace_folder / "private")
    command, waiting_for = next_of(workspace_folder)
    assert command == ""
    assert "private/client-k/train.jsonl" in waiting_for
    assert "private/server/auxiliary.jsonl" in waiting_for


def test_json_says_the_same_for_machines(answered: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("status", "--json", "-w", answered)
    found = json.loads(outcome.out)
    assert outcome.err == ""
    first, second = found["rounds"]
    assert [step["condition"] for step in first["steps"]] == ["done"] * 4 + ["missing"] * 3
    assert [step["condition"] for step in second["steps"]] == ["missing"] * 7
    assert found["next_command"] == f"fedcollm aggregate --round 1 --workspace {answered}"


@pytest.mark.parametrize("words", [(), ("--verify",), ("--json",)])
def test_status_writes_nothing(words: tuple[str, ...], finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    before = adapters(finished), sorted(finished.rglob("*"))
    assert fedcollm("status", *words, "-w", finished).code == 0
    assert (adapters(finished), sorted(finished.rglob("*"))) == before


@pytest.fixture
def simulated(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> Path:
    """One round on rows that prepare dealt, scored."""
    shutil.rmtree(workspace_folder / "private")
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", '[data]\ntasks = ["colours"]\n\n[evaluation]')
    (workspace_folder / "machine.toml").write_text("simulation = true\n")
    for words in (["prepare"], ["run", "--no-scores"], ["evaluate", "--round", 1]):
        assert fedcollm(*words, "-w", workspace_folder).code == 0
    assert "everything is done" in fedcollm("status", "-w", workspace_folder).out
    return workspace_folder


def test_an_edited_setting_of_the_deal_makes_the_rows_stale_before_anybody_trains(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    shutil.rmtree(workspace_folder / "private")
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[evaluation]", '[data]\ntasks = ["colours"]\n\n[evaluation]')
    (workspace_folder / "machine.toml").write_text("simulation = true\n")
    assert fedcollm("prepare", "-w", workspace_folder).code == 0
    edit(toml, "steps = 6", "steps = 7")  # which deals nothing
    edit(toml, "[data]", '[data]\ntoo_long = "skip"')  # nor does this
    assert "stale" not in fedcollm("status", "-w", workspace_folder).out
    edit(toml, "[data]", "[data]\nunlabelled_share = 0.5")
    told = "prepare dealt the rows before fedcollm.toml was edited (data.unlabelled_share was not set, is 0.5)"
    said = " ".join(fedcollm("status", "-w", workspace_folder).out.split())
    assert f"stale: private/split.json: {told} (fedcollm prepare tells whether the rows change)" in said
    assert "next: fedcollm prepare" in said
    assert told in " ".join(fedcollm("run", "--no-scores", "--rounds", 1, "-w", workspace_folder).err.split())
    assert fedcollm("prepare", "--overwrite", "-w", workspace_folder).code == 0
    assert "split.json" not in fedcollm("status", "-w", workspace_folder).out


def test_an_edited_task_makes_rows_training_and_scores_stale(simulated: Path, fedcollm: Callable[..., Outcome]) -> None:
    edit(simulated / "tasks/colours.yaml", '"{{question}}"', '"big {{question}}"')
    said = fedcollm("status", "-w", simulated).out
    assert "clients 1 to 3 stale" in said
    assert "slm        stale  (trained on rows that prepare made before its tasks, or files, were edited)" in said
    assert "stale: private/split.json: prepare dealt the rows before its tasks, or files, were edited" in said
    assert (
        "stale: results/round-0001/slm.json: tasks/, or data that it names, was edited since (fedcollm evaluate" in said
    )
    assert "next: fedcollm prepare" in said
    assert "before its tasks, or files, were edited" in fedcollm("next", "--client", 2, "-w", simulated).err
    assert (
        "dealt the rows before its tasks, or files, were edited" in fedcollm("run", "--no-scores", "-w", simulated).err
    )
    refused = fedcollm("next", "-w", simulated)
    assert refused.code == 5
    assert "is not what prepare would write" in refused.err
    assert fedcollm("prepare", "--overwrite", "-w", simulated).code == 0
    found = status(Workspace(simulated))
    reasons = {step.name: step.reason for step in found.rounds[0].steps}
    assert reasons["client-2"] == "trained on other rows than private/client-2/train.jsonl has now"
    assert reasons["llm"] == "trained on other rows than private/server/auxiliary.jsonl has now"
    assert str(found.next_command) == "fedcollm client-train --client 1 --round 1 --overwrite"
    assert fedcollm("run", "--overwrite", "-w", simulated).code == 0
    found = status(Workspace(simulated))
    assert found.stale == []
    assert all(round.is_done for round in found.rounds)


def test_questions_that_were_edited_make_scores_stale_but_no_training(
    simulated: Path, fedcollm: Callable[..., Outcome]
) -> None:
    (simulated / "data/test.jsonl").write_text((simulated / "data/train.jsonl").read_text() * 2)
    assert str(status(Workspace(simulated)).next_command) == "fedcollm prepare"
    again = fedcollm("next", "-w", simulated)
    assert (again.code, "already done" in again.err) == (0, True)
    assert set(conditions(simulated, 1).values()) == {"done"}
    left = fedcollm("next", "-w", simulated)
    assert left.code == 3
    assert "the next step replaces what is there: fedcollm evaluate --round 1 --model slm --overwrite" in left.err
    assert fedcollm("evaluate", "--round", 1, "-w", simulated).code == 0
    assert "everything is done" in fedcollm("status", "-w", simulated).out


def test_files_that_rows_were_dealt_from_count_too_until_they_are_gone(bare_files: Path) -> None:
    source = bare_files / "data/all.jsonl"
    write_rows(source, rows(41))
    assert str(status(Workspace(bare_files)).next_command) == "fedcollm prepare"
    source.unlink()
    assert str(status(Workspace(bare_files)).next_command) == "fedcollm broadcast --round 1"


@pytest.fixture
def bare_files(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> Path:
    """Rows that prepare dealt from a JSONL file."""
    shutil.rmtree(workspace_folder / "private")
    write_rows(workspace_folder / "data/all.jsonl", rows(40))
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", '[data]\nfiles = ["data/all.jsonl"]\n\n[evaluation]')
    assert fedcollm("prepare", "-w", workspace_folder).code == 0
    assert str(status(Workspace(workspace_folder)).next_command) == "fedcollm broadcast --round 1"
    return workspace_folder


def test_rows_behind_a_link_to_nothing_are_missed_by_those_words(workspace_folder: Path) -> None:
    shutil.rmtree(workspace_folder / "private")
    place = workspace_folder / "private/client-2/train.jsonl"
    place.parent.mkdir(parents=True)
    place.symlink_to("/scratch/of/another/machine.jsonl")
    told = status(Workspace(workspace_folder), party="client-2").waiting_for
    assert "data of client-2: train.jsonl is a symbolic link to /scratch/of/another/machine.jsonl, which is not" in told
