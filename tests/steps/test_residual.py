"""combine = "residual": what clients load is the mean of what they learned, exactly, round after round."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from builders import edit, make_workspace, rows, scale, sign, write_rows
from damages import problems
from fedcollm_cli.views import plans
from stages.aggregate import aggregate
from stages.aggregation.gate import _loss
from stages.artefacts.receiving import read_sound
from stages.audit.audit import audit
from stages.audit.verify import verify
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.data.examples import encode
from stages.data.row_files import read_rows
from stages.evaluate import evaluate
from stages.exchange.bundles import bundle_bytes
from stages.exchange.pack import pack
from stages.exchange.parcel_kinds import Parcel
from stages.exchange.unpack import unpack
from stages.export.export import export
from stages.federation.run import run
from stages.files import reading
from stages.models import adapters
from stages.models.loading import Models
from stages.parties.party import Onlooker
from stages.planning.comm_cost import comm_cost
from stages.planning.plan import plan
from stages.planning.residuals import layout_after
from stages.report import findings
from stages.runtime.errors import BadNumbers, Damaged, Problem, Refused, UsageProblem
from stages.workspace.paths import Flags, Workspace

Tensors = dict[str, np.ndarray]
Once = Callable[[str, Callable[[Path], None]], Path]
RESIDUAL, WEIGHTS = "residual.safetensors", "adapter_model.safetensors"
LAYER = "base_model.model.transformer.h.0.attn.c_attn"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
SCALE = 2.0
"""alpha / r of the tests' workspace: 8 / 4."""
CLIENTS = (1, 2, 3)


def tensors(folder: Path, name: str = WEIGHTS) -> Tensors:
    return safetensors.numpy.load((folder / name).read_bytes())


def product(found: Tensors) -> np.ndarray:
    """BA of the one layer, [48, 16], float64; zero where it has none."""
    return found[B].astype(np.float64) @ found[A] if found else np.zeros((48, 16))


def beneath(folder: Path) -> np.ndarray:
    return product(tensors(folder, RESIDUAL))


def agreed(folder: Path, lines: str = "", *, method: str = "fedavg", rounds: int = 2) -> Workspace:
    toml = folder / "fedcollm.toml"
    edit(toml, "rounds = 2\nseed = 7", f'rounds = {rounds}\nseed = 7\nmethod = "{method}"')
    edit(toml, "[distillation]", f'[aggregation]\ncombine = "residual"\n{lines}\n[distillation]')
    return Workspace(folder)


def one_round(workspace: Workspace, round: int, clients: tuple[int, ...] = CLIENTS) -> None:
    broadcast(workspace, round=round)
    for client in clients:
        client_train(workspace, client=client, round=round)
    aggregate(workspace, round=round)


def fill(folder: Path, base_models: Path, method: str) -> None:
    run(agreed(make_workspace(folder, base_models), method=method), scores=False)


@pytest.fixture(scope="session", params=["fedavg", "fedcollm"])
def ran_once(once: Once, base_models: Path, request: pytest.FixtureRequest) -> Path:
    """Two rounds of three clients, without scores; to be read only."""
    method = str(request.param)
    return once(f"residual-{method}", lambda top: fill(top / "study", base_models, method)) / "study"


@pytest.fixture
def ran(once: Once, base_models: Path, tmp_path: Path) -> Path:
    """Such a workspace of FedAvg, of one's own."""
    whole = once("residual-fedavg", lambda top: fill(top / "study", base_models, "fedavg")) / "study"
    return shutil.copytree(whole, tmp_path / "study", symlinks=True)


# --- the mean, exactly


@pytest.mark.parametrize("round", [1, 2])
def test_average_and_residual_are_the_mean_of_what_clients_have_merged(ran_once: Path, round: int) -> None:
    place, average = ran_once / f"exchange/round-000{round}", ran_once / f"private/server/round-000{round}/aggregate"
    before = beneath(place / "broadcast")  # a client's weights are W + alpha / r (before + its BA)
    expected = np.mean([before + product(tensors(place / f"client-{k}")) for k in CLIENTS], axis=0)
    found = beneath(average) + product(tensors(average))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
    lost = np.linalg.norm(before + product(tensors(average)) - expected) / np.linalg.norm(expected)
    assert lost > 1e-4  # with nothing added


