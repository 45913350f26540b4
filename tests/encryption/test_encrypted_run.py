"""Encrypted mode from end to end: two clients, one key, and the mean that NumPy has in float64 of what they keep."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import Once

from builders import Outcome, edit, make_workspace, rows, write_rows
from federations import Machines, agreement, copied, enrol, vault_of, with_keys
from stages.aggregate import aggregate
from stages.artefacts.adapter_files import weights_bytes
from stages.artefacts.arrays import array_bytes
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Masking
from stages.artefacts.publishing import publish
from stages.artefacts.reading import read_artefact, read_manifest
from stages.audit.audit import audit
from stages.audit.verify import verify
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.encryption import ciphertext_files
from stages.federation.run import derived, run
from stages.parties.party import Party
from stages.planning.comm_cost import comm_cost
from stages.progress.status import status
from stages.reveal import reveal
from stages.runtime.errors import Damaged, NotReady, Refused, UsageProblem
from stages.study.variants import baseline
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_WEIGHTS, MASKED_UPDATE, SEALED_SHARES
from stages.workspace.names import ENCRYPTED as ENCRYPTED_FILE
from stages.workspace.paths import Workspace

ENCRYPTED = 'mode = "encrypted"\n'


def flat(folder: Path) -> np.ndarray:
    """All numbers of an adapter as float64, by name."""
    found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return np.concatenate([value.ravel().astype(np.float64) for _, value in sorted(found.items())])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def mean_of(folder: Path, weights: dict[int, float], round: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The mean update as the server has it, and as numpy.average has it of the clients' own adapters."""
    before = flat(folder / f"exchange/round-{round:04d}/broadcast")
    own = [flat(folder / f"private/client-{k}/round-{round:04d}/slm") - before for k in weights]
    found = flat(folder / f"private/server/round-{round:04d}/aggregate") - before
    return found, np.average(own, axis=0, weights=list(weights.values()))


@pytest.fixture(scope="session")
def encrypted_once(once: Once, base_models: Path) -> tuple[Path, Path]:
    """Two clients that have run both rounds, and the keys of all parties."""

    def fill(top: Path) -> None:
        folder = with_keys(make_workspace(top / "study", base_models), top / "keys")
        (folder / "fedcollm.toml").write_text(agreement(aggregation=ENCRYPTED, clients=2))
        run(Workspace(folder))

    top = once("encrypted", fill)
    return top / "study", top / "keys"


@pytest.fixture
def encrypted(encrypted_once: tuple[Path, Path], tmp_path: Path) -> Path:
    return copied(encrypted_once, tmp_path)


def test_run_does_both_rounds_and_what_is_opened_is_the_mean(encrypted: Path) -> None:
    assert all(round.is_done for round in status(Workspace(encrypted), verify=True).rounds)
    for round in (1, 2):
        found, expected = mean_of(encrypted, {1: 1, 2: 1}, round)
        assert relative_error(found, expected) < 1e-5  # adapters are float32: their own steps are most of it
    verify(Workspace(encrypted))


def test_run_with_overwrite_begins_anew_with_new_keys(encrypted: Path) -> None:
    before = Party.server(Workspace(encrypted)).members
    run(Workspace(encrypted), scores=False, overwrite=True)
    after = Party.server(Workspace(encrypted)).members
    assert before
    assert after
    assert before.sha256 != after.sha256
    assert all(round.is_done for round in status(Workspace(encrypted), verify=True).rounds)
    assert [one.text for one in audit([encrypted]) if one.level == "FAIL"] == []


@pytest.fixture
def machines(tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]) -> Machines:
    """A server and two clients with a folder and keys each, who have joined; client 2 is the one that opens sums."""
    text = agreement(aggregation=f"{ENCRYPTED}opener = 2\n", clients=2, rounds=1, method="fedavg")
    found = Machines.set_up(tmp_path, base_models, fedcollm, text, (1, 2))
    found.enrol(1, 2)
    return found


def secrets_of(machine: Path) -> set[str]:
    """Which party's vault on a machine holds what opens sums."""
    return {path.parent.name for path in Workspace(machine).secrets.rglob("ckks.json")}


