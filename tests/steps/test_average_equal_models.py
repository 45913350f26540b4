"""FedMKT with aggregation.average: clients of one model are averaged after each round, and begin the next alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders import AVERAGE, EQUAL_ROWS, Outcome, adapters, edit, make_unlike_workspace, rows, scale, sign, write_rows
from stages.aggregate import aggregate
from stages.align_party import align_party
from stages.artefacts.reading import read_manifest
from stages.broadcast import broadcast
from stages.client_distill import client_distill
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.federation.next import next as step
from stages.progress.status import status
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.runtime.events import Event
from stages.share_knowledge import share_knowledge
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace
from stages.workspace.settings import parse

CLIENTS = (1, 2, 3)
WEIGHTS = "adapter_model.safetensors"


def place(round: int, client: int) -> str:
    return f"exchange/round-{round:04d}/adapter-client-{client}"


def until_the_average(folder: Path, round: int, clients: tuple[int, ...] = CLIENTS) -> Workspace:
    """A round by the separate commands, up to what is averaged."""
    workspace = Workspace(folder)
    broadcast(workspace, round=round)
    if round == 1:
        for party in (None, *CLIENTS):
            align_party(workspace, client=party)
    for client in CLIENTS:
        client_train(workspace, client=client, round=round)
        share_knowledge(workspace, client=client, round=round)
    co_distill(workspace, round=round)
    share_knowledge(workspace, server=True, round=round)
    for client in clients:
        client_distill(workspace, client=client, round=round)
    return workspace


def weighted_mean(folder: Path, round: int, weights: dict[int, int]) -> dict[str, np.ndarray]:
    """Sum of n_k theta_k over sum of n_k, in float64, rounded once."""
    sent = {k: load_file(folder / place(round, k) / WEIGHTS) for k in weights}
    total = sum(weights.values())
    return {
        name: (sum(n * sent[k][name].astype(np.float64) for k, n in weights.items()) / total).astype(np.float32)
        for name in sent[next(iter(weights))]
    }


def go_on(workspace: Workspace, until: str) -> None:
    """Give each next command of this machine's, until that is this one."""
    while (command := str(status(workspace).next_command)) != until:
        assert step(workspace), command


def own_tokens(start: int, count: int) -> int:
    """Of a client's own rows: a token for each character of an answer."""
    return sum(len(row["completion"]) for row in rows(count, start=start))