def test_the_adapter_is_that_of_the_separate_means_and_the_rank_grows_by_two_clients_a_round(ran_once: Path) -> None:
    for round, rank in ((1, 8), (2, 16)):  # (K - 1) r each, up to the 16 inputs
        place, average = (
            ran_once / f"exchange/round-000{round}",
            ran_once / f"private/server/round-000{round}/aggregate",
        )
        for name, tensor in tensors(average).items():
            mean = np.mean([tensors(place / f"client-{k}")[name].astype(np.float64) for k in CLIENTS], axis=0)
            np.testing.assert_allclose(tensor, mean, atol=1e-7)
        assert tensors(average, RESIDUAL)[A].shape == (rank, 16)
        assert json.loads((average / "manifest.json").read_text())["metrics"]["residual_rank"] == rank


def test_each_broadcast_has_what_all_rounds_before_it_have_left(ran_once: Path) -> None:
    first, second = (ran_once / f"exchange/round-000{round}/broadcast" for round in (1, 2))
    server = ran_once / "private/server/round-0001"
    assert tensors(first, RESIDUAL) == {}
    made = [server / name for name in ("aggregate", "slm") if (server / name).exists()]
    assert {(folder / RESIDUAL).read_bytes() for folder in made} == {(second / RESIDUAL).read_bytes()}
    assert len(made) == (2 if "fedcollm" in str(ran_once) else 1)
    assert not list(ran_once.glob(f"**/client-*/{RESIDUAL}"))
    assert not list(ran_once.glob(f"**/llm/{RESIDUAL}"))


def test_what_a_client_loads_is_the_mean_of_what_all_have_merged(ran_once: Path) -> None:
    """By whole models, as others load and merge them: base and adapter, and what was beneath it, in float64."""
    workspace, name = Workspace(ran_once), "transformer.h.0.attn.c_attn.weight"
    base = safetensors.torch.load_file(ran_once / "models/slm/model.safetensors")[name].double().numpy().T
    place = ran_once / "exchange/round-0002"
    merged = [base + SCALE * (beneath(place / "broadcast") + product(tensors(place / f"client-{k}"))) for k in CLIENTS]
    models = Models(workspace)
    average = read_sound(workspace.aggregate(2), by=Onlooker(workspace))
    model: Any = models.with_adapter("slm", average).model.merge_and_unload()
    found = model.state_dict()[name].double().numpy().T
    np.testing.assert_allclose(found, np.mean(merged, axis=0), atol=1e-6 * np.abs(found).max())


def test_a_client_that_missed_a_round_needs_nothing_but_the_newest_broadcast(
    workspace_folder: Path, tmp_path: Path
) -> None:
    workspace = agreed(workspace_folder, "min_clients = 2")
    one_round(workspace, 1, (1, 2))
    broadcast(workspace, round=2)
    alone = shutil.copytree(workspace_folder, tmp_path / "client-3", symlinks=True)
    shutil.rmtree(alone / "exchange/round-0001")
    shutil.rmtree(alone / "private/server")
    for folder in (alone, workspace_folder):
        client_train(Workspace(folder), client=3, round=2)
    sent = [(folder / "exchange/round-0002/client-3" / WEIGHTS).read_bytes() for folder in (alone, workspace_folder)]
    assert sent[0] == sent[1]
    for client in (1, 2):
        client_train(workspace, client=client, round=2)
    aggregate(workspace, round=2)
    place = workspace.broadcast(2)
    expected = np.mean([product(tensors(workspace.client_update(2, k))) for k in CLIENTS], axis=0) + beneath(place)
    found = beneath(workspace.aggregate(2)) + product(tensors(workspace.aggregate(2)))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def test_weights_by_samples_are_those_of_the_mean(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, 'weighting = "samples"')
    broadcast(workspace, round=1)
    counts = (24, 48, 96)
    for client, count in zip(CLIENTS, counts, strict=True):
        client_train(workspace, client=client, round=1)
        sign(workspace.client_update(1, client), examples=count)
    aggregate(workspace, round=1)
    each = [product(tensors(workspace.client_update(1, k))) for k in CLIENTS]
    expected = np.average(each, axis=0, weights=counts)
    found = beneath(workspace.aggregate(1)) + product(tensors(workspace.aggregate(1)))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def test_one_client_leaves_nothing_beneath(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, "min_clients = 1")
    one_round(workspace, 1, (2,))
    assert tensors(workspace.aggregate(1), RESIDUAL) == {}
    broadcast(workspace, round=2)
    client_train(workspace, client=1, round=2)