def test_two_clients_on_their_own_machines_take_one_command_more_than_in_plain_mode(machines: Machines) -> None:
    server, first, second = (machines.folders[party] for party in ("server", "client-1", "client-2"))
    assert [secrets_of(folder) for folder in (server, first, second)] == [set(), set(), {"client-2"}]
    machines.give("server", "next")
    machines.down(1, 2)
    waits = machines.give("client-2", "next")
    assert "client-train" in waits.err
    machines.client(1, "client-train", "--round", 1)
    machines.up(1, 2)
    closing = machines.give("server", "aggregate", "--round", 1, code=3)
    assert "closed over clients 1 and 2" in closing.err
    assert "round 1 waits for client 2 to open the sum" in closing.err
    assert "fedcollm reveal --client 2 --round 1" in closing.err
    assert "waiting for the reveal of client 2" in machines.give("server", "next", code=3).err
    machines.down(1, 2)
    machines.give("client-1", "next", code=9)
    assert "client 1 has no key to open a sum with" in machines.client(1, "reveal", "--round", 1, code=2).err
    said = machines.give("client-2", "next").err
    assert "the server alone knows whether the sum is theirs" in said
    machines.up(2)
    machines.give("server", "next")
    assert all(round.is_done for round in status(Workspace(server), verify=True).rounds)
    before = flat(server / "exchange/round-0001/broadcast")
    own = [flat(folder / f"private/client-{k}/round-0001/slm") - before for k, folder in ((1, first), (2, second))]
    found = flat(server / "private/server/round-0001/aggregate") - before
    assert relative_error(found, np.mean(own, axis=0)) < 1e-5
    assert [one.text for one in audit([server]) if one.level == "FAIL"] == []


