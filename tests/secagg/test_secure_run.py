"""run in secure mode: the files of the separate commands, resumed from anywhere, renewed, weighted and derived."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import edit, rows, write_rows
from federations import SECURE, agreement, copied, enrol, vault_of, with_keys
from stages.aggregate import aggregate
from stages.artefacts.reading import read_artefact, read_manifest
from stages.audit.verify import verify
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.federation.run import run
from stages.parties.party import Party
from stages.progress.status import status
from stages.reveal import reveal
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Refused
from stages.secagg import accepting, masking, revealing, sending
from stages.workspace.paths import Workspace

WEIGHTS = "adapter_model.safetensors"
AGGREGATE = "private/server/round-0001/aggregate"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / WEIGHTS)


def flat(folder: Path) -> np.ndarray:
    """All numbers of an adapter as float64, by name."""
    return np.concatenate([value.ravel().astype(np.float64) for _, value in sorted(tensors(folder).items())])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / np.sqrt(np.mean(expected**2)))


def mean_of(folder: Path, weights: list[float], round: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The mean update as numpy.average has it of the clients' own adapters, and the one that was unmasked."""
    before = flat(folder / f"exchange/round-{round:04d}/broadcast")
    own = [flat(folder / f"private/client-{k}/round-{round:04d}/slm") - before for k in (1, 2, 3)]
    found = flat(folder / f"private/server/round-{round:04d}/aggregate") - before
    return found, np.average(own, axis=0, weights=weights)


def everything_is_done(folder: Path) -> bool:
    return all(round.is_done for round in status(Workspace(folder), verify=True).rounds)


def test_run_does_both_rounds_and_the_sum_is_the_mean_of_what_clients_keep(summed: Path) -> None:
    assert everything_is_done(summed)
    for round in (1, 2):
        found, expected = mean_of(summed, [1, 1, 1], round)
        # The ring's steps are max_update_value * K / 2^31 = 1.1e-8, adapters are float32.
        assert relative_error(found, expected) < 5e-6
        unmasking = read_manifest(summed / f"private/server/round-000{round}/aggregate")[0].unmasking
        assert unmasking is not None
        assert (unmasking.survivors, unmasking.revealed, unmasking.count) == ([1, 2, 3], [1, 2, 3], 3)


def test_a_masked_update_says_nothing_of_how_it_was_trained(summed: Path) -> None:
    manifest = read_manifest(summed / "exchange/round-0001/client-2")[0]
    assert (manifest.examples, manifest.tokens, manifest.steps, manifest.metrics, manifest.seed) == (0, 0, 0, {}, None)
    own = read_manifest(summed / "private/client-2/round-0001/slm")[0]
    assert own.examples == 6 * 4


