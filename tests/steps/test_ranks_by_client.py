"""Clients of a smaller rank: what they begin with, what they send, and what the server makes of all ranks together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from pydantic import ValidationError

from builders import edit, make_workspace, sign
from stages.aggregate import aggregate
from stages.aggregation import updates as reading_updates
from stages.aggregation.drift import drift
from stages.aggregation.ranks import at_rank_of
from stages.artefacts.reading import read_artefact
from stages.audit.audit import audit
from stages.audit.verify import verify
from stages.evaluate import evaluate
from stages.export.export import export
from stages.federation.run import run
from stages.planning.comm_cost import comm_cost
from stages.planning.plan import plan
from stages.runtime.errors import BadNumbers, Problem, Refused
from stages.study.table_rows import methods_of, own_method, rows_of
from stages.workspace.agreement import Agreement
from stages.workspace.methods import Method
from stages.workspace.paths import Workspace

Tensors = dict[str, np.ndarray]
Once = Callable[[str, Callable[[Path], None]], Path]
RANK = 2
"""Of client 2; the others have 4."""


def tensors(folder: Path) -> Tensors:
    return safetensors.numpy.load((folder / "adapter_model.safetensors").read_bytes())


def product(found: Tensors) -> np.ndarray:
    """BA of the one layer, float64."""
    a, b = (next(one for name, one in found.items() if f".lora_{which}." in name) for which in "AB")
    return b.astype(np.float64) @ a


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Of all matrices of a rank the nearest, by forming it (Eckart and Young)."""
    u, values, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * values[:rank]) @ vt[:rank]


def with_rank(folder: Path) -> Path:
    edit(folder / "fedcollm.toml", "[distillation]", '[aggregation]\ncombine = "product"\n\n[distillation]')
    (folder / "fedcollm.toml").write_text((folder / "fedcollm.toml").read_text() + f"\n[clients.2]\nrank = {RANK}\n")
    return folder


@pytest.fixture(scope="session")
def ran_once(once: Once, base_models: Path) -> Path:
    """Both rounds of three clients, one of a smaller rank, without scores; to be read only."""
    return once("ranks", lambda top: fill(top / "study", base_models)) / "study"


def fill(folder: Path, base_models: Path) -> None:
    run(Workspace(with_rank(make_workspace(folder, base_models))), scores=False)


@pytest.fixture
def ran(ran_once: Path, tmp_path: Path) -> Path:
    """Such a workspace of one's own."""
    return shutil.copytree(ran_once, tmp_path / "study", symlinks=True)