def assert_is(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = load_file(folder / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


def test_a_run_leaves_what_the_separate_commands_and_next_leave(
    equal_once: Path, equal_folder: Path, tmp_path: Path
) -> None:
    by_next = shutil.copytree(equal_folder, tmp_path / "by next", symlinks=True)
    for round in (1, 2):
        aggregate(until_the_average(equal_folder, round), round=round)
    assert adapters(equal_folder) == adapters(equal_once)
    given = []
    while (found := status(Workspace(by_next)).next_command) and found.verb != "evaluate":
        given.append(str(step(Workspace(by_next))).removeprefix("fedcollm "))
    assert given[-1] == "aggregate --round 2"
    assert given.index("aggregate --round 1") == given.index("client-distill --client 3 --round 1") + 1
    assert given.index("broadcast --round 2") == given.index("aggregate --round 1") + 1
    assert adapters(by_next).items() >= adapters(equal_once).items()
    assert all(one.is_done for one in status(Workspace(by_next), verify=True).rounds)


def test_the_average_is_the_mean_weighted_by_each_clients_own_examples(equal: Path) -> None:
    for round in (1, 2):
        average = equal / f"private/server/round-{round:04d}/aggregate"
        assert_is(average, weighted_mean(equal, round, EQUAL_ROWS))
        manifest, _ = read_manifest(average)
        assert manifest.examples == sum(EQUAL_ROWS.values())
        assert manifest.tokens == sum(own_tokens(12 * client, count) for client, count in EQUAL_ROWS.items())
        assert set(manifest.parents) == {"broadcast", *(f"adapter-client-{client}" for client in CLIENTS)}


def test_any_other_rule_takes_the_mean_s_place(equal_folder: Path) -> None:
    edit(equal_folder / "fedcollm.toml", 'weighting = "samples"', 'rule = "median"')
    aggregate(until_the_average(equal_folder, 1), round=1)
    sent = [load_file(equal_folder / place(1, k) / WEIGHTS) for k in CLIENTS]
    middle = {name: np.median([one[name] for one in sent], axis=0).astype(np.float32) for name in sent[0]}
    assert_is(equal_folder / "private/server/round-0001/aggregate", middle)


def test_a_gate_loads_the_slm_and_keeps_the_broadcast_where_the_average_is_worse(equal: Path) -> None:
    folder = equal / "private/server/round-0002"
    shutil.rmtree(folder / "aggregate")
    write_rows(equal / "private/server/held-out.jsonl", rows(12))
    for client in CLIENTS:
        scale(equal / place(2, client), -30.0)
    metrics = aggregate(Workspace(equal), round=2, gate=1e-9).metrics
    assert metrics["gate_after"] > metrics["gate_before"]
    assert metrics["gate_kept"] == 1
    kept = folder / "aggregate" / WEIGHTS
    assert kept.read_bytes() == (equal / "exchange/round-0002/broadcast" / WEIGHTS).read_bytes()


def test_a_round_begins_with_the_average_of_the_one_before(equal: Path) -> None:
    average = equal / "private/server/round-0001/aggregate"
    sent = equal / "exchange/round-0002/broadcast"
    assert (sent / WEIGHTS).read_bytes() == (average / WEIGHTS).read_bytes()
    assert read_manifest(sent)[0].parents == {"aggregate": read_manifest(average)[1]}
    for client in CLIENTS:
        trained, digest = read_manifest(equal / f"private/client-{client}/round-0002/trained")
        assert trained.parents == {"broadcast": read_manifest(sent)[1]}
        parents = read_manifest(equal / place(2, client))[0].parents
        assert (parents["trained"], parents["broadcast"]) == (digest, read_manifest(sent)[1])


def test_what_an_adapter_claims_of_privacy_is_carried_to_the_server(equal: Path) -> None:
    folder = equal / "private/client-1/round-0002/trained"
    claim = {"unit": "example", "epsilon": 2.0, "delta": 1e-5}
    sign(folder, privacy=claim)
    shutil.rmtree(equal / place(2, 1))
    share_knowledge(Workspace(equal), client=1, round=2, overwrite=True)
    co_distill(Workspace(equal), round=2, overwrite=True)
    share_knowledge(Workspace(equal), server=True, round=2, overwrite=True)
    told = client_distill(Workspace(equal), client=1, round=2).privacy
    assert told is not None
    assert (told.epsilon, told.delta) == (2.0, 1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("old", "new", "mend"),
    [
        ("[client_training]", "[clients.2.slm]\nmodel = 'models/slm-2'\n[client_training]", "[clients.2.slm]"),
        ('method = "fedmkt"', 'method = "llm2slm"', "is for method fedmkt, here is llm2slm"),
        ('method = "fedmkt"', 'method = "standalone-public"', "is for method fedmkt, here is standalone-public"),
        ('method = "fedmkt"\n', "", "is for method fedmkt, here is fedcollm"),
        ("average = true", "average = true\nmax_update_norm = 1.0", 'rule = "clipped-mean"'),
        (
            "average = true",
            'average = true\nmode = "secure"\nmax_examples = 99',
            "mode secure hides what each",
        ),
        ("average = true", 'average = true\nrule = "krum"\noutliers = 1', "weighting samples is for means"),
    ],
)
def test_an_agreement_that_cannot_be_averaged_is_refused_with_the_mend(
    equal_folder: Path, old: str, new: str, mend: str
) -> None:
    toml = equal_folder / "fedcollm.toml"
    edit(toml, old, new)
    with pytest.raises(UsageProblem) as refused:
        Workspace(equal_folder).agreement  # noqa: B018
    assert mend in str(refused.value)
    assert str(toml) in str(refused.value.where)


def test_a_learning_rate_of_its_own_makes_no_unlike_model(equal_folder: Path) -> None:
    toml = equal_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + "[clients.2]\nlearning_rate = 1e-3\n")
    workspace = Workspace(equal_folder)
    assert workspace.agreement.averages
    assert workspace.of_client(2).client_update(1, 2) == equal_folder / place(1, 2)


def test_unlike_models_are_refused_before_anything_is_trained(unlike_models: Path, tmp_path: Path) -> None:
    folder = make_unlike_workspace(tmp_path / "unlike", unlike_models)
    edit(folder / "fedcollm.toml", "[distillation]", f"{AVERAGE}[distillation]")
    with pytest.raises(UsageProblem, match=r"aggregation.average takes clients of one model: take out the table"):
        align_party(Workspace(folder), client=1)
    assert not (folder / "exchange").exists()


def test_an_adapter_of_another_broadcast_or_of_other_knowledge_is_refused_by_name(equal: Path) -> None:
    average = equal / "private/server/round-0002/aggregate"
    shutil.rmtree(average)
    manifest = json.loads((equal / place(2, 2) / "manifest.json").read_text())
    for parent, said, begins in (
        ("broadcast", "another broadcast", "client-train"),
        ("server", "another knowledge of the server's", "client-distill"),
    ):
        sign(equal / place(2, 2), parents=manifest["parents"] | {parent: "0" * 64})
        with pytest.raises(Refused, match=f"client 2's update of round 2 was trained from {said}") as refused:
            aggregate(Workspace(equal), round=2)
        assert f"{begins} --client 2 --round 2 --overwrite" in str(refused.value.mend)
    assert not average.exists()


def test_a_client_that_trained_from_another_broadcast_is_told_before_it_tells_or_learns(equal: Path) -> None:
    workspace, steps = Workspace(equal), (share_knowledge, client_distill)
    sign(equal / "exchange/round-0002/broadcast", seed=99)
    for take in steps:
        with pytest.raises(Refused, match="client 2 has trained in round 2 from another broadcast") as refused:
            take(workspace, client=2, round=2, overwrite=True)
        assert refused.value.mend == "fedcollm client-train --client 2 --round 2 --overwrite"
    client_train(workspace, client=2, round=2, overwrite=True)
    for take in steps:
        take(workspace, client=2, round=2, overwrite=True)
    sent, _ = read_manifest(equal / place(2, 2))
    assert sent.parents["broadcast"] == read_manifest(workspace.broadcast(2))[1]


@pytest.mark.parametrize(
    ("claimed", "said"),
    [
        ({"own_examples": 1e18}, "says it saw more than 1099511627776 examples or tokens"),
        ({"own_examples": 0.0}, "says it saw no examples"),
        ({"own_examples": 0.5}, "does not tell own_examples as a whole number"),
        ({"own_examples": -3.0}, "does not tell own_examples as a whole number"),
        ({"own_examples": None}, "does not tell own_examples as a whole number"),
        ({"own_tokens": 1e18}, "says it saw more than 1099511627776 examples or tokens"),
        ({"own_tokens": 0.5}, "does not tell own_tokens as a whole number"),
        ({"own_tokens": None}, "does not tell own_tokens as a whole number"),
    ],
)
def test_an_adapter_has_to_say_how_much_of_its_own_its_client_saw(
    equal: Path, claimed: dict[str, float | None], said: str
) -> None:
    shutil.rmtree(equal / "private/server/round-0002/aggregate")
    metrics = json.loads((equal / place(2, 2) / "manifest.json").read_text())["metrics"] | claimed
    sign(equal / place(2, 2), metrics={name: value for name, value in metrics.items() if value is not None})
    with pytest.raises(Refused, match=f"client 2's update of round 2 {said}") as refused:
        aggregate(Workspace(equal), round=2)
    assert "client-distill --client 2 --round 2 --overwrite" in str(refused.value.mend)


# --- absent, late, stale


def test_a_quorum_is_averaged_and_who_comes_late_is_told_and_begins_the_next_round(equal_folder: Path) -> None:
    edit(equal_folder / "fedcollm.toml", "average = true", "average = true\nmin_clients = 2")
    events: list[Event] = []
    workspace = until_the_average(equal_folder, 1, clients=(1,))
    with pytest.raises(NotReady, match="round 1 has 1 of the 2 updates it needs; absent: client 2, 3") as absent:
        aggregate(workspace, round=1)
    assert "client-distill --client 2 --round 1" in str(absent.value.mend)
    waits = status(workspace, party="server").waiting_for
    assert waits == "the adapter of 1 of clients 2 and 3, round 1 (exchange/round-0001/adapter-client-2, ...)"
    client_distill(workspace, client=3, round=1)
    aggregate(workspace, round=1, report=events.append)
    assert [one.text for one in events if one.kind == "warning"] == ["averaging 2 of 3 clients; absent: client 2"]
    assert_is(equal_folder / "private/server/round-0001/aggregate", weighted_mean(equal_folder, 1, {1: 12, 3: 8}))
    assert str(status(workspace).next_command) == "fedcollm broadcast --round 2"
    client_distill(workspace, client=2, round=1)
    assert status(workspace).rounds[0].late == [2]
    broadcast(workspace, round=2)
    assert str(status(workspace, party="client-2").next_command) == "fedcollm client-train --client 2 --round 2"


def test_knowledge_too_late_for_the_llm_and_an_adapter_too_late_for_the_average_are_two_things(
    equal_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(equal_folder / "fedcollm.toml", "average = true", "average = true\nmin_clients = 2")
    workspace = Workspace(equal_folder)
    broadcast(workspace, round=1)
    for party in (None, *CLIENTS):
        align_party(workspace, client=party)
    for client in CLIENTS:
        client_train(workspace, client=client, round=1)
    for client in (1, 3):
        share_knowledge(workspace, client=client, round=1)
    co_distill(workspace, round=1)
    share_knowledge(workspace, server=True, round=1)
    share_knowledge(workspace, client=2, round=1)  # too late for the LLM
    for client in (2, 3):
        client_distill(workspace, client=client, round=1)
    aggregate(workspace, round=1)
    average, _ = read_manifest(workspace.aggregate(1))
    assert set(average.parents) == {"broadcast", "adapter-client-2", "adapter-client-3"}
    client_distill(workspace, client=1, round=1)  # too late for the average
    found = status(workspace).rounds[0]
    assert (found.unheard, found.late) == ([2], [1])
    shown = fedcollm("status", "-w", equal_folder).out.splitlines()
    assert [line.strip() for line in shown if line.startswith("  late")] == [
        "late, not learned from by the LLM: client 2",
        "late, not in the aggregate: client 1",
    ]


def test_a_client_that_was_absent_for_all_of_round_one_tells_how_it_reads_and_takes_part_in_round_two(
    equal_folder: Path,
) -> None:
    edit(equal_folder / "fedcollm.toml", "average = true", "average = true\nmin_clients = 2")
    workspace, vocabulary = Workspace(equal_folder), equal_folder / "exchange/round-0001/vocabulary-client-2"
    away = shutil.move(equal_folder / "private/client-2", equal_folder / "away")
    go_on(workspace, "fedcollm client-train --client 1 --round 2")
    assert status(workspace).rounds[0].is_done
    shutil.move(away, equal_folder / "private/client-2")
    given = [str(step(workspace, party="client-2")).removeprefix("fedcollm ") for _ in range(3)]
    assert given == ["align --client 2", "client-train --client 2 --round 2", "share-knowledge --client 2 --round 2"]
    for client in (1, 3):
        client_train(workspace, client=client, round=2)
        share_knowledge(workspace, client=client, round=2)
    elsewhere = [shutil.move(equal_folder / "private/client-2", away), shutil.move(vocabulary, equal_folder / "kept")]
    assert status(workspace, party="server").waiting_for == "the vocabulary of client 2, in exchange/"
    shutil.move(elsewhere[0], equal_folder / "private/client-2")
    shutil.move(elsewhere[1], vocabulary)
    go_on(workspace, "fedcollm evaluate --round 2 --model llm")
    assert_is(equal_folder / "private/server/round-0002/aggregate", weighted_mean(equal_folder, 2, EQUAL_ROWS))


def test_of_a_new_attempt_a_quorum_is_enough_and_what_is_of_the_earlier_one_is_made_again(equal_folder: Path) -> None:
    edit(equal_folder / "fedcollm.toml", "average = true", "average = true\nmin_clients = 2")
    workspace = until_the_average(equal_folder, 1)
    sign(equal_folder / "exchange/round-0001/broadcast", attempt=1)

    def again(*clients: int) -> None:
        for client in clients:
            client_train(workspace, client=client, round=1)
            share_knowledge(workspace, client=client, round=1, overwrite=True)
        co_distill(workspace, round=1, overwrite=True)
        share_knowledge(workspace, server=True, round=1, overwrite=True)
        for client in clients:
            client_distill(workspace, client=client, round=1)

    again(1, 3)
    found = {one.name: one for one in status(workspace).rounds[0].steps}["slm-2"]
    assert (found.condition, found.reason) == ("missing", "is of an earlier attempt at the round")
    assert str(found.command) == "fedcollm client-distill --client 2 --round 1"
    assert step(workspace, party="server") == Command("aggregate", round=1)
    average, _ = read_manifest(workspace.aggregate(1))
    assert set(average.parents) == {"broadcast", "adapter-client-1", "adapter-client-3"}
    again(2)
    assert [read_manifest(equal_folder / place(1, k))[0].attempt for k in CLIENTS] == [1, 1, 1]


def test_a_client_trained_anew_makes_the_average_and_the_next_round_stale(equal: Path) -> None:
    def stale(round: int) -> dict[str, str]:
        found = status(Workspace(equal)).rounds[round - 1].steps
        return {one.name: one.reason for one in found if one.condition != "done"}

    write_rows(equal / "private/client-2/train.jsonl", rows(9, start=40))
    workspace = Workspace(equal)
    client_train(workspace, client=2, round=1, overwrite=True)
    share_knowledge(workspace, client=2, round=1, overwrite=True)
    co_distill(workspace, round=1, overwrite=True)
    share_knowledge(workspace, server=True, round=1, overwrite=True)
    assert set(stale(1)) == {"slm-1", "slm-2", "slm-3"}
    for client in CLIENTS:
        client_distill(workspace, client=client, round=1, overwrite=True)
    assert stale(1) == {"aggregate": "made from another adapter-client-1, adapter-client-2, adapter-client-3"}
    aggregate(workspace, round=1, overwrite=True)
    assert stale(1) == {}
    assert stale(2)["broadcast"] == "made from another aggregate"


def test_a_damaged_adapter_is_named_and_no_average_is_made(equal: Path) -> None:
    shutil.rmtree(equal / "private/server/round-0002/aggregate")
    (equal / place(2, 3) / WEIGHTS).write_bytes(b"")
    found = {one.name: one for one in status(Workspace(equal), verify=True).rounds[1].steps}
    assert found["slm-3"].condition in ("damaged", "missing")
    with pytest.raises(Exception, match=WEIGHTS):
        aggregate(Workspace(equal), round=2)


def test_without_the_option_nothing_is_averaged(equal_folder: Path) -> None:
    text = (equal_folder / "fedcollm.toml").read_text().replace("average = true\n", "")
    agreement = parse(Agreement, text.encode(), equal_folder / "fedcollm.toml")
    assert not agreement.averages
    assert agreement.broadcasts(1)
    assert not agreement.broadcasts(2)