def test_run_given_again_changes_nothing(summed: Path) -> None:
    def stamps() -> dict[Path, int]:
        folders = [*summed.glob("exchange/round-*"), *summed.glob("private/*/round-*")]
        files = [path for folder in folders for path in folder.rglob("*") if path.suffix != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before = stamps()
    run(Workspace(summed), scores=False)
    assert stamps() == before


def test_run_overwrite_begins_a_new_federation_with_the_same_result(summed: Path) -> None:
    before = (summed / "exchange/federation.json").read_bytes()
    final = flat(summed / "private/server/round-0002/slm")
    run(Workspace(summed), scores=False, overwrite=True)
    assert (summed / "exchange/federation.json").read_bytes() != before
    assert everything_is_done(summed)
    assert verify(Workspace(summed)).rounds == [1, 2]
    # Masks are new, and the sum is the same to the bit: so is all that follows from it.
    assert np.array_equal(flat(summed / "private/server/round-0002/slm"), final)


@pytest.mark.parametrize("after", ["keys", "broadcast", "one client", "all clients", "close", "one reveal"])
def test_run_goes_on_from_wherever_the_commands_stopped(after: str, enrolled: Path, summed: Path) -> None:
    workspace = Workspace(enrolled)
    steps = ["keys", "broadcast", "one client", "all clients", "close", "one reveal"]
    done = steps[: steps.index(after) + 1]
    if "broadcast" in done:
        broadcast(workspace, round=1)
    for client in [1] * ("one client" in done) + [2, 3] * ("all clients" in done):
        client_train(workspace, client=client, round=1)
    if "close" in done:
        with pytest.raises(NotReady, match="round 1 waits for 3 more reveals, of client 1, 2, 3"):
            aggregate(workspace, round=1)
    if "one reveal" in done:
        reveal(workspace, client=2, round=1)
    before = {path: path.read_bytes() for path in (enrolled / "exchange").rglob("*.*")}
    run(workspace, scores=False)
    assert everything_is_done(enrolled)
    assert {path: path.read_bytes() for path in before} == before
    assert np.array_equal(
        flat(enrolled / "private/server/round-0002/slm"), flat(summed / "private/server/round-0002/slm")
    )


# --- weights


def weighted(folder: Path, most: int) -> Path:
    """Clients with 12, 8 and 4 rows, a pass over which they train on."""
    write_rows(folder / "private/client-2/train.jsonl", rows(8, start=24))
    write_rows(folder / "private/client-3/train.jsonl", rows(4, start=36))
    toml = folder / "fedcollm.toml"
    edit(toml, "[client_training]\nsteps = 6", "[client_training]\nepochs = 1.0")
    edit(toml, SECURE, f'{SECURE}weighting = "samples"\nmax_examples = {most}\n')
    enrol(Workspace(folder), renew=True)
    return folder


def test_a_client_that_trained_on_thrice_as_much_weighs_thrice(enrolled: Path) -> None:
    folder = weighted(enrolled, 12)
    run(Workspace(folder), scores=False, rounds=range(1, 2))
    found, expected = mean_of(folder, [12, 8, 4])
    assert relative_error(found, expected) < 5e-6
    assert relative_error(found, mean_of(folder, [1, 1, 1])[1]) > 1e-3
    for k in (1, 2, 3):  # and nobody says how much it has
        assert read_manifest(folder / f"exchange/round-0001/client-{k}")[0].examples == 0


def test_a_client_with_more_examples_than_agreed_is_refused_before_it_trains(enrolled: Path) -> None:
    folder = weighted(enrolled, 11)
    broadcast(Workspace(folder), round=1)
    with pytest.raises(
        BadNumbers, match=r"client 1 would train on 12 examples, aggregation.max_examples is 11"
    ) as caught:
        client_train(Workspace(folder), client=1, round=1)
    assert "max_examples = 12 or more" in (caught.value.mend or "")
    assert not (folder / "private/client-1/round-0001").exists()


# --- quorum, and updates that are damaged


def test_a_damaged_update_is_sent_again_as_it_was_and_the_round_ends(enrolled: Path) -> None:
    workspace, place = Workspace(enrolled), enrolled / "exchange/round-0001/client-2"
    broadcast(workspace, round=1)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    with pytest.raises(Refused, match=r"has sent its masked update .* which cannot be replaced") as caught:
        client_train(workspace, client=2, round=1, overwrite=True)
    assert caught.value.mend == "on the server, open the round again: fedcollm broadcast --round 1 --overwrite"
    sent = {path.name: path.read_bytes() for path in place.iterdir()}
    content = bytearray(sent["masked.safetensors"])
    content[-1] ^= 1
    (place / "masked.safetensors").write_bytes(content)
    with pytest.raises(Damaged, match=r"masked.safetensors is not the file its manifest names") as damaged:
        client_train(workspace, client=2, round=1)
    assert "--overwrite" in (damaged.value.mend or "")
    client_train(workspace, client=2, round=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == sent
    run(workspace, scores=False, rounds=range(1, 2))
    found, expected = mean_of(enrolled, [1, 1, 1])
    assert relative_error(found, expected) < 5e-6


def test_an_update_that_was_moved_away_is_sent_again_byte_for_byte_or_not_at_all(enrolled: Path) -> None:
    workspace, place = Workspace(enrolled), enrolled / "exchange/round-0001/client-2"
    broadcast(workspace, round=1)
    client_train(workspace, client=2, round=1)
    sent = {path.name: path.read_bytes() for path in place.iterdir()}
    for overwrite in (False, True):
        shutil.rmtree(place)
        client_train(workspace, client=2, round=1, overwrite=overwrite)
        assert {path.name: path.read_bytes() for path in place.iterdir()} == sent
    shutil.rmtree(place)
    shutil.rmtree(workspace.masked_update(1, 2))
    with pytest.raises(Refused, match="has masked its update of this opening of round 1 before") as caught:
        client_train(workspace, client=2, round=1)
    assert "fetch it back" in (caught.value.mend or "")
    assert not place.exists()


@pytest.mark.parametrize("sent", ["client-2", "reveal-2"])
def test_keys_put_back_from_an_older_copy_send_and_reveal_nothing(sent: str, enrolled: Path, tmp_path: Path) -> None:
    workspace, vault = Workspace(enrolled), vault_of(enrolled, "client-2")
    broadcast(workspace, round=1)
    if sent == "client-2":
        shutil.copytree(vault, tmp_path / "older")
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    with pytest.raises(NotReady):
        aggregate(workspace, round=1)
    if sent == "reveal-2":
        shutil.copytree(vault, tmp_path / "older")
        reveal(workspace, client=2, round=1)
    shutil.rmtree(vault)
    shutil.copytree(tmp_path / "older", vault)
    told = {path: path.read_bytes() for path in (enrolled / "exchange").rglob("*") if path.is_file()}
    for command in (client_train, reveal):
        with pytest.raises(Refused, match=rf"{sent} is client-2's own.* put back from an older copy") as caught:
            command(workspace, client=2, round=1)
        assert caught.value.exit_code == 5
    assert {path: path.read_bytes() for path in (enrolled / "exchange").rglob("*") if path.is_file()} == told


def test_what_a_client_remembers_is_changed_by_one_process_at_a_time(
    enrolled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process, of a copy of the workspace it may be, comes in between looking and remembering."""
    workspace = Workspace(enrolled)
    pool, waited = ThreadPoolExecutor(), list[Future[object]]()

    def meanwhile(place: object, name: str, command: Callable[[], object]) -> None:
        original = getattr(place, name)

        def call(*words: object, **named: object) -> object:
            monkeypatch.setattr(place, name, original)
            waited.append(pool.submit(command))
            with pytest.raises(TimeoutError):
                waited[-1].result(timeout=0.5)
            return original(*words, **named)

        monkeypatch.setattr(place, name, call)

    broadcast(workspace, round=1)
    for client in (1, 3):
        client_train(workspace, client=client, round=1)
    theta = read_artefact(workspace.broadcast(1))
    adapter = workspace.client_adapter(1, 2)
    meanwhile(masking, "mask", lambda: sending.send(Party.client(workspace, 2), theta, read_artefact(adapter)))
    sent = client_train(workspace, client=2, round=1)
    assert waited[0].result(timeout=60) == sent  # and no second mask
    with pytest.raises(NotReady, match="waits for"):
        aggregate(workspace, round=1)
    meanwhile(revealing, "_sealed", lambda: reveal(workspace, client=2, round=1))
    revealed = reveal(workspace, client=2, round=1)
    assert waited[1].result(timeout=60) == revealed
    run(workspace, scores=False, rounds=range(1, 2))


def test_a_broadcast_taken_while_the_client_trained_for_another_ends_the_latter(enrolled: Path) -> None:
    workspace = Workspace(enrolled)
    broadcast(workspace, round=1)
    client_train(workspace, client=2, round=1)
    theta, trained = read_artefact(workspace.broadcast(1)), read_artefact(workspace.client_adapter(1, 2))
    broadcast(workspace, round=1, overwrite=True)
    accepting.accept(Party.client(workspace, 2), read_artefact(workspace.broadcast(1)))
    with pytest.raises(Refused, match="client 2 has taken another broadcast of round 1"):
        sending.send(Party.client(workspace, 2), theta, trained)


def test_an_update_beyond_the_agreed_bound_is_not_sent(enrolled: Path) -> None:
    edit(enrolled / "fedcollm.toml", SECURE, f"{SECURE}max_update_value = 1e-6\n")
    enrol(Workspace(enrolled), renew=True)
    broadcast(Workspace(enrolled), round=1)
    with pytest.raises(BadNumbers) as caught:
        client_train(Workspace(enrolled), client=2, round=1)
    assert caught.value.exit_code == 6
    assert not (enrolled / "exchange/round-0001/client-2").exists()


# --- renewed


def test_a_close_of_an_earlier_roster_is_replaced_only_when_that_is_asked_for(summed: Path) -> None:
    workspace = Workspace(summed)
    enrol(workspace, renew=True)
    with pytest.raises(Refused, match=r"changed since: .*the roster"):
        broadcast(workspace, round=1)
    broadcast(workspace, round=1, overwrite=True)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1, overwrite=True)
    close = read_manifest(summed / "exchange/round-0001/close")[1]
    with pytest.raises(Damaged, match=r"signed with key_id .*; server has"):
        aggregate(workspace, round=1)
    assert read_manifest(summed / "exchange/round-0001/close")[1] == close
    warnings: list[str] = []
    with pytest.raises(NotReady, match="round 1 waits for 3 more reveals, of client 1, 2, 3"):
        aggregate(workspace, round=1, overwrite=True, report=lambda event: warnings.append(event.text))
    assert "client 1's reveal is of another roster, and is passed over" in warnings
    for client in (1, 2, 3):
        reveal(workspace, client=client, round=1)
    aggregate(workspace, round=1, overwrite=True)
    found, expected = mean_of(summed, [1, 1, 1])
    assert relative_error(found, expected) < 5e-6


# --- derived


@pytest.mark.parametrize(("method", "mode"), [("fedavg", "secure"), ("standalone", "plain"), ("centralized", "plain")])
def test_a_baseline_of_a_secure_federation_is_secure_where_it_averages(method: str, mode: str, enrolled: Path) -> None:
    workspace = Workspace(enrolled)
    run(workspace, method=method, scores=False, rounds=range(1, 2))  # type: ignore[arg-type]
    derived = Workspace(enrolled / "baselines" / method)
    assert derived.agreement.aggregation.mode == mode
    assert derived.federation.exists() == (mode == "secure")
    assert (derived.root / "exchange/round-0001/close").exists() == (mode == "secure")
    verified = verify(derived)
    assert verified.signatures == (verified.folders if mode == "secure" else 0)
    if mode == "secure":  # keys of its own
        assert derived.federation.read_bytes() != workspace.federation.read_bytes()
        assert derived.secrets == workspace.secrets


def test_fedavg_from_the_beginning_can_be_secure(tmp_path: Path, base_models: Path) -> None:
    from builders import make_workspace

    folder = with_keys(make_workspace(tmp_path / "average", base_models), tmp_path / "own keys")
    (folder / "fedcollm.toml").write_text(agreement(method="fedavg", rounds=1))
    run(Workspace(folder), scores=False)
    assert everything_is_done(folder)
    assert relative_error(*mean_of(folder, [1, 1, 1])) < 5e-6


# --- plain mode with keys


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> tuple[Path, Path]:
    from builders import make_workspace

    top = tmp_path_factory.mktemp("plain")
    folder = with_keys(make_workspace(top / "study", base_models), top / "keys")
    enrol(Workspace(folder))
    run(Workspace(folder), scores=False)
    return folder, top / "keys"


@pytest.fixture
def signed(signed_once: tuple[Path, Path], tmp_path: Path) -> Path:
    return copied(signed_once, tmp_path / "signed")


def test_plain_mode_with_keys_gives_the_same_adapters_signed(signed: Path, finished: Path) -> None:
    assert everything_is_done(signed)
    for path in finished.rglob(WEIGHTS):
        name = path.relative_to(finished)
        assert (signed / name).read_bytes() == path.read_bytes(), name
        assert (signed / name).with_name("manifest.json.sig").exists()
        assert not path.with_name("manifest.json.sig").exists()


def test_in_plain_mode_with_keys_clients_follow_a_new_attempt_and_earlier_updates_count_no_more(signed: Path) -> None:
    workspace = Workspace(signed)
    shutil.rmtree(signed / "exchange/round-0002")
    for round in (1, 2):
        shutil.rmtree(signed / f"private/server/round-000{round}")
    broadcast(workspace, round=1, overwrite=True)
    manifest = json.loads((signed / "exchange/round-0001/broadcast/manifest.json").read_text())
    assert (manifest["attempt"], manifest["opening"]) == (1, None)
    found = status(workspace).rounds[0].steps
    assert {
        step.name: (step.condition, step.reason, str(step.command)) for step in found if step.name == "client-2"
    } == {
        "client-2": ("missing", "is of an earlier attempt at the round", "fedcollm client-train --client 2 --round 1")
    }
    with pytest.raises(NotReady, match="round 1 has 0 of the 3 updates it needs; absent: client 1, 2, 3"):
        aggregate(workspace, round=1)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
        assert read_manifest(workspace.client_update(1, client))[0].attempt == 1
    run(workspace, scores=False, rounds=range(1, 2))
    broadcast(workspace, round=2, overwrite=True)  # it follows from another round 1 than clients have seen
    run(workspace, scores=False)
    assert everything_is_done(signed)
    assert verify(workspace).rounds == [1, 2]


def test_an_update_without_keys_is_refused_where_there_are_keys(signed: Path, finished: Path) -> None:
    place = signed / "exchange/round-0001/client-2"
    shutil.rmtree(place)
    shutil.copytree(finished / "exchange/round-0001/client-2", place)
    shutil.rmtree(signed / AGGREGATE)
    with pytest.raises(NotReady, match=r"manifest.json.sig is not there"):
        aggregate(Workspace(signed), round=1)
    assert not (signed / AGGREGATE).exists()