@pytest.mark.parametrize("round", [1, 2])
def test_a_client_sends_its_own_rank_and_says_so(ran_once: Path, round: int) -> None:
    place = ran_once / f"exchange/round-000{round}"
    shapes = {k: {tensor.shape for tensor in tensors(place / f"client-{k}").values()} for k in (1, 2)}
    assert shapes == {1: {(4, 16), (48, 4)}, 2: {(RANK, 16), (48, RANK)}}
    manifest = json.loads((place / "client-2/manifest.json").read_text())
    assert (manifest["lora"]["r"], manifest["lora"]["alpha"]) == (RANK, 4)
    config = json.loads((place / "client-2/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 4)
    assert manifest["parameters"] == RANK * (16 + 48)


@pytest.mark.parametrize("round", [1, 2])
def test_the_average_is_the_nearest_to_the_mean_of_all_products(ran_once: Path, round: int) -> None:
    each = [product(tensors(ran_once / f"exchange/round-000{round}/client-{k}")) for k in (1, 2, 3)]
    average = tensors(ran_once / f"private/server/round-000{round}/aggregate")
    expected = nearest(np.mean(each, axis=0), 4)
    assert np.linalg.matrix_rank(each[1]) == RANK
    np.testing.assert_allclose(product(average), expected, atol=1e-6 * np.abs(expected).max())
    told = json.loads((ran_once / f"private/server/round-000{round}/aggregate/manifest.json").read_text())["metrics"]
    [remainder] = [value for name, value in told.items() if name.startswith("remainder/")]
    left = np.linalg.norm(np.mean(each, axis=0) - expected) / np.linalg.norm(np.mean(each, axis=0))
    assert remainder == pytest.approx(left, rel=1e-4)


def test_a_client_begins_with_the_nearest_to_the_broadcast(ran_once: Path) -> None:
    theta = read_artefact(ran_once / "exchange/round-0002/broadcast")
    lora = Workspace(ran_once).of_client(2).agreement.slm.lora
    begins = safetensors.numpy.load(at_rank_of(theta, lora).contents["adapter_model.safetensors"])
    whole = product(tensors(ran_once / "exchange/round-0002/broadcast"))
    expected = nearest(whole, RANK)
    np.testing.assert_allclose(product(begins), expected, atol=1e-6 * np.abs(expected).max())
    assert np.linalg.matrix_rank(whole) == 4
    assert at_rank_of(theta, theta.manifest.lora) is theta


def test_before_anybody_has_trained_it_begins_with_some_of_a(ran_once: Path) -> None:
    theta = read_artefact(ran_once / "exchange/round-0001/broadcast")
    lora = Workspace(ran_once).of_client(2).agreement.slm.lora
    begins = safetensors.numpy.load(at_rank_of(theta, lora).contents["adapter_model.safetensors"])
    whole = tensors(ran_once / "exchange/round-0001/broadcast")
    for name, tensor in begins.items():
        np.testing.assert_array_equal(tensor, whole[name][:RANK] if ".lora_A." in name else np.zeros((48, RANK)))


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_files_of_other_ranks_are_read_in_blocks_and_hashed(
    ran: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(ran / "private/server/round-0002")
    expected = tensors(ran / "private/server/round-0001/aggregate")
    monkeypatch.setattr(reading_updates, "BLOCK_BYTES", block)
    monkeypatch.setattr(reading_updates, "FEWEST_NUMBERS", 7)
    workspace = Workspace(ran)
    aggregate(workspace, round=1, overwrite=True)
    found = tensors(ran / "private/server/round-0001/aggregate")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    path = ran / "exchange/round-0001/client-2/adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Problem, match=r"client-2|sha256|digest"):
        aggregate(workspace, round=1, overwrite=True)


def test_an_update_of_another_rank_than_agreed_is_refused(ran: Path) -> None:
    shutil.rmtree(ran / "private/server/round-0001")
    first, second = (ran / f"exchange/round-0001/client-{k}" for k in (1, 2))
    manifest = json.loads((second / "manifest.json").read_text())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(first / name, second / name)
    sign(second, parameters=4 * (16 + 48))
    with pytest.raises(Problem, match=r"r = 4|rank 4|lora_alpha"):
        aggregate(Workspace(ran), round=1)
    sign(second, lora=manifest["lora"] | {"r": 4, "alpha": 8})
    with pytest.raises(Refused, match="another LoRA shape"):
        aggregate(Workspace(ran), round=1)
    assert not (ran / "private/server/round-0001/aggregate").exists()


def test_audit_verify_drift_scores_and_export_know_each_rank(ran: Path) -> None:
    workspace = Workspace(ran)
    findings = audit([ran])
    assert {one.level for one in findings} <= {"OK", "SKIP"}
    assert any(one.id == "A6" and "client 2: of a smaller rank" in one.found for one in findings)
    assert any(one.id == "A6" and "2 rounds" in one.found for one in findings)
    verify(workspace)
    assert [one.client for one in drift(workspace, 1)] == [1, 3]
    assert evaluate(workspace, round=2, client=2)["tasks"]["colours"]["questions"] == 12
    made = export(workspace, round=2, client=2)
    assert made["subject"] == "client-2"
    config = json.loads((ran / "exports/client-2-round-0002/adapter_config.json").read_text())
    assert config["r"] == RANK


@pytest.mark.parametrize("method", ["standalone", "fedavg", "centralized"])
def test_baselines_have_the_ranks_that_they_can_have(ran: Path, method: Method) -> None:
    run(Workspace(ran), method=method, scores=False)
    place = ran / f"baselines/{method}"
    assert {one.level for one in audit([place])} <= {"OK", "SKIP"}
    if method != "centralized":
        config = json.loads((place / "exchange/round-0002/client-2/adapter_config.json").read_text())
        assert config["r"] == RANK


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('combine = "product"', 'combine = "factors"', "set aggregation.combine"),
        (f"rank = {RANK}", "rank = 4", r"clients\.2\.rank = 4 is not below slm\.lora\.r = 4"),
        ("alpha = 8\n\n[llm]", "alpha = 5\n\n[llm]", "alpha is no whole number"),
        ("seed = 7", 'seed = 7\nmethod = "fedmkt"', r"\[clients\.2\.slm\.lora\]"),
        (f"rank = {RANK}", f"rank = {RANK}\nlearning_rate = 1e-3", "averages adapters of one model"),
        ("[clients.2]", "[clients.4]", "there are clients 1 to 3"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_at_the_first_command(
    workspace_folder: Path, old: str, new: str, words: str
) -> None:
    folder = with_rank(workspace_folder)
    edit(folder / "fedcollm.toml", old, new)
    with pytest.raises(Problem, match=words):
        _ = Workspace(folder).agreement


def test_an_agreement_says_each_clients_shape(workspace_folder: Path) -> None:
    agreement = Workspace(with_rank(workspace_folder)).agreement
    assert [agreement.of_client(k).slm.lora.r for k in (1, 2, 3)] == [4, RANK, 4]
    assert agreement.ranks == {"2": RANK}
    with pytest.raises(ValidationError):
        Agreement.model_validate(agreement.model_dump() | {"clients": {"2": {"rank": 0}}})


def test_plan_and_comm_cost_tell_the_mean_of_what_clients_of_other_ranks_send(ran_once: Path) -> None:
    workspace = Workspace(ran_once)
    weights = [ran_once / f"exchange/round-0001/client-{k}/adapter_model.safetensors" for k in (1, 2, 3)]
    numbers = [sum(one.size for one in tensors(path.parent).values()) for path in weights]
    size = sum(path.stat().st_size for path in weights) // 3
    cost = comm_cost(workspace).full
    assert cost is not None
    assert (cost.update_parameters, cost.update_bytes) == (sum(numbers) // 3, size)
    assert cost.update_parameters < cost.adapter_parameters
    assert plan(workspace).sent["client"] == size


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_average_beyond_float32_is_refused_without_a_warning_of_numpys(ran: Path) -> None:
    shutil.rmtree(ran / "private/server/round-0001")
    place = ran / "exchange/round-0001/client-2"
    large = {name: np.full_like(one, 3e38) for name, one in tensors(place).items()}
    (place / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(large, metadata={"format": "pt"}))
    sign(place)
    with pytest.raises(BadNumbers, match="holds NaN or infinity"):
        aggregate(Workspace(ran), round=1)
    assert audit([ran])


def test_a_study_of_clients_of_other_ranks_is_fedcollms(ran_once: Path, finished: Path) -> None:
    of_ranks, of_one_rank = Workspace(ran_once), Workspace(finished)
    assert rows_of(of_ranks) == rows_of(of_one_rank)
    assert (own_method(of_ranks), methods_of(of_ranks)) == ("fedcollm", methods_of(of_one_rank))