# --- in a model


def said(model: Any) -> torch.Tensor:
    return adapters.logits(model, [5, 9, 2, 7, 11, 3])


@pytest.fixture
def average(ran: Path) -> Any:
    workspace = Workspace(ran)
    return read_sound(workspace.aggregate(2), by=Onlooker(workspace))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_says_what_the_merged_weights_say(ran: Path, average: Any, dtype: Any) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    reference: Any = AutoModelForCausalLM.from_pretrained(ran / "models/slm")
    plain = said(reference)
    added = SCALE * (beneath(average.path) + product(tensors(average.path)))
    with torch.no_grad():
        reference.state_dict()[name] += torch.from_numpy(added.T).float()
    models = Models(Workspace(ran, Flags(dtype=dtype)))
    tuned = models.with_adapter("slm", average)
    with torch.autocast("cpu", torch.bfloat16, enabled=tuned.autocast):
        found = said(tuned.model)
    moved = (said(reference) - plain).abs().max()
    assert (found - said(reference)).abs().max() < (1e-5 if dtype == "float32" else 0.1) * moved
    with tuned.model.disable_adapter():
        torch.testing.assert_close(said(tuned.model), plain)


def test_only_the_adapter_is_trained_and_another_one_has_nothing_beneath_it(ran: Path, average: Any) -> None:
    workspace = Workspace(ran)
    models = Models(workspace)
    tuned = models.begun("slm", average, seed=1)
    trained = [name for name, one in tuned.model.named_parameters() if one.requires_grad]
    assert len(trained) == 2
    assert all(".default." in name for name in trained)
    assert tensors(average.path).keys() == adapters.take(tuned.model).keys()
    first = read_sound(workspace.broadcast(1), by=Onlooker(workspace))
    model = models.with_adapter("slm", first).model
    reference: Any = AutoModelForCausalLM.from_pretrained(ran / "models/slm")
    torch.testing.assert_close(said(model), said(reference))  # B is zero, and nothing is beneath it
    models.with_adapter("slm", average)
    fresh = models.begun("slm", None, seed=1).model
    torch.testing.assert_close(said(fresh), said(reference))


def test_a_client_trains_on_what_lies_beneath(ran: Path) -> None:
    workspace = Workspace(ran)
    told = json.loads((workspace.client_update(2, 1) / "manifest.json").read_text())["metrics"]
    shutil.rmtree(workspace.client_update(2, 1))
    (workspace.broadcast(2) / RESIDUAL).write_bytes((workspace.broadcast(1) / RESIDUAL).read_bytes())
    sign(workspace.broadcast(2))
    without = client_train(workspace, client=1, round=2).metrics
    assert without["slm_ft_before"] != told["slm_ft_before"]


