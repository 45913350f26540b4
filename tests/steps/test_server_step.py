"""aggregate with aggregation.server: steps over rounds, by hand; what is remembered, kept, and refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import Outcome, adapters, edit, make_workspace, published, rows, scale, sign, write_rows
from damages import problems, tensors_of
from federations import agreement, enrol, with_keys
from stages.aggregate import aggregate
from stages.artefacts.manifest import Manifest
from stages.audit.audit import audit
from stages.audit.verify import verify
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.export.export import export
from stages.federation.run import run
from stages.progress.status import status
from stages.report.charts import Chart
from stages.report.drawing import draw
from stages.report.knowledge_figures import figures_of
from stages.reveal import reveal
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Problem, Refused
from stages.workspace.paths import Workspace

FEDADAM = 'server = "fedadam"\nserver_learning_rate = 0.05\nbeta_1 = 0.8\nbeta_2 = 0.7\ntau = 0.01\n'
STATE = "server_state.safetensors"
CLIENTS = (1, 2, 3)


def agreed(folder: Path, lines: str = FEDADAM, *, method: str = "fedavg", rounds: int = 3) -> Workspace:
    """Set what stands under [aggregation], and the method."""
    toml = folder / "fedcollm.toml"
    edit(toml, "rounds = 2\nseed = 7", f'rounds = {rounds}\nseed = 7\nmethod = "{method}"')
    edit(toml, "[distillation]", f"[aggregation]\n{lines}\n[distillation]")
    return Workspace(folder)


def sha256_of(folder: Path) -> str:
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def mean_of(workspace: Workspace, clients: Sequence[int] = CLIENTS) -> dict[str, np.ndarray]:
    """What these clients sent in round 1, averaged in float64."""
    updates = [tensors_of(workspace.client_update(1, k)) for k in clients]
    return {name: sum(one[name].astype(np.float64) for one in updates) / len(updates) for name in updates[0]}


def one_round(workspace: Workspace, round: int, clients: Sequence[int] = CLIENTS) -> Manifest:
    """The steps of FedAvg."""
    broadcast(workspace, round=round)
    for client in clients:
        client_train(workspace, client=client, round=round)
    return aggregate(workspace, round=round)


def remembered(workspace: Workspace, round: int) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((workspace.aggregate(round) / STATE).read_bytes())


@pytest.fixture
def trained(workspace_folder: Path) -> Workspace:
    """Two rounds of FedAvg with FedAdam at the server."""
    workspace = agreed(workspace_folder)
    for round in (1, 2):
        one_round(workspace, round)
    return workspace


def fedadam(workspace: Workspace, round: int, m: dict[str, np.ndarray], v: dict[str, np.ndarray]) -> None:
    """One round by Algorithm 2 in float64, from the files of the round; m and v are those before, and then after."""
    theta = tensors_of(workspace.broadcast(round))
    updates = [tensors_of(workspace.client_update(round, k)) for k in CLIENTS]
    for name, old in theta.items():
        delta = sum(update[name].astype(np.float64) for update in updates) / 3 - old
        m[name] = 0.8 * m[name] + 0.2 * delta
        v[name] = 0.7 * v[name] + 0.3 * delta**2
        expected = old + 0.05 * m[name] / (np.sqrt(v[name]) + 0.01)
        # the mean was cut to float32: 6e-8 of 0.5 in delta, and 0.05 / 0.01 times that in the step
        np.testing.assert_allclose(tensors_of(workspace.aggregate(round))[name], expected, atol=2e-6, rtol=1e-6)
        np.testing.assert_allclose(remembered(workspace, round)[f"m/{name}"], m[name], atol=1e-7, rtol=1e-5)
        np.testing.assert_allclose(remembered(workspace, round)[f"v/{name}"], v[name], atol=1e-7, rtol=1e-5)


def test_rounds_follow_each_other_by_the_papers_formulas_and_the_chain_names_them(trained: Workspace) -> None:
    theta = tensors_of(trained.broadcast(1))
    m, v = ({name: np.full(tensor.shape, value) for name, tensor in theta.items()} for value in (0.0, 0.01**2))
    for round in (1, 2):
        fedadam(trained, round, m, v)
    manifests = [json.loads((trained.aggregate(round) / "manifest.json").read_text()) for round in (1, 2)]
    assert STATE in manifests[0]["files"]
    assert "aggregate" not in manifests[0]["parents"]
    first = sha256_of(trained.aggregate(1))
    assert manifests[1]["parents"]["aggregate"] == first
    assert manifests[1]["metrics"]["server/fedadam"] == 1.0
    assert not problems(audit([trained.root]))
    assert verify(trained).rounds == [1, 2]
    assert all(step.condition == "done" for round in status(trained).rounds[:2] for step in round.steps)


def test_another_state_of_the_round_before_makes_an_aggregate_stale(trained: Workspace) -> None:
    sign(trained.aggregate(1), examples=1)
    [found] = [step for step in status(trained).rounds[1].steps if step.name == "aggregate"]
    assert (found.condition, found.changed) == ("stale", ("aggregate",))


def test_numbers_near_zero_are_no_finding(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, 'server = "fedadam"\ntau = 1e-8\nserver_learning_rate = 1e6\n')
    broadcast(workspace, round=1)
    theta = tensors_of(workspace.broadcast(1))
    for client in CLIENTS:
        client_train(workspace, client=client, round=1)
        update = workspace.client_update(1, client)
        near = {name: tensor + np.float32(1e-42) for name, tensor in theta.items()}
        (update / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(near, metadata={"format": "pt"}))
        sign(update)
    aggregate(workspace, round=1)
    assert not [line for line in problems(audit([workspace.root])) if line.startswith("A12")]


def test_the_state_stays_at_the_server(trained: Workspace) -> None:
    broadcast(trained, round=3)
    assert {path.name for path in trained.broadcast(3).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    assert not list(trained.exchange.rglob(STATE))


def test_fedavgm_without_momentum_at_rate_1_gives_the_mean(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, 'server = "fedavgm"\nserver_momentum = 0.0\nserver_learning_rate = 1.0\n')
    one_round(workspace, 1)
    found, expected = tensors_of(workspace.aggregate(1)), mean_of(workspace)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name].astype(np.float32))


def test_momentum_goes_on_where_clients_stand_still(workspace_folder: Path) -> None:
    """Every client sends round 2's broadcast back: the mean change is 0, and the step is beta times the last one."""
    workspace = agreed(workspace_folder, 'server = "fedavgm"\nserver_momentum = 0.5\n')
    one_round(workspace, 1)
    broadcast(workspace, round=2)
    for client in CLIENTS:
        client_train(workspace, client=client, round=2)
        update = workspace.client_update(2, client)
        shutil.copy(workspace.broadcast(2) / "adapter_model.safetensors", update)
        sign(update)
    aggregate(workspace, round=2)
    start, first, second = (
        tensors_of(place) for place in (workspace.broadcast(1), workspace.aggregate(1), workspace.aggregate(2))
    )
    for name in start:
        np.testing.assert_allclose(second[name], first[name] + 0.5 * (first[name] - start[name]), atol=1e-7)


