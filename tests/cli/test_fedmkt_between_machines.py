"""FedMKT on four machines with a model each, that share what is copied between them, or mailed as bundles."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import (
    Outcome,
    adapters,
    bundled,
    edit,
    make_equal_workspace,
    make_unlike_workspace,
    make_workspace,
    sign,
)
from federations import CLIENTS, Machines, with_keys
from stages.exchange.bundles import bundle_bytes
from stages.progress.status import status
from stages.workspace.paths import Workspace

PARTIES = ("server", *(f"client-{k}" for k in CLIENTS))


@pytest.fixture
def machines(tmp_path: Path, unlike_models: Path, fedcollm: Callable[..., Outcome]) -> Machines:
    """A server with the LLM, and three clients with a model each; nothing is done."""
    whole, found = make_unlike_workspace(tmp_path / "whole", unlike_models), Machines(tmp_path, fedcollm)
    for party in PARTIES:
        folder = tmp_path / f"machine of {party}"
        model = "llm" if party == "server" else f"slm-{party[-1]}"
        shutil.copytree(whole / "private" / party, folder / "private" / party)
        shutil.copytree(unlike_models / model, folder / "models" / model)
        shutil.copy(whole / "fedcollm.toml", folder)
        found.folders[party] = with_keys(folder, tmp_path / f"keys of {party}")
    return found


def who(party: str) -> tuple[object, ...]:
    return ("--server",) if party == "server" else ("--client", party[-1])


def until_idle(machines: Machines, party: str, by: Callable[[str], object]) -> tuple[list[str], str]:
    """What a party does, by the line that `status` prints, and what it waits for then; scores are left out."""
    given: list[str] = []
    while True:
        found = status(Workspace(machines.folders[party]), party=party)
        if not found.next_command or "evaluate" in str(found.next_command):
            return given, found.waiting_for
        by(str(found.next_command))
        given.append(str(found.next_command).removeprefix("fedcollm "))
        assert len(given) < 20, given


def test_by_next_alone_four_machines_end_where_one_does(machines: Machines, unlike_once: Path) -> None:
    def all_of(party: str) -> tuple[list[str], str]:
        return until_idle(machines, party, lambda line: _is(line, machines.give(party, "next", *who(party)).out))

    def _is(line: str, done: str) -> None:
        assert done.strip() == line

    assert all_of("server") == (
        ["align --server"],
        "the knowledge of clients 1 to 3, round 1 (exchange/round-0001/client-1, ...)",
    )
    for round in (1, 2):
        for k in CLIENTS:
            lines = ([f"client-distill --client {k} --round 1"] if round == 2 else [f"align --client {k}"]) + [
                f"client-train --client {k} --round {round}",
                f"share-knowledge --client {k} --round {round}",
            ]
            awaited = "the server's vocabulary" if round == 1 else "what the server knows in round 2"
            assert all_of(f"client-{k}") == (lines, f"{awaited}, in exchange/")
            assert machines.give(f"client-{k}", "next", *who(f"client-{k}"), code=3).out == ""
        machines.up(1, 2)
        told = "the knowledge of client 3, round {0} (exchange/round-000{0}/client-3)"
        assert all_of("server") == ([], told.format(round))
        machines.up(3)
        lines = [f"co-distill --round {round}", f"share-knowledge --server --round {round}"]
        rest = "" if round == 2 else "the knowledge of clients 1 to 3, round 2 (exchange/round-0002/client-1, ...)"
        assert all_of("server") == (lines, rest)
        machines.down(*CLIENTS)
    for k in CLIENTS:
        assert all_of(f"client-{k}") == ([f"client-distill --client {k} --round 2"], "")
        assert "this machine's part is done" in machines.give(f"client-{k}", "status").out
        machines.give(f"client-{k}", "next", *who(f"client-{k}"), code=9)
    assert "next: fedcollm evaluate --round 2 --model llm" in machines.give("server", "status").out
    expected = adapters(unlike_once)
    for party, folder in machines.folders.items():
        held = {name: digest for name, digest in adapters(folder).items() if "keys" not in name}
        assert held.items() <= expected.items()
        # Of others it has what they told, and of nobody a model.
        assert {path.name for path in (folder / "private").iterdir()} == {"agreements", party}
        rounds = ("exchange/round-0001", "exchange/round-0002")
        seen = {name for name in held if name.startswith("exchange")}
        others = {name for name in seen if "client-" in name and f"client-{party[-1]}" not in name}
        assert party == "server" or not others
        assert all(name.startswith(rounds) for name in seen)
    held = set().union(*(adapters(folder) for folder in machines.folders.values()))
    assert held == set(expected)


def test_by_bundles_with_keys_they_end_at_the_same_weights(
    machines: Machines, unlike_once: Path, tmp_path: Path
) -> None:
    machines.enrol(*CLIENTS)

    def take(party: str) -> None:
        until_idle(machines, party, lambda line: machines.give(party, *line.split()[1:]))

    def mail(sender: str, round: int, *receivers: str, name: str) -> Path:
        """Pack by the usual name, and have each receiver unpack it."""
        bundle = tmp_path / name
        machines.give(sender, "pack", *who(sender), "--round", round, "--output", bundle)
        for receiver in receivers:
            machines.give(receiver, "unpack", bundle)
        return bundle

    for round in (1, 2):
        for k in CLIENTS:
            take(f"client-{k}")
            bundle = mail(f"client-{k}", round, "server", name=f"{k}-{round}.fedcollm")
            files = {"knowledge.safetensors", "manifest.json", "manifest.json.sig"}
            place = f"round-{round:04d}"
            expected = {f"{place}/client-{k}/{file}" for file in files}
            if round == 1:
                vocabulary = {"vocabulary.safetensors", "cuts.safetensors", "manifest.json", "manifest.json.sig"}
                expected |= {f"{place}/vocabulary-client-{k}/{file}" for file in vocabulary}
            assert set(bundled(bundle)) == expected
        take("server")
        mail("server", round, *PARTIES[1:], name=f"server-{round}.fedcollm")
    for k in CLIENTS:
        take(f"client-{k}")
    for party, folder in machines.folders.items():
        for path in folder.glob("*/**/*.safetensors"):
            if "models" not in path.parts:
                assert path.read_bytes() == (unlike_once / path.relative_to(folder)).read_bytes(), path
        assert status(Workspace(folder), verify=True, party=party).is_damaged is False
        for signed in folder.glob("**/manifest.json"):
            assert signed.with_name("manifest.json.sig").is_file()


def test_round_one_can_be_packed_before_anybody_knows_anything(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for party in ("server", "client-1"):
        machines.give(party, "align", *who(party))
        said = machines.give(party, "pack", *who(party), "--round", 1, "--json").out
        path = Path(json.loads(said)["path"])
        assert path.name == f"tiny-round-0001-{party}-vocabulary.fedcollm"
        machines.give("client-1" if party == "server" else "server", "unpack", path)
        path.unlink()
    machines.give("client-1", "align", *who("client-1"))
    assert (machines.folders["client-1"] / "private/client-1/alignment/report.json").is_file()
    machines.give("client-1", "pack", *who("client-1"), "--round", 2, code=3)


# --- clients of one model, which are averaged


@pytest.fixture
def equal_machines(tmp_path: Path, unlike_models: Path, fedcollm: Callable[..., Outcome]) -> Machines:
    """A server with both models, and three clients with one."""
    whole, found = make_equal_workspace(tmp_path / "whole", unlike_models), Machines(tmp_path, fedcollm)
    for party in PARTIES:
        folder = tmp_path / f"machine of {party}"
        for model in ("llm", "slm-1") if party == "server" else ("slm-1",):
            shutil.copytree(unlike_models / model, folder / "models" / model)
        shutil.copytree(whole / "private" / party, folder / "private" / party)
        shutil.copy(whole / "fedcollm.toml", folder)
        found.folders[party] = with_keys(folder, tmp_path / f"keys of {party}")
    return found


def all_of(machines: Machines, party: str) -> tuple[list[str], str]:
    """What a party does by `next` alone, and what it waits for then."""
    return until_idle(machines, party, lambda line: machines.give(party, "next", *who(party)))


def test_by_next_alone_averaged_clients_end_where_one_machine_does(equal_machines: Machines, equal_once: Path) -> None:
    machines = equal_machines
    assert all_of(machines, "server")[0] == ["align --server", "broadcast --round 1"]
    machines.down(*CLIENTS)
    for round in (1, 2):
        for k in CLIENTS:
            assert all_of(machines, f"client-{k}")[0] == [
                *([f"align --client {k}"] if round == 1 else []),
                f"client-train --client {k} --round {round}",
                f"share-knowledge --client {k} --round {round}",
            ]
        machines.up(*CLIENTS)
        given, waits = all_of(machines, "server")
        assert given == [f"co-distill --round {round}", f"share-knowledge --server --round {round}"]
        place = f"exchange/round-000{round}/adapter-client-1"
        assert waits == f"the adapters of clients 1 to 3, round {round} ({place}, ...)"
        machines.down(*CLIENTS)
        for k in CLIENTS:
            given, waits = all_of(machines, f"client-{k}")
            assert given == [f"client-distill --client {k} --round {round}"]
            assert waits == ("the broadcast of round 2, in exchange/" if round == 1 else "")
        machines.up(*CLIENTS)
        opens = [] if round == 2 else ["broadcast --round 2"]
        assert all_of(machines, "server")[0] == [f"aggregate --round {round}", *opens]
        machines.down(*CLIENTS)
    expected = adapters(equal_once)
    held: set[str] = set()
    for folder in machines.folders.values():
        found = {name: digest for name, digest in adapters(folder).items() if "keys" not in name}
        assert found.items() <= expected.items()
        held |= set(found)
        assert machines.fedcollm("audit", folder).code == 0
    assert held == set(expected)


def test_averaged_clients_mail_their_knowledge_and_then_their_adapters(
    equal_machines: Machines, equal_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys; bundles have the names that `pack` gives them."""
    machines = equal_machines
    machines.enrol(*CLIENTS)
    monkeypatch.chdir(tmp_path)

    def mail(sender: str, round: int, *receivers: str, leg: str) -> set[str]:
        """Pack, and have each receiver unpack. Returns the folders that travelled."""
        path = Path(json.loads(machines.give(sender, "pack", *who(sender), "--round", round, "--json").out)["path"])
        assert path.name == f"tiny-round-{round:04d}-{sender}{leg}.fedcollm"
        for receiver in receivers:
            machines.give(receiver, "unpack", path)
        return {Path(name).parent.name for name in bundled(path)}

    for round in (1, 2):
        all_of(machines, "server")
        once = {"vocabulary-server"} if round == 1 else set()
        opens = mail("server", round, *PARTIES[1:], leg="-vocabulary" if round == 1 else "-broadcast")
        assert opens == {"broadcast"} | once
        for k in CLIENTS:
            all_of(machines, f"client-{k}")
            own = {f"vocabulary-client-{k}"} if round == 1 else set()
            assert mail(f"client-{k}", round, "server", leg="") == {f"client-{k}"} | own
        all_of(machines, "server")
        assert mail("server", round, *PARTIES[1:], leg="") == {"broadcast", "server"} | once
        for k in CLIENTS:
            all_of(machines, f"client-{k}")
            assert f"adapter-client-{k}" in mail(f"client-{k}", round, "server", leg="-adapter")
    all_of(machines, "server")
    average = "private/server/round-0002/aggregate/adapter_model.safetensors"
    assert (machines.folders["server"] / average).read_bytes() == (equal_once / average).read_bytes()
    assert "rounds 1 to 2: " in machines.give("server", "verify").out
    for folder in machines.folders.values():
        assert machines.fedcollm("audit", folder).code == 0


