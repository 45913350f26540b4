"""aggregate: the mean of what has arrived, by hand; who is absent, late or a stranger is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import Outcome, edit, published, rows, sign, write_rows
from stages.aggregate import aggregate
from stages.audit.audit import audit
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.report import findings
from stages.workspace.paths import Workspace

ROUND = "exchange/round-0001"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())


def mean_of(folder: Path, weights: dict[int, float]) -> dict[str, np.ndarray]:
    """Sum of w_k theta_k over sum of w_k, in float64."""
    updates = {k: tensors(folder / ROUND / f"client-{k}") for k in weights}
    names = updates[next(iter(weights))]
    return {
        name: sum(w * updates[k][name].astype(np.float64) for k, w in weights.items()) / sum(weights.values())
        for name in names
    }


def assert_is(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name].astype(np.float32))


def test_uniform_is_the_mean_of_the_three_files(answered: Path) -> None:
    aggregate(Workspace(answered), round=1)
    assert_is(tensors(answered / "private/server/round-0001/aggregate"), mean_of(answered, {1: 1, 2: 1, 3: 1}))


def test_a_client_that_saw_twice_the_data_weighs_twice(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "steps = 6", "epochs = 1.0")
    edit(toml, "[distillation]", '[aggregation]\nweighting = "samples"\n\n[distillation]')
    write_rows(workspace_folder / "private/client-2/train.jsonl", rows(24))  # the others have 12
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    sign(workspace_folder / ROUND / "client-1", metrics={"own_examples": 1e9})  # which a client tells elsewhere
    manifest = aggregate(workspace, round=1)
    assert manifest.examples == 12 + 24 + 12
    found = tensors(workspace_folder / "private/server/round-0001/aggregate")
    assert_is(found, mean_of(workspace_folder, {1: 0.25, 2: 0.5, 3: 0.25}))


def test_identical_clients_give_the_identical_adapter(answered: Path) -> None:
    for k in (1, 2):
        shutil.rmtree(answered / ROUND / f"client-{k}")
        shutil.copytree(answered / ROUND / "client-3", answered / ROUND / f"client-{k}")
        sign(answered / ROUND / f"client-{k}", client=k)
    aggregate(Workspace(answered), round=1)
    name = "adapter_model.safetensors"
    made = answered / "private/server/round-0001/aggregate" / name
    assert made.read_bytes() == (answered / ROUND / "client-3" / name).read_bytes()


def test_the_cross_term_of_each_layer_is_that_of_the_full_products(answered: Path) -> None:
    manifest = aggregate(Workspace(answered), round=1)
    updates = [tensors(answered / ROUND / f"client-{k}") for k in (1, 2, 3)]
    layers = [name.removesuffix(".lora_A.weight") for name in updates[0] if "lora_A" in name]
    assert set(manifest.metrics) == {f"cross_term/{layer}" for layer in layers}
    for layer in layers:
        a = np.array([update[f"{layer}.lora_A.weight"] for update in updates], dtype=np.float64)
        b = np.array([update[f"{layer}.lora_B.weight"] for update in updates], dtype=np.float64)
        together = (b @ a).mean(0)  # mean(BA)
        apart = b.mean(0) @ a.mean(0)  # mean(B) mean(A)
        expected = np.linalg.norm(together - apart) / np.linalg.norm(together)
        assert math.isclose(manifest.metrics[f"cross_term/{layer}"], expected, rel_tol=1e-4)
        assert expected > 0


def test_a_product_is_the_mean_of_the_full_products_as_far_as_the_rank_goes(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[distillation]", '[aggregation]\ncombine = "product"\n[distillation]')
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    for client in (1, 2, 3):
        client_train(workspace, client=client, round=1)
    manifest = aggregate(workspace, round=1)
    updates = [tensors(workspace_folder / ROUND / f"client-{k}") for k in (1, 2, 3)]
    found = tensors(workspace.aggregate(1))
    layers = [name.removesuffix(".lora_A.weight") for name in found if "lora_A" in name]
    assert set(manifest.metrics) == {f"remainder/{layer}" for layer in layers}
    for layer in layers:
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        mean = np.mean([update[b].astype(np.float64) @ update[a] for update in updates], axis=0)
        u, values, vt = np.linalg.svd(mean)
        rank = len(found[a])
        np.testing.assert_allclose(found[b] @ found[a], (u[:, :rank] * values[:rank]) @ vt[:rank], atol=1e-6)
        assert manifest.metrics[f"remainder/{layer}"] == pytest.approx(
            np.linalg.norm(values[rank:]) / np.linalg.norm(values), rel=1e-6
        )
    told = [finding.found for finding in audit([workspace_folder]) if finding.id == "A6"]
    assert any("cross term, if A and B were averaged apart, at most" in one for one in told)
    [row] = findings.lost_by_averaging(workspace)
    assert (row["what"], row["lost_percent"]) == ("remainder", 100 * manifest.metrics[f"remainder/{layers[0]}"])


def with_quorum(folder: Path, number: int) -> None:
    """Agree on a quorum after the fact: what has been made is signed anew, from the broadcast down."""
    import hashlib

    toml = folder / "fedcollm.toml"
    edit(toml, "[distillation]", f"[aggregation]\nmin_clients = {number}\n\n[distillation]")
    agreement = hashlib.sha256(toml.read_bytes()).hexdigest()
    sign(folder / ROUND / "broadcast", agreement_sha256=agreement)
    broadcast = hashlib.sha256((folder / ROUND / "broadcast/manifest.json").read_bytes()).hexdigest()
    for k in (1, 2, 3):
        sign(folder / ROUND / f"client-{k}", agreement_sha256=agreement, parents={"broadcast": broadcast})


@pytest.fixture
def one_short(answered: Path) -> Path:
    """Two clients of three are enough and client 3 has not answered; its folder waits beside the workspace."""
    with_quorum(answered, 2)
    shutil.move(answered / ROUND / "client-3", answered.parent / "client-3")
    return answered


def test_with_a_quorum_the_absent_are_named_and_the_mean_is_over_those_present(
    one_short: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("aggregate", "--round", 1, "-w", one_short)
    assert outcome.code == 0
    assert "warning: averaging 2 of 3 clients; absent: client 3" in outcome.err
    assert_is(tensors(one_short / "private/server/round-0001/aggregate"), mean_of(one_short, {1: 1, 2: 1}))


def test_below_the_quorum_aggregate_waits_with_exit_3_naming_the_absent(
    one_short: Path, fedcollm: Callable[..., Outcome]
) -> None:
    shutil.rmtree(one_short / ROUND / "client-1")
    before = published(one_short)
    outcome = fedcollm("aggregate", "--round", 1, "-w", one_short)
    assert outcome.code == 3
    assert "round 1 has 1 of the 2 updates it needs; absent: client 1, 3" in outcome.err
    assert "fedcollm client-train --client 1 --round 1" in outcome.err
    assert published(one_short) == before


def test_without_a_quorum_every_client_is_waited_for(answered: Path, fedcollm: Callable[..., Outcome]) -> None:
    shutil.rmtree(answered / ROUND / "client-2")
    outcome = fedcollm("aggregate", "--round", 1, "-w", answered)
    assert outcome.code == 3
    assert "round 1 has 2 of the 3 updates it needs; absent: client 2" in outcome.err


def test_an_update_that_comes_late_is_shown_and_changes_nothing_until_overwrite(
    one_short: Path, fedcollm: Callable[..., Outcome]
) -> None:
    assert fedcollm("aggregate", "--round", 1, "-w", one_short).code == 0
    shutil.move(one_short.parent / "client-3", one_short / ROUND / "client-3")
    assert "late, not in the aggregate: client 3" in fedcollm("status", "-w", one_short).out
    late = fedcollm("aggregate", "--round", 1, "-w", one_short)
    assert late.code == 5
    assert "changed since: client-3" in late.err
    assert fedcollm("aggregate", "--round", 1, "--overwrite", "-w", one_short).code == 0
    assert_is(tensors(one_short / "private/server/round-0001/aggregate"), mean_of(one_short, {1: 1, 2: 1, 3: 1}))
    assert "late, not in" not in fedcollm("status", "-w", one_short).out


@pytest.mark.parametrize("name", ["client-9", "client-0", "client-01", "client-x"])
def test_a_folder_of_no_client_of_this_federation_is_refused(
    name: str, answered: Path, fedcollm: Callable[..., Outcome]
) -> None:
    shutil.copytree(answered / ROUND / "client-1", answered / ROUND / name)
    outcome = fedcollm("aggregate", "--round", 1, "-w", answered)
    assert outcome.code == 5
    assert f"{name} is not a client of this federation, which has clients 1 to 3" in outcome.err
    assert "mend  take that folder out of the exchange" in outcome.err
    assert not (answered / "private/server/round-0001/aggregate").exists()


def test_the_aggregate_names_every_update_it_is_made_of(finished_once: Path) -> None:
    import hashlib

    manifest = json.loads((finished_once / "private/server/round-0001/aggregate/manifest.json").read_text())
    assert manifest["parents"] == {
        name: hashlib.sha256((finished_once / ROUND / name / "manifest.json").read_bytes()).hexdigest()
        for name in ("broadcast", "client-1", "client-2", "client-3")
    }