@pytest.mark.parametrize("rule", ["median", "clipped-mean", "geometric-median"])
def test_it_steps_along_what_any_rule_makes(rule: str, workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, f'rule = "{rule}"\nserver = "fedavgm"\nserver_momentum = 0.0\n')
    stepped = one_round(workspace, 1)
    found = tensors_of(workspace.aggregate(1))
    shutil.rmtree(workspace.aggregate(1))
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, 'server = "fedavgm"\nserver_momentum = 0.0\n', "")
    sha256 = hashlib.sha256(toml.read_bytes()).hexdigest()
    sign(workspace.broadcast(1), agreement_sha256=sha256)
    begun = sha256_of(workspace.broadcast(1))
    for client in CLIENTS:
        sign(workspace.client_update(1, client), agreement_sha256=sha256, parents={"broadcast": begun})
    aggregate(Workspace(workspace_folder), round=1)
    expected = tensors_of(workspace.aggregate(1))
    assert stepped.metrics[f"rule/{rule}"] == 1.0
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_with_a_quorum_it_steps_along_the_mean_of_those_present(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, f"min_clients = 2\n{FEDADAM}")
    one_round(workspace, 1, clients=(1, 3))
    mean, theta = mean_of(workspace, (1, 3)), tensors_of(workspace.broadcast(1))
    for name in theta:
        np.testing.assert_allclose(remembered(workspace, 1)[f"m/{name}"], 0.2 * (mean[name] - theta[name]), atol=1e-7)


def test_what_is_handed_on_is_the_adapter_alone_and_its_card_names_the_optimiser(trained: Workspace) -> None:
    export(trained, round=2, model="aggregate")
    place = trained.export(2, "aggregate", merged=False)
    assert not (place / STATE).exists()
    assert "a step towards it by fedadam, which remembers earlier rounds" in (place / "README.md").read_text()


