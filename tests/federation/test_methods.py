"""The other methods: the same stages, the same start, the same budgets; only what each leaves out differs."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders import Outcome, adapters, edit
from stages.artefacts.reading import read_manifest
from stages.client_train import client_train
from stages.data.row_files import read_rows
from stages.federation.run import run
from stages.progress.status import status
from stages.workspace.paths import Workspace

WEIGHTS = "adapter_model.safetensors"
FEDERATED = ["fedavg", "fedavg-aux", "standalone"]


def of(folder: Path, method: str) -> Workspace:
    return Workspace(folder if method == "fedcollm" else folder / "baselines" / method)


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", FEDERATED)
def test_every_method_begins_with_the_same_broadcast_and_the_same_first_updates(
    method: str, studied_once: Path
) -> None:
    for home in (studied_once, studied_once / "seeds/seed-8"):
        ours, theirs = of(home, "fedcollm"), of(home, method)
        assert weights(theirs.broadcast(1)) == weights(ours.broadcast(1))
        for client in (1, 2):
            assert weights(theirs.client_update(1, client)) == weights(ours.client_update(1, client))
            assert theirs.client_data(client).read_bytes() == ours.client_data(client).read_bytes()


def test_another_seed_begins_with_another_broadcast(studied_once: Path) -> None:
    other = Workspace(studied_once / "seeds/seed-8")
    assert weights(other.broadcast(1)) != weights(Workspace(studied_once).broadcast(1))


@pytest.mark.parametrize("method", ["fedavg", "fedavg-aux", "fedcollm"])
def test_an_average_is_numpys_average_of_the_updates(method: str, studied_once: Path) -> None:
    workspace = of(studied_once, method)
    for round in (1, 2):
        updates = [load_file(workspace.client_update(round, client) / WEIGHTS) for client in (1, 2)]
        for name, tensor in load_file(workspace.aggregate(round) / WEIGHTS).items():
            stack = np.stack([update[name] for update in updates]).astype(np.float64)
            np.testing.assert_allclose(tensor, np.average(stack, axis=0, weights=[1, 1]), rtol=1e-6, atol=1e-9)


def test_weighted_by_samples_it_is_numpys_weighted_average(studied: Path) -> None:
    # One epoch of 11 rows is 3 steps of 4 rows, of 5 rows 2 steps: 12 examples against 8.
    edit(studied / "fedcollm.toml", "[evaluation]", '[aggregation]\nweighting = "samples"\n\n[evaluation]')
    run(Workspace(studied), method="fedavg", rounds=range(1, 2), scores=False, overwrite=True)
    workspace = of(studied, "fedavg")
    updates = [load_file(workspace.client_update(1, client) / WEIGHTS) for client in (1, 2)]
    for name, tensor in load_file(workspace.aggregate(1) / WEIGHTS).items():
        stack = np.stack([update[name] for update in updates]).astype(np.float64)
        np.testing.assert_allclose(tensor, np.average(stack, axis=0, weights=[12, 8]), rtol=1e-6, atol=1e-9)


def test_fedavg_broadcasts_in_round_two_the_average_of_round_one_byte_for_byte(studied_once: Path) -> None:
    workspace = of(studied_once, "fedavg")
    assert weights(workspace.broadcast(2)) == weights(workspace.aggregate(1))
    assert not workspace.slm(1).exists()
    assert not workspace.llm(1).exists()


def test_a_client_alone_goes_on_with_its_own_adapter_and_sees_no_other(studied: Path) -> None:
    workspace = of(studied, "standalone")
    assert not workspace.broadcast(2).exists()
    assert not workspace.aggregate(1).exists()
    for client in (1, 2):
        manifest, _ = read_manifest(workspace.client_update(2, client))
        own = workspace.client_update(1, client)
        assert manifest.parents == {f"client-{client}": read_manifest(own)[1]}
    # Client 2's second round is the same when client 1, and the broadcast, are not even there.
    before = weights(workspace.client_update(2, 2))
    for gone in (workspace.client_update(1, 1), workspace.client_update(2, 1), workspace.client_update(2, 2)):
        shutil.rmtree(gone)
    shutil.rmtree(workspace.broadcast(1))
    shutil.rmtree(workspace.client_data(1).parent)
    client_train(workspace, client=2, round=2)
    assert weights(workspace.client_update(2, 2)) == before


def test_fedavg_aux_is_fedcollm_with_both_lambdas_zero(studied_once: Path, studied: Path) -> None:
    by_hand = studied
    for made in ("baselines", "seeds", "exchange", "results"):
        shutil.rmtree(by_hand / made)
    for number in (1, 2):
        shutil.rmtree(by_hand / f"private/server/round-{number:04d}")
    edit(by_hand / "fedcollm.toml", "[distillation]", "[distillation]\nlambda_slm = 0.0\nlambda_llm = 0.0")
    run(Workspace(by_hand), scores=False)
    ours, theirs = Workspace(by_hand), of(studied_once, "fedavg-aux")
    for round in (1, 2):
        for place in ("broadcast", "aggregate", "slm", "llm"):
            assert weights(getattr(ours, place)(round)) == weights(getattr(theirs, place)(round)), (place, round)


def scored(results: Path) -> dict[str, bytes]:
    return {str(path.relative_to(results)): path.read_bytes() for path in results.rglob("*.json")}


@pytest.mark.parametrize("method", ["fedcollm", "standalone", "centralized"])
def test_scores_of_the_last_round_alone_are_those_of_all_rounds(method: str, studied: Path) -> None:
    place = of(studied, method).root / "results"
    everything = scored(place)
    shutil.rmtree(place)
    run(Workspace(studied), method=method, each_round=False)  # type: ignore[arg-type]
    assert scored(place) == {name: text for name, text in everything.items() if "round-0001" not in name}
    assert any("round-0001" in name for name in everything)


def test_without_distillation_the_llm_is_another_than_with(studied_once: Path) -> None:
    assert weights(of(studied_once, "fedavg-aux").llm(2)) != weights(of(studied_once, "fedcollm").llm(2))


def test_centralized_trains_the_llm_on_every_row_of_all_parties(studied_once: Path) -> None:
    root, workspace = of(studied_once, "fedcollm"), of(studied_once, "centralized")
    parties = [root.client_data(1), root.client_data(2), root.auxiliary_data]
    every_row = [row for place in parties for row in read_rows(place)[0]]
    assert read_rows(workspace.client_data(1))[0] == every_row
    assert len(every_row) == 11 + 5 + 7
    ours, theirs = read_manifest(root.llm(2))[0], read_manifest(workspace.client_update(2, 1))[0]
    assert theirs.base == ours.base
    assert theirs.lora == ours.lora
    assert theirs.parameters == ours.parameters


def test_centralized_takes_the_steps_and_the_settings_of_co_distill(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "steps = 5\nbatch_size = 4", "epochs = 1.5\nbatch_size = 2\ngradient_accumulation = 2\nwarmup_steps = 3")
    edit(toml, "llm_learning_rate = 1e-2", "llm_learning_rate = 3e-2\nllm_max_grad_norm = 0.5\nweight_decay = 0.1")
    toml.write_text(toml.read_text() + "\n[aggregation]\nmin_clients = 2\n")
    run(Workspace(workspace_folder), method="centralized", rounds=range(1, 2), scores=False)
    workspace = of(workspace_folder, "centralized")
    settings = workspace.agreement.client_training
    # 1.5 epochs of 12 auxiliary rows, 2 x 2 rows a step: ceil(18 / 4) = 5 steps of 4 examples.
    assert (settings.steps, settings.epochs) == (5, None)
    assert (settings.batch_size, settings.gradient_accumulation, settings.warmup_steps) == (2, 2, 3)
    assert (settings.learning_rate, settings.max_grad_norm, settings.weight_decay) == (3e-2, 0.5, 0.1)
    assert workspace.agreement.slm == workspace.agreement.llm
    manifest, _ = read_manifest(workspace.client_update(1, 1))
    assert (manifest.steps, manifest.examples) == (5, 20)


COMMANDS = {
    "fedavg": ["broadcast", "client-train --client 1", "client-train --client 2", "aggregate"],
    "fedavg-aux": ["broadcast", "client-train --client 1", "client-train --client 2", "aggregate", "co-distill"],
    "standalone": ["client-train --client 1", "client-train --client 2"],
    "centralized": ["client-train --client 1"],
}


@pytest.mark.parametrize("method", COMMANDS)
def test_the_separate_commands_leave_the_very_bytes_of_run(
    method: str, studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = studied / "baselines" / method
    before = adapters(folder)
    shutil.rmtree(folder / "exchange")
    for made in folder.glob("private/*/round-*"):
        shutil.rmtree(made)
    first = [] if "broadcast" in COMMANDS[method] else ["broadcast --round 1"]
    for command in [*first, *(f"{command} --round {round}" for round in (1, 2) for command in COMMANDS[method])]:
        outcome = fedcollm(*command.split(), "--workspace", folder)
        assert outcome.code == 0, outcome.err
        assert "already done" not in outcome.err
    assert adapters(folder) == before


@pytest.mark.parametrize(
    ("method", "command", "message"),
    [
        ("fedavg", "co-distill --round 1", "method fedavg has no co-distill"),
        ("fedavg", "evaluate --round 1 --model llm", "method fedavg has no co-distill"),
        ("standalone", "aggregate --round 1", "method standalone has no aggregate"),
        ("standalone", "broadcast --round 2", "method standalone has no broadcast after round 1"),
        ("standalone", "co-distill --round 2", "method standalone has no co-distill"),
        ("standalone", "evaluate --round 2 --model aggregate", "method standalone has no aggregate"),
        ("centralized", "aggregate --round 1", "method centralized has no aggregate"),
    ],
)
def test_a_step_that_the_method_does_not_have_is_refused(
    method: str, command: str, message: str, studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm(*command.split(), "-w", studied_once / "baselines" / method)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert "fedcollm status names the next step" in outcome.err


@pytest.mark.parametrize("command", ["evaluate --round 1", "export --round 1"])
def test_where_nothing_is_distilled_the_default_model_is_named_another(
    command: str, studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm(*command.split(), "-w", studied_once / "baselines/fedavg")
    assert outcome.code == 2, outcome.err
    assert "method fedavg ends a round with the average" in outcome.err
    assert "give --model aggregate" in outcome.err


@pytest.mark.parametrize("method", COMMANDS)
def test_status_leads_through_a_whole_federation_of_each_method(
    method: str, studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = studied / "baselines" / method
    before = adapters(folder)
    shutil.rmtree(folder / "exchange")
    shutil.rmtree(folder / "results")
    for made in folder.glob("private/*/round-*"):
        shutil.rmtree(made)
    given = []
    while command := str(json.loads(fedcollm("status", "--json", "-w", folder).out)["next_command"]):
        name, *words = shlex.split(command)
        assert name == "fedcollm"
        outcome = fedcollm(*words)
        assert outcome.code == 0, outcome.err
        assert "already done" not in outcome.err
        given.append(command)
        assert len(given) < 20
    assert {name: digest for name, digest in adapters(folder).items() if not name.startswith("results")} == {
        name: digest for name, digest in before.items() if not name.startswith("results")
    }
    assert "everything is done" in fedcollm("status", "-w", folder).out


@pytest.mark.parametrize("method", COMMANDS)
def test_status_of_a_finished_federation_finds_every_step_done(method: str, studied_once: Path) -> None:
    found = status(of(studied_once, method), verify=True)
    steps = {
        "fedavg": ["broadcast", "client-1", "client-2", "aggregate"],
        "fedavg-aux": ["broadcast", "client-1", "client-2", "aggregate", "llm", "slm"],
        "standalone": ["client-1", "client-2"],
        "centralized": ["client-1"],
    }[method]
    assert [step.name for step in found.rounds[1].steps] == steps
    assert all(round.is_done for round in found.rounds)
    assert (found.next_command, found.waiting_for) == (None, "")


def test_an_update_made_again_makes_the_clients_next_round_stale_where_nothing_is_averaged(studied: Path) -> None:
    folder = studied / "baselines/standalone"
    data = folder / "private/client-2/train.jsonl"
    kept = data.read_text().splitlines()[:4]
    data.unlink()  # a hard link to the study's
    data.write_text("\n".join(kept) + "\n")
    client_train(Workspace(folder), client=2, round=1, overwrite=True)
    found = status(Workspace(folder))
    conditions = {step.name: step.condition for step in found.rounds[1].steps}
    assert conditions == {"client-1": "done", "client-2": "stale"}
    assert str(found.next_command) == "fedcollm client-train --client 2 --round 2 --overwrite"