def test_a_new_attempt_at_a_round_of_averaged_clients_counts_no_earlier_adapter(equal_machines: Machines) -> None:
    machines = equal_machines
    machines.enrol(*CLIENTS)
    all_of(machines, "server")
    for step in range(2):
        machines.down(*CLIENTS)
        for k in CLIENTS:
            all_of(machines, f"client-{k}")
        machines.up(*CLIENTS)
        if step == 0:
            all_of(machines, "server")
    machines.give("server", "broadcast", "--round", 1, "--overwrite")
    outcome = machines.give("server", "aggregate", "--round", 1, code=3)
    assert "client 1's update is of an earlier attempt at this round" in outcome.err
    machines.down(*CLIENTS)
    for k in CLIENTS:
        machines.client(k, "client-train", "--round", 1)
        machines.client(k, "share-knowledge", "--round", 1, "--overwrite")
    machines.up(*CLIENTS)
    machines.give("server", "co-distill", "--round", 1, "--overwrite")
    machines.give("server", "share-knowledge", "--server", "--round", 1, "--overwrite")
    machines.down(*CLIENTS)
    machines.client(1, "client-distill", "--round", 1, "--overwrite")
    machines.up(1)
    assert "has 1 of the 3 updates" in machines.give("server", "aggregate", "--round", 1, code=3).err
    for k in (2, 3):
        machines.client(k, "client-distill", "--round", 1, "--overwrite")
    machines.up(2, 3)
    machines.give("server", "aggregate", "--round", 1)
    for folder in machines.folders.values():
        assert "earlier attempt" not in machines.fedcollm("verify", "-w", folder).err
        audited = machines.fedcollm("audit", folder)
        assert audited.code == 0
        assert "earlier attempt" not in audited.out