def test_the_report_draws_how_far_the_server_went(trained: Workspace) -> None:
    [figure] = [one for one in figures_of(trained, "acc") if one.name == "server-step"]
    drawn = draw(figure, trained)
    assert isinstance(drawn, Chart)
    said = [json.loads((trained.aggregate(round) / "manifest.json").read_text())["metrics"] for round in (1, 2)]
    assert {(row["what"], row["round"]): row["norm"] for row in drawn.rows} == {
        (what, round): metrics[name]
        for round, metrics in enumerate(said, 1)
        for name, what in (("delta_norm", "the clients' update"), ("step_norm", "the server's step"))
    }


def test_what_is_compared_says_that_all_have_the_optimiser(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    workspace = agreed(workspace_folder, rounds=1)
    run(workspace)
    run(workspace, method="standalone")
    outcome = fedcollm("compare", "--methods", "standalone,fedavg", "-w", workspace_folder)
    assert outcome.code == 0, outcome.err
    said = "in every method that averages, the server takes steps of fedadam: aggregation.server"
    assert said in " ".join(outcome.out.split())
    assert Workspace(workspace.baseline("standalone")).agreement.aggregation.server == "none"


# --- no step


def test_the_gate_that_keeps_the_old_adapter_lets_the_optimiser_forget_the_round(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder)
    write_rows(workspace.held_out_data, rows(20, start=80))
    one_round(workspace, 1)
    broadcast(workspace, round=2)
    for client in CLIENTS:
        client_train(workspace, client=client, round=2)
        scale(workspace.client_update(2, client), -40)
    kept = aggregate(workspace, round=2, gate=0.0)
    assert kept.metrics["gate_kept"] == 1.0
    assert tensors_of(workspace.aggregate(2)).keys() == tensors_of(workspace.broadcast(2)).keys()
    assert (workspace.aggregate(2) / STATE).read_bytes() == (workspace.aggregate(1) / STATE).read_bytes()
    assert not [line for line in problems(audit([workspace.root])) if line.startswith("A12")]
    one_round(workspace, 3)
    assert (workspace.aggregate(3) / STATE).read_bytes() != (workspace.aggregate(1) / STATE).read_bytes()


@pytest.mark.parametrize("round", [1, 2])
def test_a_round_that_is_given_up_leaves_the_state_as_it_was(round: int, workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder)
    if round == 2:
        one_round(workspace, 1)
    broadcast(workspace, round=round)
    aggregate(workspace, round=round, keep_old=True)
    if round == 2:
        assert (workspace.aggregate(2) / STATE).read_bytes() == (workspace.aggregate(1) / STATE).read_bytes()
    else:  # nothing is remembered yet: m is 0 and v is tau^2
        state = remembered(workspace, 1)
        assert {float(number) for name in state for number in np.unique(state[name]) if name.startswith("m/")} == {0.0}
        np.testing.assert_allclose(state["v/" + min(tensors_of(workspace.broadcast(1)))], 1e-4, rtol=1e-6)
    assert "already done" in str(_notes(workspace, round))
    one_round(workspace, round + 1)
    assert not [line for line in problems(audit([workspace.root])) if " FAIL " in line or line.startswith("A12")]


def _notes(workspace: Workspace, round: int) -> list[str]:
    said: list[str] = []
    aggregate(workspace, round=round, keep_old=True, report=lambda event: said.append(event.text))
    return said


# --- again


def test_what_is_made_again_has_the_same_bytes(trained: Workspace) -> None:
    before = adapters(trained.root)
    for round in (1, 2):
        aggregate(trained, round=round, overwrite=True)
    assert adapters(trained.root) == before
    shutil.rmtree(trained.aggregate(2))
    aggregate(trained, round=2)
    assert adapters(trained.root) == before


# --- what is refused


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def of_another_shape(folder: Path) -> None:
    state = safetensors.numpy.load((folder / STATE).read_bytes())
    name = min(state)
    state[name] = state[name][:-1].copy()
    (folder / STATE).write_bytes(safetensors.numpy.save(state, metadata={"format": "pt"}))
    sign(folder)


def not_finite(folder: Path) -> None:
    state = safetensors.numpy.load((folder / STATE).read_bytes())
    name = min(state)
    state[name] = np.full_like(state[name], np.nan)
    (folder / STATE).write_bytes(safetensors.numpy.save(state, metadata={"format": "pt"}))
    sign(folder)


def unnamed(folder: Path) -> None:
    (folder / STATE).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][STATE]
    (folder / "manifest.json").write_text(json.dumps(manifest))


AGAIN = "aggregate --round 1 --overwrite"


