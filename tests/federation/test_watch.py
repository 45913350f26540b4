"""watch and next --sync: parties on machines of their own reach the end by one remote, and end where `run` does."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import AGREEMENT, Outcome, make_workspace
from federations import Machines, agreement
from stages.federation.run import run
from stages.federation.watch import LONGEST, synced, watch
from stages.parties import roster
from stages.runtime.errors import NotReady
from stages.runtime.events import Event
from stages.workspace.names import ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace

CLIENTS = (1, 2, 3)


def machines(top: Path, base_models: Path, fedcollm: Callable[..., Outcome], text: str) -> Machines:
    found = Machines.set_up(top, base_models, fedcollm, text, CLIENTS)
    for folder in found.folders.values():
        with (folder / "machine.toml").open("a") as file:
            file.write(f'\n[exchange]\nremote = "file://{top}/share"\n')
    return found


def take_turns(here: Machines, report: Callable[[Event], None]) -> list[str]:
    """The server watches; whenever it waits each client takes what steps it can. Returns the server's commands."""
    pauses: list[float] = []

    def clients(seconds: float) -> None:
        pauses.append(seconds)
        assert len(pauses) < 40, "no end in sight"
        for k in CLIENTS:
            workspace = Workspace(here.folders[f"client-{k}"])
            try:
                while synced(workspace, client=k):
                    workspace = Workspace(workspace.root)
            except NotReady as problem:
                if "join" in problem.message:
                    workspace.root.joinpath("joined").touch()
                    print_of = roster.fingerprint((workspace.exchange / "federation.json").read_bytes())
                    here.client(k, "join", "--fingerprint", print_of)

    server = Workspace(here.folders["server"])
    return [str(one) for one in watch(server, client=None, every_s=1.0, pause=clients, report=report)]


def test_all_reach_the_end_and_have_what_one_machine_would_make(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    here, said = machines(tmp_path, base_models, fedcollm, AGREEMENT), list[str]()
    given = take_turns(here, lambda event: said.append(event.text) if event.kind == "note" else None)
    assert given[:3] == [
        "fedcollm broadcast --round 1",
        "fedcollm aggregate --round 1",
        "fedcollm co-distill --round 1",
    ]
    whole = Workspace(make_workspace(tmp_path / "simulation", base_models))
    run(whole, scores=False)
    server = Workspace(here.folders["server"])
    for place in (whole.slm(2), whole.llm(2), whole.broadcast(2)):
        made = server.root / place.relative_to(whole.root) / ADAPTER_WEIGHTS
        assert made.read_bytes() == (place / ADAPTER_WEIGHTS).read_bytes()
    assert "sent round-0001/broadcast" in said
    assert "fetched round-0002/client-3" in said
    waits = [text for text in said if text.startswith("since ")]
    assert waits
    assert len(waits) == len(set(waits)), "what it waits for is told once"
    assert fedcollm("next", "--client", 2, "--sync", "-w", here.folders["client-2"]).code == 9


@pytest.mark.parametrize("mode", ["secure", "encrypted"])
def test_hidden_rounds_go_back_and_forth_by_the_remote(
    mode: str, tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    if mode == "encrypted":
        pytest.importorskip("tenseal")
    text = agreement(clients=3, rounds=1).replace('mode = "secure"', f'mode = "{mode}"')
    assert f'mode = "{mode}"' in text
    here = machines(tmp_path, base_models, fedcollm, text)
    given = take_turns(here, lambda event: None)
    assert given[0] == "fedcollm enroll"
    assert "fedcollm co-distill --round 1" in given
    assert Workspace(here.folders["server"]).slm(1).exists()


def test_what_was_made_before_is_sent_though_the_party_has_to_wait(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    here = machines(tmp_path, base_models, fedcollm, AGREEMENT)
    here.give("server", "broadcast", "--round", 1)
    outcome = here.give("server", "next", "--server", "--sync", code=3)
    assert "waiting for" in outcome.err
    assert (tmp_path / "share/round-0001/broadcast/manifest.json").exists()


def test_pauses_grow_where_nothing_changes_and_a_failing_remote_is_asked_again(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, paused, said = machines(tmp_path, base_models, fedcollm, AGREEMENT), list[float](), list[str]()

    class Enough(Exception):
        pass

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 3:
            monkeypatch.setattr("stages.exchange.remote.Remote.size", broken)
        if len(paused) == 6:
            raise Enough

    def broken(*_: object) -> int:
        raise NotReady("the remote failed: TimeoutError", where="share", mend="look at the network")

    with pytest.raises(Enough):
        watch(
            Workspace(here.folders["client-1"]),
            client=1,
            every_s=2.0,
            pause=pause,
            report=lambda event: said.append(event.text),
        )
    assert paused == [2.0, 4.0, 8.0, 2.0 * LONGEST, 2.0 * LONGEST, 2.0 * LONGEST]
    assert len([text for text in said if "the remote failed: TimeoutError" in text]) == 1


def test_without_a_remote_it_takes_what_steps_it_can(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = make_workspace(tmp_path / "study", base_models)
    (folder / "fedcollm.toml").write_text(
        AGREEMENT.replace("clients = 3", "clients = 1").replace("rounds = 2", "rounds = 1")
    )
    for k in (2, 3):
        shutil.rmtree(folder / f"private/client-{k}")
    workspace = Workspace(folder)

    def other(seconds: float) -> None:
        assert fedcollm("next", "--client", 1, "-w", folder).code == 0

    given = [str(one) for one in watch(workspace, client=None, pause=other)]
    assert given[:3] == [
        "fedcollm broadcast --round 1",
        "fedcollm aggregate --round 1",
        "fedcollm co-distill --round 1",
    ]
    assert "no remote is named" in fedcollm("next", "--client", 1, "--sync", "-w", folder).err


def test_a_step_that_fails_ends_it_with_that_steps_code(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    here = machines(tmp_path, base_models, fedcollm, AGREEMENT)
    here.give("server", "next", "--server", "--sync")
    rows = here.folders["client-2"] / "private/client-2/train.jsonl"
    rows.write_text("no row\n")
    outcome = here.client(2, "watch", "--every", 0.1, code=4)
    assert "train.jsonl" in outcome.err


def test_it_ends_when_it_is_told_to_and_goes_on_when_it_is_begun_again(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    here = machines(tmp_path, base_models, fedcollm, AGREEMENT.replace("rounds = 2", "rounds = 1"))
    words = [sys.executable, "-m", "fedcollm_cli", "watch", "--client", "1", "--every", "0.2"]
    process = subprocess.Popen(words, cwd=here.folders["client-1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "since" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    process.stderr.close()
    here.give("server", "next", "--server", "--sync")
    outcome = here.client(1, "watch", "--every", 0.1, "--json")
    assert "fedcollm client-train --client 1 --round 1" in json.loads(outcome.out)["commands"]
    assert (tmp_path / "share/round-0001/client-1/manifest.json").exists()