def test_an_adapter_is_nothing_that_fedmkt_exchanges_unless_it_is_averaged(
    equal: Path, unlike_folder: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    bundle = tmp_path / "adapter.fedcollm"
    assert fedcollm("pack", "--client", 2, "--round", 2, "--output", bundle, "-w", equal).code == 0
    outcome = fedcollm("unpack", bundle, "-w", unlike_folder)
    assert outcome.code == 5
    assert "round-0002/adapter-client-2/adapter_config.json is nothing that this federation exchanges" in outcome.err


UNSOUND: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "of another agreement": (lambda told: sign(told, agreement_sha256="0" * 64), 5, "is of another agreement"),
    "an adapter": (lambda told: sign(told, stage="client-train"), 5, "is of another stage: client-train"),
    "another client's": (lambda told: sign(told, client=1), 5, "is of another client: 1, here it is 2"),
    "another round's": (lambda told: sign(told, round=2), 5, "is of another round: 2, here it is 1"),
    "another model's": (
        lambda told: sign(told, lora=json.loads((told.parent / "client-1/manifest.json").read_text())["lora"]),
        5,
        "is of another LoRA shape",
    ),
    "no tensors": (
        lambda told: ((told / "knowledge.safetensors").write_bytes(b"knowledge"), sign(told)),
        4,
        "knowledge.safetensors",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_knowledge_that_is_forged_is_neither_packed_nor_unpacked(
    case: str, unlike: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    """By somebody whose `pack` does not check: the bundle itself is whole."""
    harm, code, said = UNSOUND[case]
    server = shutil.copytree(unlike, tmp_path / "server", symlinks=True)
    told = "exchange/round-0001/client-2"
    shutil.rmtree(server / told)
    harm(unlike / told)
    names = ("client-2", "vocabulary-client-2")
    files = {
        path.relative_to(unlike / "exchange").as_posix(): path.read_bytes()
        for name in names
        for path in (unlike / "exchange/round-0001" / name).iterdir()
    }
    bundle = tmp_path / "forged.fedcollm"
    bundle.write_bytes(bundle_bytes("tiny", files))
    outcome = fedcollm("unpack", bundle, "-w", server)
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err
    assert not (server / told).exists()
    outcome = fedcollm("pack", "--client", 2, "--round", 1, "--output", tmp_path / "x", "-w", unlike)
    assert (outcome.code, said in outcome.err) == (code, True), outcome.err
    assert not (tmp_path / "x").exists()


def test_what_the_method_does_not_send_is_refused(
    unlike: Path, base_models: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    bundle = tmp_path / "told.fedcollm"
    assert fedcollm("pack", "--server", "--round", 2, "--output", bundle, "-w", unlike).code == 0
    outcome = fedcollm("unpack", bundle, "-w", make_workspace(tmp_path / "of fedcollm", base_models))
    assert outcome.code == 5
    assert "round-0002/server/knowledge.safetensors is nothing that this federation exchanges" in outcome.err
    edit(unlike / "fedcollm.toml", 'method = "fedmkt"', 'method = "llm2slm"')
    for words in (("--server",), ("--client", 2)):
        outcome = fedcollm("pack", *words, "--round", 2, "--output", tmp_path / "y", "-w", unlike)
        assert outcome.code == 2
        assert "send nothing after round 1" in outcome.err