@pytest.mark.parametrize(
    ("harm", "kind", "message", "mend"),
    [
        (lambda folder: flip(folder / STATE), Damaged, f"{STATE} is not the file its manifest names", AGAIN),
        (lambda folder: (folder / STATE).unlink(), NotReady, f"{STATE} is missing", AGAIN),
        (unnamed, Damaged, f"the aggregate of round 1 names no {STATE}", AGAIN),
        (shutil.rmtree, NotReady, "fedadam goes on from what it remembers of round 1, whose aggregate is not", AGAIN),
        (lambda folder: sign(folder, round=2), Refused, "is of another round: 2, here it is 1", ""),
        (lambda folder: sign(folder, examples=1), Refused, "did not begin with the aggregate of round 1 that is", ""),
    ],
)
def test_a_round_without_the_state_of_the_one_before_is_refused_before_any_update_is_read(
    harm: Callable[[Path], object], kind: type[Problem], message: str, mend: str, trained: Workspace
) -> None:
    harm(trained.aggregate(1))
    before = published(trained.root)
    with pytest.raises(kind) as caught:
        aggregate(trained, round=2, overwrite=True)
    assert message in caught.value.message
    assert mend in str(caught.value.mend)
    assert published(trained.root) == before


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [(of_another_shape, Damaged, "is not of fedadam and this adapter"), (not_finite, BadNumbers, "NaN or infinity")],
)
@pytest.mark.parametrize("keep_old", [False, True])
def test_a_state_that_is_not_this_adapters_is_refused(
    harm: Callable[[Path], None], kind: type[Problem], message: str, keep_old: bool, trained: Workspace
) -> None:
    harm(trained.aggregate(1))
    changed = sha256_of(trained.aggregate(1))
    sign(trained.broadcast(2), parents={"aggregate": changed})
    begun = sha256_of(trained.broadcast(2))
    for client in CLIENTS:
        sign(trained.client_update(2, client), parents={"broadcast": begun})
    with pytest.raises(kind, match=message):
        aggregate(trained, round=2, keep_old=keep_old, overwrite=True)


def test_after_distillation_the_state_must_be_of_the_aggregate_that_was_distilled(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, method="fedcollm")
    run(workspace, scores=False)
    assert not problems(audit([workspace.root]))
    sign(workspace.aggregate(2), examples=1)
    with pytest.raises(Refused, match="did not begin with the aggregate of round 2 that is here"):
        aggregate(workspace, round=3, overwrite=True)


def test_a_step_beyond_float32_is_told(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, 'server = "fedavgm"\nserver_learning_rate = 1e6\n')
    broadcast(workspace, round=1)
    for client in CLIENTS:
        client_train(workspace, client=client, round=1)
        scale(workspace.client_update(1, client), 1e36)
    with pytest.raises(BadNumbers, match="holds NaN or infinity") as caught:
        aggregate(workspace, round=1)
    assert caught.value.where == "the adapter of fedavgm"
    assert not workspace.aggregate(1).exists()


# --- secure mode, and FedMKT


@pytest.fixture
def secure(tmp_path: Path, base_models: Path) -> Workspace:
    """A workspace of secure aggregation, by FedAvg and FedAdam, in which all have joined."""
    folder = with_keys(make_workspace(tmp_path / "study", base_models), tmp_path / "keys")
    (folder / "fedcollm.toml").write_text(agreement(aggregation=f'mode = "secure"\n{FEDADAM}', method="fedavg"))
    enrol(Workspace(folder))
    return Workspace(folder)


def assert_steps_along_the_sum(workspace: Workspace) -> None:
    """Both rounds are Algorithm 2 of what the clients keep, as near as fixed point and float32 are."""
    theta = tensors_of(workspace.broadcast(1))
    m, v = ({name: np.full(tensor.shape, value) for name, tensor in theta.items()} for value in (0.0, 0.01**2))
    fixed_point = 3 * 8.0 / 2**31  # of the sum of three numbers up to 8 in 32 bits; each is off by half at most
    for round in (1, 2):
        start = tensors_of(workspace.broadcast(round))
        updates = [tensors_of(workspace.client_adapter(round, k)) for k in CLIENTS]
        for name, old in start.items():
            delta = sum(update[name].astype(np.float64) for update in updates) / 3 - old
            m[name], v[name] = 0.8 * m[name] + 0.2 * delta, 0.7 * v[name] + 0.3 * delta**2
            expected = old + 0.05 * m[name] / (np.sqrt(v[name]) + 0.01)
            # what is off in delta comes back 0.05 / 0.01 times as large at most, and float32 adds its own
            np.testing.assert_allclose(
                tensors_of(workspace.aggregate(round))[name], expected, atol=round * (5 * fixed_point + 2e-6), rtol=1e-6
            )


