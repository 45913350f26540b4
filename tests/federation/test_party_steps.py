"""What a party's README tells it to do is what `status` and `next` will ask of it, in every mode and method."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import AGREEMENT, rows, write_rows
from stages.federation.party_steps import before_rounds, in_round
from stages.parties.names import client as named
from stages.parties.names import number_of
from stages.progress.rounds import Reader
from stages.workspace.agreement import Agreement
from stages.workspace.paths import Workspace
from stages.workspace.settings import parse

OWN = "".join(f'\n[clients.{k}.slm]\nmodel = "models/slm-{k}"\n' for k in (1, 2, 3))


def of(method: str = "fedcollm", more: str = "") -> str:
    return AGREEMENT.replace("seed = 7", f'seed = 7\nmethod = "{method}"') + more


HIDDEN = '\n[aggregation]\nmode = "{}"\nmax_update_value = 8.0\n'
AGREEMENTS = {
    "plain": of(),
    "fedavg": of("fedavg"),
    "standalone": of("standalone"),
    "secure": of(more=HIDDEN.format("secure")),
    "encrypted": of(more=HIDDEN.format("encrypted") + "opener = 2\n"),
    "fedmkt": of("fedmkt"),
    "fedmkt, own models": of("fedmkt", OWN),
    "fedmkt, averaged": of("fedmkt", "\n[aggregation]\naverage = true\n"),
    "llm2slm": of("llm2slm"),
    "standalone-public": of("standalone-public"),
}


@pytest.mark.parametrize("party", [1, 2, None])
@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("kind", AGREEMENTS)
def test_the_steps_that_are_told_are_those_that_status_knows(
    kind: str, round: int, party: int | None, tmp_path: Path
) -> None:
    (tmp_path / "fedcollm.toml").write_text(AGREEMENTS[kind])
    for k in (1, 2, 3):
        write_rows(tmp_path / "private" / named(k) / "train.jsonl", rows(2))
    write_rows(tmp_path / "private/server/auxiliary.jsonl", rows(2))
    workspace = Workspace(tmp_path)
    reader = Reader(workspace, verify=False)
    known = [reader.round(number) for number in range(1, round + 1)][-1]
    asked = [step for step in known.steps if (step.party == "server") == (party is None)]
    asked = [step for step in asked if party is None or number_of(step.party) == party]
    wanted = list(dict.fromkeys(str(step.command) for step in asked))
    told = [*(before_rounds(workspace.agreement, party) if round == 1 else [])]
    told += in_round(workspace.agreement, party, round)
    around = ("pack", "unpack", "prefetch", "check-rows", "keys", "join", "enroll")
    commands = list(dict.fromkeys(str(act.command) for act in told if act.command.verb not in around))
    assert commands == wanted


@pytest.mark.parametrize(("kind", "party", "reveals"), [("secure", 1, True), ("encrypted", 1, False)])
def test_who_reveals_packs_twice(kind: str, party: int, reveals: bool) -> None:
    agreement = parse(Agreement, AGREEMENTS[kind].encode(), Path("fedcollm.toml"))
    lines = [str(act.command) for act in in_round(agreement, party, 1)]
    assert lines.count("fedcollm pack --client 1 --round 1") == (2 if reveals else 1)
    assert ("fedcollm reveal --client 1 --round 1" in lines) == reveals


def test_keys_are_made_and_joined_before_rounds_whose_updates_are_hidden() -> None:
    agreement = parse(Agreement, AGREEMENTS["secure"].encode(), Path("fedcollm.toml"))
    verbs = [act.command.verb for act in before_rounds(agreement, 2)]
    assert verbs == ["prefetch", "check-rows", "keys", "pack", "unpack", "join", "join"]
    assert [act.command.verb for act in before_rounds(agreement, None)][-2:] == ["enroll", "pack"]


def test_a_server_does_not_fetch_models_of_clients_own() -> None:
    for kind, line in (("fedmkt", "fedcollm prefetch"), ("fedmkt, own models", "fedcollm prefetch --model llm")):
        agreement = parse(Agreement, AGREEMENTS[kind].encode(), Path("fedcollm.toml"))
        assert str(before_rounds(agreement, None)[0].command) == line
