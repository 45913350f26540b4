"""status of FedMKT: what is stale after what, what is on its way, who is absent or late, and what is not as it was."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, rows, sign, write_rows
from stages.artefacts.reading import read_manifest
from stages.client_train import client_train
from stages.federation.next import next as step
from stages.federation.run import run
from stages.files.reading import sha256
from stages.progress.status import status
from stages.runtime.errors import NotReady
from stages.runtime.events import Event
from stages.workspace.paths import Workspace

ROUND = "exchange/round-0001"


def conditions(folder: Path, round: int = 1) -> dict[str, str]:
    """Of the steps of a round that are not done."""
    steps = status(Workspace(folder)).rounds[round - 1].steps
    return {
        one.name: one.condition + (f", {one.reason}" if one.reason else "") for one in steps if one.condition != "done"
    }


def give(fedcollm: Callable[..., Outcome], folder: Path) -> str:
    """The next command, pasted into a shell. Returns it."""
    command = str(status(Workspace(folder)).next_command)
    outcome = fedcollm(*shlex.split(command)[1:], "-w", folder)
    assert outcome.code == 0, outcome.err
    return command.removeprefix("fedcollm ")


def test_a_client_trained_anew_makes_what_follows_stale_one_after_the_other(
    unlike: Path, fedcollm: Callable[..., Outcome]
) -> None:
    write_rows(unlike / "private/client-2/train.jsonl", rows(9, start=40))
    client_train(Workspace(unlike), client=2, round=1, overwrite=True)
    assert conditions(unlike) == {
        "knowledge-2": "stale, made from another trained",
        "slm-2": "stale, made from another trained",
    }
    with pytest.raises(NotReady, match="the next step replaces what is there: fedcollm share-knowledge --client 2"):
        step(Workspace(unlike))
    assert give(fedcollm, unlike) == "share-knowledge --client 2 --round 1 --overwrite"
    assert conditions(unlike) == {
        "llm": "stale, made from another client-2",
        "slm-2": "stale, made from another trained, client-2",
    }
    assert give(fedcollm, unlike) == "co-distill --round 1 --overwrite"
    assert conditions(unlike)["knowledge-server"] == "stale, made from another llm"
    assert conditions(unlike, 2)["llm"] == "stale, made from another llm"
    assert give(fedcollm, unlike) == "share-knowledge --server --round 1 --overwrite"
    assert set(conditions(unlike)) == {"slm-1", "slm-2", "slm-3"}
    assert [give(fedcollm, unlike) for _ in range(3)] == [
        f"client-distill --client {k} --round 1 --overwrite" for k in (1, 2, 3)
    ]
    assert conditions(unlike) == {}
    assert conditions(unlike, 2)["trained-1"] == "stale, made from another slm"
    told = json.loads(fedcollm("status", "--json", "-w", unlike).out)
    assert told["next_command"] == f"fedcollm client-train --client 1 --round 2 --overwrite --workspace {unlike}"


def as_server(folder: Path) -> Path:
    """What the server of a finished federation has, before its round 1 had a co-distill."""
    for k in (1, 2, 3):
        shutil.rmtree(folder / f"private/client-{k}")
    for made in [*folder.glob("private/server/round-*"), folder / ROUND / "server", folder / "exchange/round-0002"]:
        shutil.rmtree(made)
    return folder


def waits(folder: Path) -> str:
    found = status(Workspace(folder), party="server")
    return found.waiting_for or str(found.next_command)


def test_the_server_waits_for_what_is_not_whole_or_not_of_this_federation(unlike: Path, tmp_path: Path) -> None:
    folder = as_server(unlike)
    told = folder / ROUND / "client-2"
    shutil.copytree(told, tmp_path / "kept")
    assert waits(folder) == "fedcollm co-distill --round 1"

    def again() -> None:
        shutil.rmtree(told)
        shutil.copytree(tmp_path / "kept", told)

    (told / "manifest.json").unlink()
    assert waits(folder) == "the knowledge of client 2, round 1 (exchange/round-0001/client-2)"
    again()
    content = (told / "knowledge.safetensors").read_bytes()
    (told / "knowledge.safetensors").write_bytes(content[:-9])
    assert waits(folder) == "the knowledge of client 2, round 1 (exchange/round-0001/client-2)"
    assert "still arriving, or cut short" in conditions(folder)["knowledge-2"]
    again()
    (told / "knowledge.safetensors").write_bytes(content + b"9")
    sound = "sound knowledge: that of client 2 in round 1 is {0}"
    assert waits(folder).startswith(sound.format("damaged, knowledge.safetensors has"))
    again()
    sign(told, agreement_sha256="0" * 64)
    assert waits(folder) == sound.format("stale, made from another fedcollm.toml")
    again()
    sign(told, client=1)
    assert waits(folder) == sound.format("damaged, is round-0001/client-1, here it should be round-0001/client-2")
    again()
    sign(told, round=2)
    assert waits(folder) == sound.format("damaged, is round-0002/client-2, here it should be round-0001/client-2")
    again()
    shutil.move(folder / ROUND / "vocabulary-client-2", tmp_path)
    assert waits(folder) == "the vocabulary of client 2, in exchange/"
    with pytest.raises(NotReady, match="waiting for the vocabulary of client 2"):
        step(Workspace(folder), party="server")


def test_knowledge_that_is_replaced_after_the_llm_learned_from_it_makes_that_stale(unlike: Path) -> None:
    sign(unlike / ROUND / "client-3", metrics={"loss": 1.0})
    assert conditions(unlike)["llm"] == "stale, made from another client-3"


def test_a_quorum_is_enough_and_whoever_comes_late_is_named_and_catches_up(
    unlike_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    toml, workspace = unlike_folder / "fedcollm.toml", Workspace(unlike_folder)
    toml.write_text(f"{toml.read_text()}\n[aggregation]\nmin_clients = 2\n".replace("rounds = 2", "rounds = 1"))
    away = shutil.move(unlike_folder / "private/client-3", unlike_folder / "away")
    given = []
    while not waits(unlike_folder).startswith("fedcollm evaluate"):
        given.append(give(fedcollm, unlike_folder))
    told = [f"{verb} --client {k} --round 1" for k in (1, 2) for verb in ("client-train", "share-knowledge")]
    server = ["co-distill --round 1", "share-knowledge --server --round 1"]
    assert given == ["align --server", "align --client 1", "align --client 2", *told, *server]
    run(workspace, scores=False)  # the two distil
    assert conditions(unlike_folder) == {}
    assert status(workspace).rounds[0].unheard == []
    shutil.move(away, unlike_folder / "private/client-3")
    learned = read_manifest(workspace.llm(1))
    said: list[Event] = []
    run(workspace, scores=False, report=said.append)
    assert any("client 3 came too late" in event.text for event in said)
    assert read_manifest(workspace.llm(1)) == learned
    assert conditions(unlike_folder) == {}
    assert status(workspace).rounds[0].unheard == [3]
    assert "late, not learned from by the LLM: client 3" in fedcollm("status", "-w", unlike_folder).out


def test_a_client_sees_no_other_clients_folders_and_knows_when_its_own_part_is_done(
    unlike: Path, fedcollm: Callable[..., Outcome]
) -> None:
    for party in ("client-1", "client-3", "server"):
        shutil.rmtree(unlike / "private" / party)
        for told in unlike.glob(f"exchange/*/*{party}"):
            if party != "server":
                shutil.rmtree(told)
    names = {one.name for one in status(Workspace(unlike)).rounds[0].steps if one.condition == "done"}
    assert names == {"vocabulary-server", "vocabulary-2", "trained-2", "knowledge-2", "knowledge-server", "slm-2"}
    said = fedcollm("status", "-w", unlike).out
    assert "this machine's part is done" in said
    for line in ("vocabularies", "knowledge"):
        assert re.search(rf"^  {line} +client 2 done; clients 1 and 3 not on this machine$", said, re.M)
    assert [line.split()[0] for line in said.splitlines()[1:9]] == [
        *("vocabulary-server", "vocabularies", "trained", "knowledge"),
        *("llm", "knowledge-server", "slm", "round"),
    ]
    (unlike / "private/client-2/public.jsonl").unlink()
    shutil.rmtree(unlike / "private/client-2/round-0002/slm")
    shutil.rmtree(unlike / "exchange/round-0002/client-2")
    line = r"^  knowledge +client 2 missing; clients 1 and 3 not on this machine$"
    assert re.search(line, fedcollm("status", "-w", unlike).out, re.M)
    awaited = "the public rows, the same file at every party: private/client-2/public.jsonl"
    assert status(Workspace(unlike)).waiting_for == awaited


def test_a_changed_byte_is_found_when_every_byte_is_looked_at(unlike: Path) -> None:
    path = unlike / ROUND / "vocabulary-client-1/cuts.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert conditions(unlike) == {}
    found = status(Workspace(unlike), verify=True)
    damaged = [one.name for one in found.rounds[0].steps if one.condition == "damaged"]
    assert damaged == ["vocabulary-1"]


def test_public_rows_that_are_not_those_learned_from_are_found_too(unlike: Path) -> None:
    write_rows(unlike / "private/client-3/public.jsonl", rows(5))
    assert status(Workspace(unlike)).changed == []
    [said] = status(Workspace(unlike), verify=True).changed
    assert said.startswith("private/client-3/public.jsonl: sha256 ")


def test_a_client_whose_public_rows_are_others_than_the_servers_is_told(unlike: Path) -> None:
    place = unlike / "private/client-2/public.jsonl"
    before, text = sha256(place.read_bytes()), place.read_text()
    assert status(Workspace(unlike)).stale == []
    for gone in ("server", "client-1", "client-3"):
        shutil.rmtree(unlike / "private" / gone)
    place.write_text(text.replace("red", "blue"))
    now, both = sha256(place.read_bytes()), "(sha256 {}..., here {}...)"
    digests = both.format(before[:16], now[:16])
    [server, own] = status(Workspace(unlike)).stale
    assert server == (
        f"the server has other public rows than this machine {digests}: compare `sha256sum "
        "private/client-2/public.jsonl` with that of private/server/auxiliary.jsonl there, "
        "and give all parties the same file"
    )
    changed = "private/client-2/public.jsonl was changed after client 2 told how it reads these rows"
    assert own.startswith(f"{changed} {digests}: ")
    place.unlink()
    assert status(Workspace(unlike)).stale == []


def test_an_adapter_of_another_client_is_not_taken_for_ones_own(unlike: Path) -> None:
    shutil.rmtree(unlike / "private/client-1/round-0001/trained")
    shutil.copytree(unlike / "private/client-2/round-0001/trained", unlike / "private/client-1/round-0001/trained")
    expected = "damaged, is client-2/round-0001/trained, here it should be client-1/round-0001/trained"
    assert conditions(unlike)["trained-1"] == expected
