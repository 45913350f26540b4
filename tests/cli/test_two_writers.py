"""Two processes that do one stage at once, as when a requeued job's first copy still lives: nothing is damaged."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from builders import Outcome, adapters, drafts, published
from federations import agreement, secrets_of, with_keys
from processes import start
from stages.accounting.ledger import charges, read_ledger
from stages.aggregate import aggregate
from stages.artefacts.subjects import theta_of
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.files import locks
from stages.parties.party import Party
from stages.reveal import reveal
from stages.runtime.errors import NotReady
from stages.runtime.events import ignore
from stages.secagg.channel import ToServer
from stages.workspace.paths import Workspace

SERVER, CLIENT, EXCHANGE = "private/server/round-0001", "private/client-1/round-0001", "exchange/round-0001"
WAITS, DONE, SECOND = "waiting for it (process", "already done", "another process published it first"
Locks = Literal["real", "none", "of each machine"]


@dataclass(frozen=True)
class Stage:
    """A command, what it makes, its log last, and its lock."""

    words: str
    made: tuple[str, ...]
    lock: str


STAGES = {
    "broadcast": Stage("broadcast --round 1", (f"{EXCHANGE}/broadcast",), f"{SERVER}/broadcast.lock"),
    "client-train": Stage(
        "client-train --client 1 --round 1",
        (f"{EXCHANGE}/client-1", f"{CLIENT}/client-train.jsonl"),
        f"{CLIENT}/client-train.lock",
    ),
    "aggregate": Stage(
        "aggregate --round 1", (f"{SERVER}/aggregate", f"{SERVER}/aggregate.jsonl"), f"{SERVER}/aggregate.lock"
    ),
    "co-distill": Stage(
        "co-distill --round 1",
        (f"{SERVER}/slm", f"{SERVER}/llm", f"{SERVER}/co-distill.jsonl"),
        f"{SERVER}/co-distill.lock",
    ),
    "evaluate": Stage(
        "evaluate --round 1 --client 1", ("results/round-0001/client-1.json",), "results/round-0001/.client-1.lock"
    ),
}
AFTER_ONE = 4
"""The fsync, counted from 1, before which a first checkpoint is marked as whole."""
TRAINING = {"client-train", "co-distill"}


@pytest.fixture
def ready(finished: Path) -> Path:
    """A finished workspace that writes a checkpoint after each step."""
    (finished / "machine.toml").write_text("checkpoint_steps = 1\n")
    return finished


def undo(folder: Path, stage: Stage) -> None:
    """Take away what a stage has made, and its lock."""
    for name in (*stage.made, stage.lock):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("fate", [signal.SIGCONT, signal.SIGKILL])
@pytest.mark.parametrize("name", STAGES)
def test_a_second_process_waits_for_the_first_even_if_that_is_stopped_or_killed(
    name: str, fate: signal.Signals, ready: Path
) -> None:
    stage, before = STAGES[name], adapters(ready)
    undo(ready, stage)
    first = start(*stage.words.split(), "-w", ready, stops_at=AFTER_ONE if name in TRAINING else 1)
    first.wait_until_stopped()
    second = start(*stage.words.split(), "-w", ready)
    second.wait_until_said(WAITS)
    code, said = first.stop(fate)
    assert code == (-fate if fate == signal.SIGKILL else 0), said
    code, said = second.end()
    assert code == 0, said
    assert said.count(WAITS) == 1
    assert (DONE in said) == (fate == signal.SIGCONT)
    assert before.items() <= adapters(ready).items()
    assert all((ready / made).exists() for made in stage.made)
    if fate == signal.SIGCONT:
        assert drafts(ready) == []


@pytest.mark.parametrize("locks", ["none", "of each machine"])
@pytest.mark.parametrize(
    ("name", "stops_at"), [*((name, 1) for name in STAGES), *((name, AFTER_ONE) for name in sorted(TRAINING))]
)
def test_without_locks_both_work_and_the_one_that_is_second_says_so(
    name: str, stops_at: int, locks: Locks, ready: Path
) -> None:
    stage, before = STAGES[name], adapters(ready)
    undo(ready, stage)
    first = start(*stage.words.split(), "-w", ready, locks=locks, stops_at=stops_at)
    first.wait_until_stopped()
    code, said = start(*stage.words.split(), "-w", ready, locks=locks).end()
    assert code == 0, said
    made = {name: (ready / name).stat().st_mtime_ns for name in stage.made}
    code, said = first.stop(signal.SIGCONT)
    assert code == 0, said
    assert SECOND in said
    assert made == {name: (ready / name).stat().st_mtime_ns for name in stage.made}
    assert before.items() <= adapters(ready).items()
    assert drafts(ready) == []


@pytest.mark.parametrize("locks", ["real", "none"])
@pytest.mark.parametrize("name", STAGES)
def test_many_at_once_make_one(name: str, locks: Locks, ready: Path) -> None:
    stage, before = STAGES[name], adapters(ready)
    undo(ready, stage)
    commands = [start(*stage.words.split(), "-w", ready, locks=locks) for _ in range(3)]
    ends = [command.end() for command in commands]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert sum(DONE not in said and SECOND not in said for _, said in ends) == 1
    assert before.items() <= adapters(ready).items()
    assert drafts(ready) == []


def test_the_second_of_two_that_overwrite_does_not_do_it_once_more(ready: Path) -> None:
    stage = STAGES["client-train"]
    (ready / stage.lock).unlink()
    first = start(*stage.words.split(), "--overwrite", "-w", ready, stops_at=AFTER_ONE)
    first.wait_until_stopped()
    second = start(*stage.words.split(), "--overwrite", "-w", ready)
    second.wait_until_said(WAITS)
    assert first.stop(signal.SIGCONT)[0] == 0
    made = (ready / stage.made[0]).stat().st_mtime_ns
    code, said = second.end()
    assert code == 0, said
    assert DONE in said
    assert (ready / stage.made[0]).stat().st_mtime_ns == made


def test_what_another_process_made_of_other_inputs_is_refused_as_ever(ready: Path) -> None:
    stage = STAGES["client-train"]
    undo(ready, stage)
    first = start(*stage.words.split(), "-w", ready, locks="none", stops_at=AFTER_ONE)
    first.wait_until_stopped()
    data = ready / "private/client-1/train.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    code, said = start(*stage.words.split(), "-w", ready, locks="none").end()
    assert code == 0, said
    made = adapters(ready)
    code, said = first.stop(signal.SIGCONT)
    assert code == 5, said
    assert "changed since: the training data" in said
    assert adapters(ready) == made


def test_an_update_that_arrives_while_another_process_averages_changes_nothing_for_this_one(
    workspace_folder: Path,
) -> None:
    toml, workspace = workspace_folder / "fedcollm.toml", Workspace(workspace_folder)
    toml.write_text(f"{toml.read_text()}\n[aggregation]\nmin_clients = 2\n")
    broadcast(workspace, round=1)
    for client in (1, 2):
        client_train(workspace, client=client, round=1)
    words = ("aggregate", "--round", 1, "-w", workspace_folder)
    first = start(*words, locks="none", stops_at=1)
    first.wait_until_stopped()
    assert start(*words, locks="none").end()[0] == 0
    client_train(workspace, client=3, round=1)
    code, said = first.stop(signal.SIGCONT)
    assert code == 0, said
    assert (SECOND in said, said.count("absent: client 3")) == (True, 1), said


def test_a_folder_that_a_killed_process_had_moved_away_is_back_before_anything_is_made(
    ready: Path, fedcollm: Callable[..., Outcome]
) -> None:
    stage, before = STAGES["client-train"], adapters(ready)
    update = ready / stage.made[0]
    update.rename(update.with_name(".client-1.4321-00c0ffee.replaced"))
    outcome = fedcollm(*stage.words.split(), "-w", ready)
    assert outcome.code == 0, outcome.err
    assert DONE in outcome.err
    assert adapters(ready) == before
    assert drafts(ready) == []


def test_many_that_run_a_whole_federation_at_once_make_one(workspace_folder: Path, finished_once: Path) -> None:
    commands = [start("run", "--no-scores", "-w", workspace_folder) for _ in range(3)]
    ends = [command.end() for command in commands]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    expected = {name: digest for name, digest in adapters(finished_once).items() if "/round-" in name}
    assert expected.items() <= adapters(workspace_folder).items()
    assert drafts(workspace_folder) == []


def test_many_that_pack_the_same_make_the_same(ready: Path, tmp_path: Path) -> None:
    words = ("pack", "--client", 1, "--round", 1, "--output", tmp_path / "one.fedcollm", "-w", ready)
    ends = [command.end() for command in [start(*words) for _ in range(3)]]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert [path.name for path in tmp_path.glob("*.fedcollm")] == ["one.fedcollm"]
    assert drafts(tmp_path) == []


def test_one_that_waits_can_be_interrupted_and_next_does_not_wait(ready: Path) -> None:
    stage = STAGES["co-distill"]
    undo(ready, stage)
    first = start(*stage.words.split(), "-w", ready, stops_at=1)
    first.wait_until_stopped()
    second = start(*stage.words.split(), "-w", ready)
    second.wait_until_said(WAITS)
    code, said = second.stop(signal.SIGTERM)
    assert code == 75, said
    third = start("next", "--server", "-w", ready)
    third.wait_until_said(WAITS)  # for the stage; and for this one, nobody
    code, said = start("next", "--server", "-w", ready).end()
    assert code == 7, said
    assert "another process is doing this (process" in said
    assert first.stop(signal.SIGCONT)[0] == third.end()[0] == 0


# --- what is done once


@pytest.fixture
def opened(enrolled: Path) -> Path:
    """A round of secure aggregation that is open, in which clients 1 and 3 have sent their updates."""
    with (enrolled / "machine.toml").open("a") as file:
        file.write("checkpoint_steps = 1\n")
    broadcast(Workspace(enrolled), round=1)
    for client in (1, 3):
        client_train(Workspace(enrolled), client=client, round=1)
    return enrolled


def test_secure_stages_at_once_send_one_masked_update_one_close_and_one_reveal(opened: Path) -> None:
    workspace = Workspace(opened)

    def at_once(*words: object, codes: tuple[int, ...] = (0,)) -> list[str]:
        ends = [command.end() for command in [start(*words, "-w", opened) for _ in range(3)]]
        assert all(code in codes for code, _ in ends), ends
        return [said for _, said in ends]

    said = at_once("client-train", "--client", 2, "--round", 1)
    assert sum("already sent" in one for one in said) == 2
    at_once("aggregate", "--round", 1, codes=(3,))
    assert len(list(workspace.exchange.rglob("close"))) == 1
    at_once("reveal", "--client", 2, "--round", 1)
    first = published(opened)
    at_once("reveal", "--client", 2, "--round", 1)
    assert published(opened) == first
    for client in (1, 3):
        reveal(workspace, client=client, round=1)
    at_once("aggregate", "--round", 1)
    aggregate(workspace, round=1)
    assert drafts(opened) == drafts(secrets_of(opened)) == []


def test_an_adapter_is_not_replaced_whose_update_another_process_sends_meanwhile(
    opened: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, party = Workspace(opened), Party.client(Workspace(opened), 2)
    with monkeypatch.context() as patch:
        patch.setattr(ToServer, "send", lambda own, theta, trained, again: trained)
        trained = client_train(workspace, client=2, round=1)
    with locks.held(workspace.log("client-train", 1, 2).with_suffix(".lock")):
        second = start("client-train", "--client", 2, "--round", 1, "--overwrite", "-w", opened)
        second.wait_until_said(WAITS)
        ToServer(party, ignore).send(theta_of(party, 1), trained, False)
    code, said = second.end()
    assert (code, "which cannot be replaced" in said) == (5, True), said


def test_two_that_open_a_round_anew_make_one_attempt(opened: Path) -> None:
    ends = [c.end() for c in [start("broadcast", "--round", 1, "--overwrite", "-w", opened) for _ in range(2)]]
    assert [code for code, _ in ends] == [0, 0], ends
    waited = [said for _, said in ends if "waiting for it" in said]
    if waited:  # else one had ended before the other began
        assert DONE in waited[0]


@pytest.mark.parametrize(
    "words", ["client-train --client 2 --round 1", "broadcast --round 1 --overwrite", "aggregate --round 1"]
)
def test_secure_stages_end_where_there_are_no_locks_and_say_what_to_do(words: str, opened: Path) -> None:
    before = published(opened)
    code, said = start(*words.split(), "-w", opened, locks="none").end()
    assert code == 8, said
    assert "no locks" in said
    assert "secrets in machine.toml" in said
    assert published(opened) == before


def test_a_reveal_is_not_told_where_there_are_no_locks(opened: Path) -> None:
    client_train(Workspace(opened), client=2, round=1)
    with pytest.raises(NotReady):
        aggregate(Workspace(opened), round=1)
    code, said = start("reveal", "--client", 2, "--round", 1, "-w", opened, locks="none").end()
    assert (code, "no locks" in said) == (8, True), said
    assert not Workspace(opened).reveal(1, 2).exists()


def test_many_that_run_secure_rounds_at_once_enrol_once_and_end_alike(workspace_folder: Path, tmp_path: Path) -> None:
    folder = with_keys(workspace_folder, tmp_path / "keys")
    (folder / "fedcollm.toml").write_text(agreement(rounds=1))
    ends = [command.end() for command in [start("run", "--no-scores", "-w", folder) for _ in range(3)]]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert len(list((tmp_path / "keys").glob("*/*"))) == 4  # one folder for each party
    assert start("verify", "-w", folder).end()[0] == 0
    assert drafts(tmp_path) == []


# --- what is spent


@pytest.fixture
def counted(workspace_folder: Path) -> Path:
    """A round of differential privacy that is open."""
    (workspace_folder / "machine.toml").write_text("checkpoint_steps = 1\n")
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(f"{toml.read_text()}\n[privacy]\ndelta = 1e-5\nnoise_multiplier = 1.0\n")
    broadcast(Workspace(workspace_folder), round=1)
    return workspace_folder


TRAIN = ("client-train", "--client", 1, "--round", 1)


def spent(folder: Path) -> list[str]:
    return [line.entry.kind for line in read_ledger(Workspace(folder).privacy_ledger(1))]


def test_of_many_that_train_privately_one_spends(counted: Path) -> None:
    ends = [command.end() for command in [start(*TRAIN, "-w", counted) for _ in range(3)]]
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert spent(counted) == ["reserved", "finished"]


def test_without_locks_nothing_is_spent_and_nothing_published(counted: Path) -> None:
    code, said = start(*TRAIN, "-w", counted, locks="none").end()
    assert (code, "move the workspace to a file system with locks" in said) == (8, True), said
    assert spent(counted) == []
    assert not (counted / EXCHANGE / "client-1").exists()


@pytest.mark.parametrize("stops_at", [1, 3, 5, 9])
def test_with_locks_that_others_do_not_see_one_adapter_is_out_and_paid_for(counted: Path, stops_at: int) -> None:
    first = start(*TRAIN, "-w", counted, locks="of each machine", stops_at=stops_at)
    first.wait_until_stopped()
    code, said = start(*TRAIN, "-w", counted, locks="of each machine").end()
    assert code == 0, said
    out, paid = adapters(counted), charges(read_ledger(Workspace(counted).privacy_ledger(1)))
    code, said = first.stop(signal.SIGCONT)
    assert (code, SECOND in said) == (0, True), said
    assert adapters(counted) == out
    assert len(charges(read_ledger(Workspace(counted).privacy_ledger(1)))) >= len(paid) >= 1