def test_in_secure_mode_it_steps_along_the_sum(secure: Workspace) -> None:
    run(secure, scores=False)
    assert not problems(audit([secure.root]))
    assert_steps_along_the_sum(secure)


def test_a_state_that_was_lost_in_secure_mode_is_made_again_of_the_same_sum(secure: Workspace) -> None:
    run(secure, scores=False)
    before = adapters(secure.root)
    (secure.aggregate(1) / STATE).unlink()
    with pytest.raises(NotReady):
        aggregate(secure, round=2, overwrite=True)
    aggregate(secure, round=1, overwrite=True)
    aggregate(secure, round=2, overwrite=True)
    assert adapters(secure.root) == before


def test_another_attempt_at_a_round_goes_on_from_the_same_state(secure: Workspace) -> None:
    broadcast(secure, round=1)
    for client in CLIENTS:
        client_train(secure, client=client, round=1)
    with pytest.raises(NotReady):
        aggregate(secure, round=1)  # closes the round
    for client in CLIENTS:
        reveal(secure, client=client, round=1)
    aggregate(secure, round=1)
    broadcast(secure, round=2)
    client_train(secure, client=2, round=2)
    broadcast(secure, round=2, overwrite=True)
    run(secure, scores=False)
    assert json.loads((secure.aggregate(2) / "manifest.json").read_text())["attempt"] > 0
    assert_steps_along_the_sum(secure)


def test_averaged_fedmkt_has_it_too(equal_folder: Path) -> None:
    toml = equal_folder / "fedcollm.toml"
    edit(toml, "average = true\n", 'average = true\nserver = "fedyogi"\n')
    workspace = Workspace(equal_folder)
    run(workspace, scores=False)
    assert not problems(audit([equal_folder]))
    for round in (1, 2):
        assert (workspace.aggregate(round) / STATE).exists()
    assert all(step.condition == "done" for round in status(workspace).rounds for step in round.steps)


# --- audit


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda folder: scale(folder, 1.01), "A12 FAIL .*lora_B.weight is another; expected a step of fedadam from"),
        (unnamed, "A12 FAIL .* no file of what an optimiser remembers; expected one, for server fedadam"),
        (of_another_shape, "A12 FAIL .* is not of fedadam and this adapter"),
        (not_finite, "A12 FAIL .* holds NaN or infinity"),
        (lambda folder: flip(folder / STATE), "A2 FAIL .*server_state.safetensors: sha256"),
    ],
)
def test_the_audit_finds_a_state_or_a_step_that_is_another(
    harm: Callable[[Path], object], expected: str, trained: Workspace
) -> None:
    harm(trained.aggregate(2))
    said = problems(audit([trained.root]))
    assert any(re.match(expected, line) for line in said), said


def test_the_audit_finds_a_state_that_moved_without_a_step(trained: Workspace) -> None:
    aggregate(trained, round=2, keep_old=True, overwrite=True)
    assert not [line for line in problems(audit([trained.root])) if line.startswith("A12")]
    place = trained.aggregate(2) / STATE
    state = safetensors.numpy.load(place.read_bytes())
    state = {name: tensor + np.float32(0.01) for name, tensor in state.items()}
    place.write_bytes(safetensors.numpy.save(state, metadata={"format": "pt"}))
    sign(trained.aggregate(2))
    assert any(
        line.startswith("A12 FAIL") and "is another than that of the round before" in line
        for line in problems(audit([trained.root]))
    )


def test_a_state_where_the_agreement_has_no_optimiser_is_found(finished: Path) -> None:
    place = finished / "private/server/round-0002/aggregate"
    shutil.copy(place / "adapter_model.safetensors", place / STATE)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"][STATE] = dict(manifest["files"]["adapter_model.safetensors"])
    (place / "manifest.json").write_text(json.dumps(manifest))
    assert any(
        line.startswith("A12 FAIL") and "one of what an optimiser remembers" in line
        for line in problems(audit([finished]))
    )


# --- by commands


def test_a_combination_that_means_nothing_is_refused_by_the_first_command(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    agreed(workspace_folder, 'server = "fedadam"\ncombine = "product"\n')
    outcome = fedcollm("broadcast", "--round", 1, "-w", workspace_folder)
    assert outcome.code == 2
    assert "server fedadam steps along changes of A and B, combine product makes other A and B" in outcome.err
    assert not published(workspace_folder).keys() & {"exchange/round-0001/broadcast/manifest.json"}