@pytest.mark.parametrize(("client", "merged"), [(None, False), (None, True), (2, False), (2, True)])
def test_an_export_is_one_model_as_others_load_it(ran: Path, client: int | None, merged: bool) -> None:
    workspace = Workspace(ran)
    words: dict[str, Any] = {"client": client} if client else {"model": "aggregate"}
    export(workspace, round=2, merged=merged, **words)
    folder = workspace.export(2, f"client-{client}" if client else "aggregate", merged=merged)
    stood = workspace.broadcast(2) if client else workspace.aggregate(2)
    own = workspace.client_update(2, client) if client else stood
    added = SCALE * (beneath(stood) + product(tensors(own)))
    name = "transformer.h.0.attn.c_attn.weight"
    reference: Any = AutoModelForCausalLM.from_pretrained(ran / "models/slm")
    with torch.no_grad():
        reference.state_dict()[name] += torch.from_numpy(added.T).float()
    if merged:
        found: Any = AutoModelForCausalLM.from_pretrained(folder)
    else:
        base: Any = AutoModelForCausalLM.from_pretrained(ran / "models/slm")
        found = PeftModel.from_pretrained(base, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        rank = 4 + len(tensors(stood, RESIDUAL)[A])
        assert (config["r"], config["lora_alpha"]) == (rank, 2 * rank)
    torch.testing.assert_close(said(found), said(reference), rtol=1e-4, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "FedEx-LoRA" in card
    assert hashlib.sha256((stood / RESIDUAL).read_bytes()).hexdigest() in card


def test_scores_are_of_the_whole_model_and_those_of_the_base_stay(ran: Path) -> None:
    workspace = Workspace(ran)
    models = Models(workspace)
    alone = evaluate(workspace, models=models)["tasks"]
    found = {k: evaluate(workspace, round=2, client=k, models=models)["tasks"] for k in (1, 2)}
    evaluate(workspace, round=2, model="aggregate", models=models)
    again = evaluate(workspace, models=models, overwrite=True)["tasks"]
    assert again == alone
    assert found[1] != alone


# --- who may go on from where


def test_a_training_that_was_stopped_ends_with_the_same_bytes(ran: Path) -> None:
    workspace, place = Workspace(ran), Workspace(ran).client_update(2, 2)
    expected = (place / WEIGHTS).read_bytes()
    (ran / "machine.toml").write_text("checkpoint_steps = 1\n")
    shutil.rmtree(place)

    def stop(event: Any) -> None:
        if event.kind == "step" and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_train(Workspace(ran), client=2, round=2, report=stop)
    seen: list[int] = []
    look = Workspace(ran)
    client_train(
        look, client=2, round=2, report=lambda event: seen.append(event.step) if event.kind == "step" else None
    )
    assert seen[0] in (2, 3)  # not from the start
    assert (workspace.client_update(2, 2) / WEIGHTS).read_bytes() == expected


@pytest.mark.parametrize("round", [1, 2])
def test_a_round_that_is_given_up_hands_the_residual_on(workspace_folder: Path, round: int) -> None:
    workspace = agreed(workspace_folder, rounds=3)
    for before in range(1, round):
        one_round(workspace, before)
    broadcast(workspace, round=round)
    aggregate(workspace, round=round, keep_old=True)
    assert (workspace.aggregate(round) / RESIDUAL).read_bytes() == (workspace.broadcast(round) / RESIDUAL).read_bytes()
    if round == 1:
        evaluate(workspace, round=1, model="aggregate")
    one_round(workspace, round + 1)
    assert not [line for line in problems(audit([workspace.root])) if " FAIL " in line or line.startswith("A13")]


def test_the_gate_looks_at_the_whole_average_and_keeps_the_whole_broadcast(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder)
    write_rows(workspace.held_out_data, rows(20, start=80))
    one_round(workspace, 1)
    broadcast(workspace, round=2)
    for client in CLIENTS:
        client_train(workspace, client=client, round=2)
    measured = aggregate(workspace, round=2, gate=1e6).metrics
    tuned = Models(workspace).with_adapter("slm", read_sound(workspace.aggregate(2), by=Onlooker(workspace)))
    held = encode(
        read_rows(workspace.held_out_data)[0],
        tuned.tokenizer,
        max_length=workspace.agreement.client_training.max_length,
        context=tuned.context,
        too_long="refuse",
        path=workspace.held_out_data,
    )
    assert measured["gate_after"] == pytest.approx(_loss(tuned, held, 4), rel=1e-5)
    for client in CLIENTS:
        scale(workspace.client_update(2, client), -40)
    kept = aggregate(workspace, round=2, gate=0.0, overwrite=True)
    assert kept.metrics["gate_kept"] == 1.0
    for name in (RESIDUAL, WEIGHTS):
        assert (workspace.aggregate(2) / name).read_bytes() == (workspace.broadcast(2) / name).read_bytes()


def test_the_server_trains_on_it_in_two_phases_too(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, method="fedcollm")
    one_round(workspace, 1)
    for model in ("llm", "slm"):
        co_distill(workspace, round=1, phase="capture", model=model)
    co_distill(workspace, round=1, phase="train")
    assert (workspace.slm(1) / RESIDUAL).read_bytes() == (workspace.aggregate(1) / RESIDUAL).read_bytes()
    (workspace.aggregate(1) / RESIDUAL).write_bytes((workspace.broadcast(1) / RESIDUAL).read_bytes())
    with pytest.raises(Problem, match="residual"):
        co_distill(workspace, round=1, overwrite=True)


# --- what others send


def put(folder: Path, found: Tensors) -> None:
    safetensors.numpy.save_file(found, folder / RESIDUAL, metadata={"format": "pt"})
    sign(folder)


def unnamed(folder: Path) -> None:
    (folder / RESIDUAL).unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][RESIDUAL]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def of(a: tuple[int, ...] = (8, 16), b: tuple[int, ...] = (48, 8), **more: tuple[int, ...]) -> Tensors:
    shapes = {A: a, B: b} | {name.replace("__", "."): shape for name, shape in more.items()}
    return {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}


def pickled(folder: Path) -> None:
    (folder / RESIDUAL).write_bytes(b"\x80\x04" + bytes(90))
    sign(folder)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (unnamed, r"names no residual\.safetensors"),
    "another shape": (lambda folder: put(folder, of(a=(8, 15))), r"they are \[rank, 16\] and \[48, rank\]"),
    "no matrix": (lambda folder: put(folder, of(a=())), r"they are \[rank, 16\] and \[48, rank\]"),
    "unlike ranks": (lambda folder: put(folder, of(b=(48, 7))), r"they are \[rank, 16\] and \[48, rank\]"),
    "no rank": (lambda folder: put(folder, of(a=(0, 16), b=(48, 0))), "has rank 0"),
    "too large a rank": (lambda folder: put(folder, of(a=(13, 16), b=(48, 13))), "has rank 13 .* 12 at most"),
    "a giant": (lambda folder: put(folder, of(a=(9000, 16), b=(48, 9000))), "bytes, here it can have|has rank 9000"),
    "alone": (lambda folder: put(folder, {A: np.ones((8, 16), np.float32)}), "of no pair of matrices"),
    "another layer": (
        lambda folder: put(folder, of(x__lora_A__weight=(8, 16), x__lora_B__weight=(48, 8))),
        "has x, in which the adapter has no A and B",
    ),
    "NaN": (lambda folder: put(folder, {A: of()[A], B: of()[B] * np.nan}), "holds NaN or infinity"),
    "half precision": (lambda folder: put(folder, {A: of()[A].astype(np.float16), B: of()[B]}), "as F16"),
    "a pickle": (pickled, "is a pickle, which is never opened"),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_a_hostile_residual_is_refused_before_anything_is_trained(harm: str, ran: Path) -> None:
    workspace, (do, told) = Workspace(ran), HOSTILE[harm]
    shutil.rmtree(workspace.client_update(2, 1))
    do(workspace.broadcast(2))
    with pytest.raises(Problem, match=told) as caught:
        client_train(workspace, client=1, round=2)
    assert isinstance(caught.value, Damaged | BadNumbers)
    assert not workspace.client_update(2, 1).exists()
    assert any(line.startswith(("A13 FAIL", "A2 FAIL")) for line in problems(audit([ran])))


def bundle_of(workspace: Workspace, folder: Path) -> Path:
    """What pack would write, had it not looked at what is in it."""
    parcel = Parcel("broadcast", 2)
    members = {parcel.name(workspace, path.name): path.read_bytes() for path in parcel.folder(workspace).iterdir()}
    path = folder / "round-0002-server.fedcollm"
    path.write_bytes(bundle_bytes(workspace.agreement.federation.name, members))
    return path


@pytest.mark.parametrize("harm", HOSTILE)
def test_a_parcel_with_a_hostile_residual_is_refused(harm: str, ran: Path, tmp_path: Path) -> None:
    workspace, (do, told) = Workspace(ran), HOSTILE[harm]
    do(workspace.broadcast(2))
    there = shutil.copytree(ran, tmp_path / "there", symlinks=True)
    shutil.rmtree(there / "exchange/round-0002")
    with pytest.raises(Problem, match=told):
        unpack(Workspace(there), bundle_of(workspace, tmp_path))


def test_the_broadcast_s_parcel_carries_the_residual(ran: Path, tmp_path: Path) -> None:
    there = shutil.copytree(ran, tmp_path / "there", symlinks=True)
    shutil.rmtree(there / "exchange/round-0002")
    unpack(Workspace(there), pack(Workspace(ran), round=2, to=1, folder=tmp_path).path)
    place = Path("exchange/round-0002/broadcast") / RESIDUAL
    assert (there / place).read_bytes() == (ran / place).read_bytes()


def test_a_residual_that_nobody_agreed_on_is_refused(finished: Path) -> None:
    workspace = Workspace(finished)
    place = workspace.broadcast(2)
    shutil.rmtree(workspace.client_update(2, 1))
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"][RESIDUAL] = {}
    (place / "manifest.json").write_text(json.dumps(manifest))
    put(place, of())
    with pytest.raises(Damaged, match=r"names a residual\.safetensors, which is not as agreed"):
        client_train(workspace, client=1, round=2)


def test_a_client_s_adapter_is_not_read_on_another_broadcast(ran: Path) -> None:
    workspace = Workspace(ran)
    sign(workspace.broadcast(2), examples=7)
    with pytest.raises(Refused, match=r"stands on the residual\.safetensors of another broadcast"):
        evaluate(workspace, round=2, client=1)
    shutil.rmtree(workspace.broadcast(2))
    with pytest.raises(Problem, match="the broadcast of round 2 is not there, on whose"):
        export(workspace, round=2, client=1)


# --- the audit


def test_the_audit_makes_average_and_residual_again(ran_once: Path) -> None:
    found = audit([ran_once])
    assert not [one.text for one in found if one.level in ("FAIL", "WARN")]
    [whole] = [one for one in found if (one.id, one.level, one.where) == ("A13", "OK", "")]
    count = 6 if "fedcollm" in str(ran_once) else 4
    assert whole.found == f"{count} residuals; 2 averages made again from the updates"
    verify(Workspace(ran_once))


@pytest.mark.parametrize("what", [WEIGHTS, RESIDUAL])
def test_the_audit_finds_an_average_that_the_updates_do_not_make(ran: Path, what: str) -> None:
    place = Workspace(ran).aggregate(2)
    found = tensors(place, what)
    found[B] = found[B] * np.float32(1.001)
    safetensors.numpy.save_file(found, place / what, metadata={"format": "pt"})
    sign(place)
    assert any(line.startswith("A13 FAIL") and what in line for line in problems(audit([ran])))


def test_the_audit_and_verify_find_a_broadcast_of_another_residual(ran: Path) -> None:
    workspace = Workspace(ran)
    found = tensors(workspace.broadcast(2), RESIDUAL)
    put(workspace.broadcast(2), {A: found[A], B: found[B] * np.float32(2)})
    lines = problems(audit([ran]))
    assert any(line.startswith("A1 FAIL") and "residual.safetensors" in line for line in lines)
    with pytest.raises(Refused, match=r"has another residual\.safetensors than .*aggregate"):
        verify(workspace)


# --- what it goes with


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('mode = "secure"', "combine residual needs each client's A and B, mode secure shows their sums"),
        ('rule = "median"', "rule median is for A and B as they are, combine residual averages BA"),
        ('rule = "clipped-mean"', "rule clipped-mean is for A and B as they are, combine residual averages BA"),
        ("keep = 0.1", "keep leaves numbers out, combine residual leaves nothing out"),
        ('personal = "B"', "personal is for A and B that are averaged apart: combine residual"),
        ('server = "fedadam"', "server fedadam steps along changes of A and B, combine residual makes up for"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(lines: str, told: str, workspace_folder: Path) -> None:
    with pytest.raises(UsageProblem, match=told):
        agreed(workspace_folder, lines).agreement  # noqa: B018  # read from the file


def test_clients_of_other_ranks_and_averaged_fedmkt_are_refused(workspace_folder: Path, equal_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[clients.2]\nrank = 2\n")
    with pytest.raises(UsageProblem, match=r'set aggregation\.combine = "product"'):
        agreed(workspace_folder).agreement  # noqa: B018
    edit(equal_folder / "fedcollm.toml", "average = true", 'average = true\ncombine = "residual"')
    with pytest.raises(UsageProblem, match=r"aggregation\.average takes whole adapters"):
        Workspace(equal_folder).agreement  # noqa: B018


def test_a_method_that_averages_nothing_has_no_residual(workspace_folder: Path) -> None:
    workspace = agreed(workspace_folder, method="standalone")
    broadcast(workspace, round=1)
    client_train(workspace, client=1, round=1)
    client_train(workspace, client=1, round=2)
    assert not list(workspace_folder.glob(f"**/{RESIDUAL}"))


def test_noise_at_the_clients_goes_with_it(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[distillation]", "[privacy]\nnoise_multiplier = 1.0\n\n[distillation]")
    workspace = agreed(workspace_folder)
    one_round(workspace, 1)
    one_round(workspace, 2)
    each = [product(tensors(workspace.client_update(2, k))) for k in CLIENTS]
    expected = beneath(workspace.broadcast(2)) + np.mean(each, axis=0)
    found = beneath(workspace.aggregate(2)) + product(tensors(workspace.aggregate(2)))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


# --- what it costs


def test_what_travels_is_counted_and_told_ahead(ran: Path) -> None:
    workspace = Workspace(ran)
    sizes = [(workspace.broadcast(round) / RESIDUAL).stat().st_size for round in (1, 2)]
    found = comm_cost(workspace)
    assert found.full is not None
    assert (found.full.residual_bytes, found.full.residual_mean_bytes) == (sizes[1], sum(sizes) // 2)
    [down] = [one for one in found.rounds if (one.round, one.party) == (2, "server")]
    assert down.sent_bytes == 3 * sum(path.stat().st_size for path in workspace.broadcast(2).iterdir())
    ahead = plan(workspace)
    assert ahead.sent["residual"] == 3 * sizes[1]
    after = [(workspace.aggregate(round) / RESIDUAL).stat().st_size for round in (1, 2)]
    without = plan_of_factors(ran)
    assert ahead.disk["exchange"] - without.disk["exchange"] == sum(sizes)
    assert ahead.disk["server"] - without.disk["server"] == 2 * sum(after)
    stages = {stage.name: stage.memory for stage in ahead.stages}
    assert stages["client-train"]["residual"] == 4 * 8 * (16 + 48)  # the rank of one round, float32
    assert "residual" not in {stage.name: stage.memory for stage in without.stages}["client-train"]


def plan_of_factors(folder: Path) -> Any:
    """The same workspace without it."""
    edit(folder / "fedcollm.toml", 'combine = "residual"', 'combine = "factors"')
    return plan(Workspace(folder))


def test_a_file_that_nobody_would_read_is_not_made(ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LARGEST_ADAPTER_BYTES", 1 << 20)  # the head alone may have as much
    with pytest.raises(UsageProblem, match=r"residual\.safetensors has grown to \d+ bytes, at most 1048576 are read"):
        aggregate(Workspace(ran), round=2, overwrite=True)
    told = "\n".join(plans._travel(plan(Workspace(ran))))
    assert "beside the adapter each client receives a residual, which grows: 2.33 kB in the last round" in told
    monkeypatch.setattr(plans, "LARGEST_ADAPTER_BYTES", 2000)
    assert "nobody reads more than 2 kB of it" in "\n".join(plans._travel(plan(Workspace(ran))))


@pytest.mark.parametrize(("clients", "rank"), [(2, 4), (5, 16)])
def test_a_rank_is_no_larger_than_the_layer(clients: int, rank: int, workspace_folder: Path) -> None:
    """(K - 1) r = 4 and 16; in round 3 beneath it are two rounds, at most 16 inputs."""
    edit(workspace_folder / "fedcollm.toml", "clients = 3", f"clients = {clients}")
    agreement = agreed(workspace_folder, rounds=3).agreement
    layout: dict[str, tuple[int, ...]] = {A: (4, 16), B: (48, 4)}
    assert layout_after(0, agreement, layout) == {}
    assert layout_after(1, agreement, layout) == {A: (rank, 16), B: (48, rank)}
    assert layout_after(3, agreement, layout)[A] == (min(3 * rank, 16), 16)


def test_the_report_says_that_nothing_is_lost(ran: Path) -> None:
    workspace = Workspace(ran)
    first, second = findings.lost_by_averaging(workspace)
    assert (first["what"], second["round"]) == ("residual", 2)
    each = [product(tensors(workspace.client_update(1, k))) for k in CLIENTS]
    lost = np.linalg.norm(beneath(workspace.aggregate(1))) / np.linalg.norm(np.mean(each, axis=0))
    assert first["lost_percent"] == pytest.approx(100 * lost, rel=1e-4)