def test_a_remote_carries_keys_and_a_round_and_the_sum_goes_to_the_one_with_the_key(
    tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    text = agreement(aggregation=f"{ENCRYPTED}opener = 2\n", clients=2, rounds=1, method="fedavg")
    machines = Machines.set_up(tmp_path, base_models, fedcollm, text, (1, 2))
    parties = {"server": ("--server",), "client-1": ("--client", 1), "client-2": ("--client", 2)}
    for folder in machines.folders.values():
        with (folder / "machine.toml").open("a") as file:
            file.write(f'\n[exchange]\nremote = "file://{tmp_path}/share"\n')

    def pull(party: str) -> list[str]:
        return list(json.loads(machines.give(party, "pull", *parties[party], "--json").out)["moved"])

    def step(party: str, *words: object, code: int = 0) -> list[str]:
        """Pull, take a step, push. Returns what was pulled."""
        got = pull(party)
        machines.give(party, *words, code=code)
        machines.give(party, "push", *parties[party])
        return got

    for k in (1, 2):
        step(f"client-{k}", "keys", "--client", k)
    assert pull("server") == ["keys/client-1.json", "keys/client-2.json"]
    fingerprint = machines.give("server", "enroll").out.strip()
    machines.give("server", "push", "--server")
    for k in (1, 2):
        assert pull(f"client-{k}")[-1] == "federation.json"
        assert (machines.folders[f"client-{k}"] / f"exchange/keys/client-{3 - k}.json").exists()
        machines.client(k, "join", "--fingerprint", fingerprint)
    step("server", "broadcast", "--round", 1)
    for k in (1, 2):
        assert step(f"client-{k}", "client-train", "--client", k, "--round", 1) == ["round-0001/broadcast"]
    assert step("server", "aggregate", "--round", 1, code=3) == ["round-0001/client-1", "round-0001/client-2"]
    assert pull("client-1") == []
    assert step("client-2", "reveal", "--client", 2, "--round", 1) == ["round-0001/close"]
    assert step("server", "aggregate", "--round", 1) == ["round-0001/reveal-2"]


def test_bundles_carry_a_round_and_the_sum_goes_to_the_one_with_the_key(machines: Machines, tmp_path: Path) -> None:
    def mail(source: str, target: str, *words: object) -> str:
        machines.give(source, "pack", *words, "--round", 1, "--output", tmp_path / "bundle", "--overwrite")
        return machines.give(target, "unpack", tmp_path / "bundle").out

    machines.give("server", "broadcast", "--round", 1)
    for k in (1, 2):
        mail("server", f"client-{k}", "--server", "--to", k)
        machines.client(k, "client-train", "--round", 1)
        mail(f"client-{k}", "server", "--client", k)
    machines.give("server", "aggregate", "--round", 1, code=3)
    assert "round-0001/close" in mail("server", "client-2", "--server", "--to", 2)
    assert "round-0001/close" not in mail("server", "client-1", "--server", "--to", 1)
    machines.client(2, "reveal", "--round", 1)
    assert "round-0001/reveal-2" in mail("client-2", "server", "--client", 2)
    machines.give("server", "aggregate", "--round", 1)


# --- again, late, alone


def without(folder: Path, *names: str) -> None:
    """Take away what was made in round 1 and after it, to be made again; the vaults keep what they remember."""
    for name in names:
        shutil.rmtree(folder / name)
    for path in [*folder.glob("exchange/round-0002"), *folder.glob("private/*/round-0002")]:
        shutil.rmtree(path)
    shutil.rmtree(folder / "results", ignore_errors=True)


AGGREGATE, SUM, OPENED = (
    "private/server/round-0001/aggregate",
    "exchange/round-0001/close",
    "exchange/round-0001/reveal-1",
)


def test_a_run_that_was_stopped_goes_on_and_makes_the_same(encrypted: Path) -> None:
    made = {name: (encrypted / name / "manifest.json").read_bytes() for name in (AGGREGATE, OPENED, SUM)}
    opened = (encrypted / OPENED / "opened.safetensors").read_bytes()
    without(encrypted, AGGREGATE, OPENED)
    run(Workspace(encrypted), rounds=[1], scores=False)
    assert {name: (encrypted / name / "manifest.json").read_bytes() for name in made} == made
    assert (encrypted / OPENED / "opened.safetensors").read_bytes() == opened  # under the same noise


@pytest.mark.parametrize("name", [f"{SUM}/encrypted.safetensors", f"{OPENED}/opened.safetensors"])
def test_no_byte_of_a_sum_or_a_mean_changes_unseen(name: str, encrypted: Path) -> None:
    path = encrypted / name
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(Damaged, match=f"{path.name} is not the file its manifest names"):
        verify(Workspace(encrypted))
    assert not all(round.is_done for round in status(Workspace(encrypted), verify=True).rounds)
    assert any(path.name in one.text for one in audit([encrypted]) if one.level == "FAIL")


def test_an_auditor_sees_an_average_that_is_not_what_was_opened(encrypted: Path) -> None:
    place = encrypted / "private/server/round-0002/aggregate"
    made = read_artefact(place)
    halved = {name: value / 2 for name, value in safetensors.numpy.load(made.contents[ADAPTER_WEIGHTS]).items()}
    draft = Draft(**{each.name: getattr(made.manifest, each.name) for each in fields(Draft)})
    publish(
        place, made.contents | {ADAPTER_WEIGHTS: weights_bytes(halved)}, draft, by=Party.server(Workspace(encrypted))
    )
    [found] = [one for one in audit([encrypted]) if (one.id, one.level) == ("A9", "FAIL")]
    assert found.text.startswith("private/server/round-0002/aggregate: is not the broadcast with the opened mean")


def test_a_round_is_opened_again_until_its_sum_has_been(three: Path) -> None:
    workspace = Workspace(three)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    close(three)
    broadcast(workspace, round=1, overwrite=True)
    with pytest.raises(NotReady, match="has 0 of the 2 updates it needs"):
        aggregate(workspace, round=1)
    for client in (1, 3):
        client_train(workspace, client=client, round=1)
    close(three)
    reveal(workspace, client=1, round=1)
    aggregate(workspace, round=1)
    found, expected = mean_of(three, {1: 1, 3: 1})
    assert relative_error(found, expected) < 1e-5
    verify(workspace)
    assert [one.text for one in audit([three]) if one.level == "FAIL"] == []


def test_an_update_is_encrypted_once_and_sent_again_only_where_it_is_gone(encrypted: Path) -> None:
    place, workspace = encrypted / "exchange/round-0001/client-2", Workspace(encrypted)
    before = (place / "encrypted.safetensors").read_bytes()
    client_train(workspace, client=2, round=1)
    assert (place / "encrypted.safetensors").read_bytes() == before
    shutil.rmtree(place)
    client_train(workspace, client=2, round=1)
    assert (place / "encrypted.safetensors").read_bytes() != before  # other randomness, the same numbers


@pytest.fixture
def three(tmp_path: Path, base_models: Path) -> Path:
    """Three clients, of which two are enough, with keys and a broadcast."""
    folder = with_keys(make_workspace(tmp_path / "study", base_models), tmp_path / "keys")
    text = agreement(aggregation=f"{ENCRYPTED}min_clients = 2\n", method="fedavg", rounds=1)
    (folder / "fedcollm.toml").write_text(text)
    enrol(Workspace(folder))
    broadcast(Workspace(folder), round=1)
    return folder


def close(folder: Path) -> None:
    with pytest.raises(NotReady, match="waits for client 1 to open the sum"):
        aggregate(Workspace(folder), round=1)


def test_one_update_alone_is_not_added_and_one_that_comes_late_is_left_out(three: Path) -> None:
    workspace = Workspace(three)
    client_train(workspace, client=2, round=1)
    with pytest.raises(NotReady, match="round 1 has 1 of the 2 updates it needs; absent: clients 1 and 3"):
        aggregate(workspace, round=1)
    client_train(workspace, client=3, round=1)
    close(three)
    client_train(workspace, client=1, round=1)
    reveal(workspace, client=1, round=1)  # which opens a sum that it has no part in
    heard: list[str] = []
    made = aggregate(workspace, round=1, report=lambda event: heard.append(event.text))
    assert "client 1's update came after the close: it is left out" in heard
    assert made.unmasking is not None
    assert (made.unmasking.survivors, made.unmasking.revealed, made.unmasking.count) == ([2, 3], [1], 2)
    found, expected = mean_of(three, {2: 1, 3: 1})
    assert relative_error(found, expected) < 1e-5
    assert [one.text for one in audit([three]) if one.level == "FAIL"] == []
    assert any("came after the close" in one.text for one in audit([three]) if one.level == "WARN")


def forged(folder: Path, clients: list[int], source: str) -> None:
    """Have the server close round 1 over these clients, with the ciphertexts of this folder as their sum."""
    server = Party.server(Workspace(folder))
    sent = {k: read_artefact(folder / f"exchange/round-0001/client-{k}") for k in clients}
    theta = read_artefact(folder / "exchange/round-0001/broadcast")
    draft = Draft(
        stage="close",
        round=1,
        parents={"broadcast": theta.sha256} | {f"client-{k}": one.sha256 for k, one in sent.items()},
        base=theta.manifest.base,
        parameters=sent[clients[0]].manifest.parameters,
        closing={f"client-{k}": one.manifest.files[ENCRYPTED_FILE].sha256 for k, one in sent.items()},
    )
    content = (folder / source / ENCRYPTED_FILE).read_bytes()
    shutil.rmtree(folder / SUM, ignore_errors=True)
    publish(folder / SUM, {ENCRYPTED_FILE: content}, draft, by=server)


def test_the_key_opens_no_sum_of_one_client(three: Path) -> None:
    workspace, one = Workspace(three), "exchange/round-0001/client-2"
    for client in (2, 3):
        client_train(workspace, client=client, round=1)
    forged(three, [2], one)
    with pytest.raises(Refused, match="the sum of round 1 is of client 2: to open it is to see that update"):
        reveal(workspace, client=1, round=1)
    forged(three, [2, 3], one)  # which says that it is of two
    with pytest.raises(Refused, match="is not that of the updates of clients 2 and 3 here"):
        reveal(workspace, client=1, round=1)
    kept = shutil.move(three / one, three.parent / "kept")
    with pytest.raises(Damaged, match="not of 2 updates of this federation's key: its ciphertext 0 counts 1"):
        reveal(workspace, client=1, round=1)  # where the updates are not here, the count inside tells
    shutil.move(kept, three / one)
    assert any("is not the sum of the updates" in found.text for found in audit([three]) if found.level == "FAIL")


def test_the_key_opens_one_sum_of_a_round_for_ever(three: Path) -> None:
    workspace = Workspace(three)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    close(three)
    reveal(workspace, client=1, round=1)
    shutil.rmtree(three / SUM)
    shutil.move(three / "exchange/round-0001/client-3", three.parent / "kept")
    with pytest.raises(Refused, match="client 1 opened another sum of round 1 than the one here"):
        aggregate(workspace, round=1)
    with pytest.raises(Refused, match=r"this is a second sum of round 1: .* opens one for ever"):
        reveal(workspace, client=1, round=1)


def test_a_round_that_has_been_opened_is_not_begun_again_but_can_be_given_up(three: Path) -> None:
    workspace = Workspace(three)
    for client in (2, 3):
        client_train(workspace, client=client, round=1)
    close(three)
    reveal(workspace, client=1, round=1)
    theta = (three / "exchange/round-0001/broadcast/manifest.json").read_bytes()
    with pytest.raises(Refused, match="client 1 has opened the sum of round 1, and opens no other") as refused:
        broadcast(workspace, round=1, overwrite=True)
    assert "fedcollm aggregate --round 1 --keep-old --overwrite gives the round up" in str(refused.value.mend)
    assert (three / "exchange/round-0001/broadcast/manifest.json").read_bytes() == theta

    kept = shutil.move(three / OPENED, three.parent / "kept")  # as where it has not been carried to the server yet
    broadcast(workspace, round=1, overwrite=True)
    with pytest.raises(Refused, match="this client has revealed for round 1 already") as refused:
        client_train(workspace, client=1, round=1)
    assert "give the round up: fedcollm aggregate --round 1 --keep-old --overwrite" in str(refused.value.mend)
    shutil.move(kept, three / OPENED)
    aggregate(workspace, round=1, keep_old=True, overwrite=True)
    found = status(workspace)
    assert found.next_command
    assert found.next_command.verb == "evaluate"  # nothing of the round is waited for
    assert found.rounds[0].is_done


@pytest.mark.parametrize(("number", "said"), [(9.0, "9"), (-1e30, r"1e\+30"), (np.nan, "nan")])
def test_an_opener_cannot_tell_what_no_clients_can_have_sent(number: float, said: str, three: Path) -> None:
    workspace = Workspace(three)
    for client in (2, 3):
        client_train(workspace, client=client, round=1)
    close(three)
    reveal(workspace, client=1, round=1)
    sound = read_artefact(three / OPENED)
    mean = safetensors.numpy.load(sound.contents["opened.safetensors"])["mean"].copy()
    mean[-1] = number
    draft = Draft(**{each.name: getattr(sound.manifest, each.name) for each in fields(Draft)})
    publish(
        three / OPENED, {"opened.safetensors": array_bytes("mean", mean)}, draft, by=Party.client(Workspace(three), 1)
    )
    words = f"the mean that client 1 opened holds {said}, aggregation.max_update_value allows 8"
    with pytest.raises(Damaged, match=words) as refused:
        aggregate(workspace, round=1)
    assert "fedcollm aggregate --round 1 --keep-old gives the round up" in str(refused.value.mend)
    [found] = [one.text for one in audit([three]) if one.level == "FAIL"]
    assert re.search(words, found)


def spoiled(folder: Path, content: bytes, **claims: Any) -> None:
    """Have client 3 send this in the place of its ciphertexts, signed."""
    place = folder / "exchange/round-0001/client-3"
    draft = {each.name: getattr(read_manifest(place)[0], each.name) for each in fields(Draft)} | claims
    publish(place, {ENCRYPTED_FILE: content}, Draft(**draft), by=Party.client(Workspace(folder), 3))


def test_what_a_client_sends_in_bad_faith_is_refused_by_its_name(three: Path) -> None:
    workspace, place = Workspace(three), three / "exchange/round-0001/client-3" / ENCRYPTED_FILE
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    sound = place.read_bytes()
    [ciphertext] = ciphertext_files.read(sound, place, 1)
    hostile = {
        b"\x80\x04K\x01.": "is a pickle, which is never opened",
        ciphertext_files.written([ciphertext, ciphertext]): r"other tensors than .* lengths U32 \[1\]",
        ciphertext_files.written([ciphertext[:-99]]): "client 3's update: not a ciphertext",
        ciphertext_files.written([b"\0" * 99]): "client 3's update: (not )?a ciphertext",
    }
    for content, said in hostile.items():
        spoiled(three, content)
        with pytest.raises(Damaged, match=said):
            aggregate(workspace, round=1)
    spoiled(three, sound, parents={"broadcast": "0" * 64})
    with pytest.raises(Refused, match="client 3's update of round 1 was trained from another broadcast"):
        aggregate(workspace, round=1)


def test_a_plain_federation_takes_no_hidden_update(answered: Path) -> None:
    place = answered / "exchange/round-0001/client-2"
    draft = {each.name: getattr(read_manifest(place)[0], each.name) for each in fields(Draft)}
    masking = Masking(y_sha256="0" * 64, commit_self="0" * 64, commit_pairs={})
    masked = {name: array_bytes("y", np.zeros(5, np.uint32)) for name in (MASKED_UPDATE, SEALED_SHARES)}
    encrypted = {ENCRYPTED_FILE: ciphertext_files.written([b"x"])}
    for mode, contents, more in (("encrypted", encrypted, {}), ("secure", masked, {"masking": masking})):
        publish(place, contents, Draft(**draft | more), by=Party.client(Workspace(answered), 2))
        with pytest.raises(Refused, match=f"client-2 is of {mode} mode, the agreement says plain"):
            aggregate(Workspace(answered), round=1, overwrite=True)
        assert any(f"is of {mode} mode" in one.text for one in audit([answered]) if one.level == "FAIL")


def test_weights_are_by_examples_and_nobody_is_told_them(tmp_path: Path, base_models: Path) -> None:
    folder = with_keys(make_workspace(tmp_path / "study", base_models), tmp_path / "keys")
    lines = f'{ENCRYPTED}weighting = "samples"\nmax_examples = 100\ncombine = "freeze-a"\nserver = "fedavgm"\n'
    (folder / "fedcollm.toml").write_text(agreement(aggregation=lines, clients=2, rounds=1, method="fedavg"))
    edit(folder / "fedcollm.toml", "steps = 6", "epochs = 1.0")
    write_rows(folder / "private/client-1/train.jsonl", rows(24))
    write_rows(folder / "private/client-2/train.jsonl", rows(8))
    run(Workspace(folder), scores=False)
    manifests = [read_manifest(folder / f"private/client-{k}/round-0001/slm")[0] for k in (1, 2)]
    weights = {k: float(manifest.examples) for k, manifest in enumerate(manifests, 1)}
    assert weights[1] == 3 * weights[2]
    found, expected = mean_of(folder, weights)
    assert relative_error(found, expected) < 1e-5
    sent = read_manifest(folder / "exchange/round-0001/client-1")[0]
    assert (sent.examples, sent.tokens, sent.steps, sent.metrics, sent.seed) == (0, 0, 0, {}, None)


def test_a_study_takes_the_mode_as_any_other_setting(tmp_path: Path, base_models: Path) -> None:
    """A plain federation with an opener, as a sweep of aggregation.mode begins; and back, for what averages nothing."""
    folder = with_keys(make_workspace(tmp_path / "study", base_models), tmp_path / "keys")
    (folder / "fedcollm.toml").write_text(agreement(aggregation="opener = 2\n", clients=2, rounds=1, method="fedavg"))
    made_by = Command("sweep", set=("aggregation.mode=encrypted",))
    variant = derived(Workspace(folder), folder / "sweeps/x", {"aggregation.mode": "encrypted"}, made_by=made_by)
    run(variant, scores=False)
    assert (variant.root / "exchange/round-0001/reveal-2/opened.safetensors").exists()
    run(Workspace(folder), scores=False)
    one, other = (flat(at.root / AGGREGATE) for at in (variant, Workspace(folder)))
    assert relative_error(one, other) < 1e-5
    edit(folder / "fedcollm.toml", "opener = 2", 'opener = 2\nmode = "encrypted"')
    alone, changes = baseline(Workspace(folder), "standalone")
    assert changes["aggregation.mode"] == "plain"
    assert alone != folder


def test_a_plan_reckons_with_ciphertexts(encrypted: Path) -> None:
    found = comm_cost(Workspace(encrypted)).full
    sent = (encrypted / "exchange/round-0001/client-2" / ENCRYPTED_FILE).stat().st_size
    assert found is not None
    assert sent <= found.update_bytes <= 1.01 * sent
    [told] = [one for one in comm_cost(Workspace(encrypted)).rounds if (one.round, one.party) == (1, "client-2")]
    [opener] = [one for one in comm_cost(Workspace(encrypted)).rounds if (one.round, one.party) == (1, "client-1")]
    assert told.received_bytes < 10_000
    assert opener.received_bytes - told.received_bytes > sent  # the sum goes to the one that opens it


def test_without_tenseal_a_command_says_what_to_install(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(UsageProblem, match="needs TenSEAL, which is not installed") as found:
        client_train(Workspace(three), client=1, round=1)
    assert found.value.mend == "pip install 'fedcollm[he]'"


def test_a_key_that_the_roster_does_not_name_encrypts_nothing(three: Path) -> None:
    path = three / "exchange/keys/client-1.json"
    keys = json.loads(path.read_text())
    path.write_text(json.dumps(keys | {"ckks": keys["ckks"][:-8] + "0" * 8}))
    with pytest.raises(Damaged):
        client_train(Workspace(three), client=2, round=1)
    assert not (three / "exchange/round-0001/client-2").exists()


def test_a_secret_of_the_key_that_was_damaged_opens_nothing(three: Path) -> None:
    for client in (1, 2, 3):
        client_train(Workspace(three), client=client, round=1)
    close(three)
    kept = vault_of(three, "client-1") / "ckks.json"
    kept.write_text(kept.read_text().replace("a0", "b0", 1))
    with pytest.raises(Damaged, match=r"the secret ckks\.json of client-1 is damaged"):
        reveal(Workspace(three), client=1, round=1)
