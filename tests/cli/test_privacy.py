"""client-train with [privacy]: what is spent, refused and shown; and with or without it, updates that are shortened."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedcollm_cli.console
from builders import Outcome, edit, published, rows, write_rows
from processes import SLOWLY, start
from stages.accounting.accountant import Charge, total_epsilon
from stages.accounting.ledger import charges, read_ledger
from stages.audit.audit import audit
from stages.client_train import client_train
from stages.progress.status import status
from stages.runtime.events import Event
from stages.workspace.paths import Workspace

Fedcollm = Callable[..., Outcome]
Refuse = Callable[..., str]

TRAIN = ("client-train", "--round", 1, "--client", 1)
UPDATE = "exchange/round-0001/client-1"
LOSSES = re.compile("_before|_after|slm_ft")


def privately(folder: Path, settings: str = "noise_multiplier = 1.0") -> Path:
    toml = folder / "fedcollm.toml"
    toml.write_text(f"{toml.read_text()}\n[privacy]\n{settings}\n")
    return folder


@pytest.fixture
def private(workspace_folder: Path, fedcollm: Fedcollm) -> Path:
    """A workspace with noise 1 and no budget, in which round 1 has been broadcast."""
    privately(workspace_folder)
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    return workspace_folder


def manifest(folder: Path, update: str = UPDATE) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / update / "manifest.json").read_text())
    return found


def ledger(folder: Path) -> Path:
    return folder / "private/client-1/privacy-ledger.jsonl"


def spent(folder: Path) -> list[Charge]:
    return charges(read_ledger(ledger(folder)))


def tensors(folder: Path, name: str = UPDATE) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = load_file(folder / name / "adapter_model.safetensors")
    return found


def moved(folder: Path, update: str = UPDATE) -> float:
    before, after = tensors(folder, "exchange/round-0001/broadcast"), tensors(folder, update)
    return math.sqrt(sum(float(((after[name] - before[name]).astype(np.float64) ** 2).sum()) for name in after))


def test_the_manifest_says_epsilon_and_delta_and_nothing_of_the_data(private: Path, fedcollm: Fedcollm) -> None:
    assert fedcollm(*TRAIN, "-w", private).code == 0
    found = manifest(private)
    expected = total_epsilon([Charge(1.0, 4 / 12, 6)], 1e-5)  # 12 rows, six steps of 4
    assert found["privacy"] == {
        "unit": "example",
        "epsilon": math.ceil(expected * 1e4) / 1e4,
        "delta": 1e-5,
        "reset": False,
        "ledger_sha256": read_ledger(ledger(private))[-1].sha256,
    }
    assert set(found["metrics"]) == {"update_norm", "lora_b_norm"}
    assert (found["steps"], found["examples"], found["tokens"], found["seed"]) == (6, 6 * 4, 0, None)
    assert not LOSSES.search((private / UPDATE / "manifest.json").read_text())
    log = (private / "private/client-1/round-0001/client-train.jsonl").read_text()
    assert len(LOSSES.findall(log)) >= 3  # they are there


def test_without_privacy_no_manifest_speaks_of_it_and_no_ledger_is_begun(finished_once: Path) -> None:
    assert manifest(finished_once)["privacy"] is None
    assert not ledger(finished_once).exists()


def test_the_same_command_from_the_same_seed_gives_other_adapters(
    private: Path, fedcollm: Fedcollm, tmp_path: Path
) -> None:
    twin = shutil.copytree(private, tmp_path / "twin", symlinks=True)
    for folder in (private, twin):
        assert fedcollm(*TRAIN, "-w", folder).code == 0
    one, other = tensors(private), tensors(twin)
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    written = b"".join(path.read_bytes() for path in (private / "private/client-1").rglob("*") if path.is_file())
    assert b"seed" not in written


def test_what_is_done_is_done_and_spends_nothing(private: Path, fedcollm: Fedcollm) -> None:
    assert fedcollm(*TRAIN, "-w", private).code == 0
    before = published(private)
    outcome = fedcollm(*TRAIN, "-w", private)
    assert outcome.code == 0
    assert "already done" in outcome.err
    assert published(private) == before


def test_overwriting_spends_again(private: Path, fedcollm: Fedcollm) -> None:
    assert fedcollm(*TRAIN, "-w", private).code == 0
    first = manifest(private)["privacy"]["epsilon"]
    assert fedcollm(*TRAIN, "--overwrite", "-w", private).code == 0
    assert spent(private) == [Charge(1.0, 4 / 12, 6)] * 2
    assert manifest(private)["privacy"]["epsilon"] > first


def test_beyond_the_budget_nothing_is_loaded_or_trained(
    workspace_folder: Path, fedcollm: Fedcollm, refused: Refuse
) -> None:
    privately(workspace_folder, "noise_multiplier = 1.0\nepsilon = 3.0")
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    (workspace_folder / "models").unlink()  # whoever looked for a model would end otherwise
    told = refused(workspace_folder, 6, *TRAIN)
    assert re.search(r"error: round 1 would bring client 1 to epsilon 6\.\d+, the budget is 3\n", told)
    assert "mend  nothing was trained; agree on a larger privacy.epsilon" in told
    assert not ledger(workspace_folder).exists()


def test_two_rounds_keep_to_the_budget_and_a_third_helping_does_not(
    workspace_folder: Path, fedcollm: Fedcollm, refused: Refuse
) -> None:
    privately(workspace_folder, "noise_multiplier = 1.0\nepsilon = 9.0")  # 6.8 for a round, 8.9 for two
    outcome = fedcollm("run", "--no-scores", "-w", workspace_folder)
    assert outcome.code == 0, outcome.err
    for client in (1, 2, 3):
        first, second = (
            manifest(workspace_folder, f"exchange/round-000{round}/client-{client}")["privacy"]["epsilon"]
            for round in (1, 2)
        )
        assert first < second <= 9.0
    assert all(round.is_done for round in status(Workspace(workspace_folder)).rounds)
    again = ("client-train", "--round", 2, "--client", 1, "--overwrite")
    assert "would bring client 1 to epsilon" in refused(workspace_folder, 6, *again)


def test_a_target_epsilon_is_met_by_the_last_round(workspace_folder: Path, fedcollm: Fedcollm) -> None:
    privately(workspace_folder, "epsilon = 8.0")
    assert fedcollm("run", "--no-scores", "-w", workspace_folder).code == 0
    assert 7.9 < manifest(workspace_folder, "exchange/round-0002/client-3")["privacy"]["epsilon"] <= 8.0


def test_rows_that_are_left_out_do_not_count(private: Path, fedcollm: Fedcollm) -> None:
    edit(private / "fedcollm.toml", "[distillation]", 'max_length = 13\n[data]\ntoo_long = "skip"\n[distillation]')
    data = write_rows(private / "private/client-1/train.jsonl", rows(8))
    long = {"prompt": "red " * 20, "completion": " red"}
    data.write_text(data.read_text() + (json.dumps(long) + "\n") * 8)
    assert fedcollm("broadcast", "--round", 1, "--overwrite", "-w", private).code == 0
    outcome = fedcollm(*TRAIN, "-w", private)
    assert outcome.code == 0, outcome.err
    assert spent(private) == [Charge(1.0, 4 / 8, 6)]


def test_without_opacus_the_mend_is_named(private: Path, fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    before = published(private)
    outcome = fedcollm(*TRAIN, "-w", private)
    assert outcome.code == 2
    assert "error: differential privacy needs opacus, which is not installed" in outcome.err
    assert "mend  pip install '.[dp]'" in outcome.err
    assert published(private) == before


def test_gradient_checkpointing_is_refused(private: Path, refused: Refuse) -> None:
    (private / "machine.toml").write_text("gradient_checkpointing = true\n")
    assert "hides the gradient of each example" in refused(private, 2, *TRAIN)


def test_a_lost_ledger_is_refused_until_somebody_says_that_they_understand(
    private: Path, fedcollm: Fedcollm, refused: Refuse
) -> None:
    assert fedcollm(*TRAIN, "-w", private).code == 0
    ledger(private).unlink()
    failed = [one for one in audit([private]) if one.id == "A10" and one.level == "FAIL"]
    assert [one.found for one in failed] == ["is missing"]
    told = refused(private, 4, *TRAIN, "--overwrite")
    assert f"error: privacy-ledger.jsonl is missing: what {UPDATE}" in told
    assert "--i-understand-reset" in told
    outcome = fedcollm(*TRAIN, "--overwrite", "--i-understand-reset", "-w", private)
    assert outcome.code == 0, outcome.err
    assert "warning: client 1's privacy ledger begins anew: epsilon counts from zero" in outcome.err
    assert json.loads(ledger(private).read_text().splitlines()[0])["entry"]["rounds"] == [1]
    assert fedcollm(*TRAIN, "--overwrite", "-w", private).code == 0
    assert manifest(private)["privacy"]["reset"]
    assert len(spent(private)) == 2
    found = [one for one in audit([private]) if one.id == "A10"]
    assert [one.level for one in found] == ["WARN", "WARN"], found


def test_a_lost_ledger_is_missed_by_the_log_alone(private: Path, fedcollm: Fedcollm, refused: Refuse) -> None:
    assert fedcollm(*TRAIN, "-w", private).code == 0
    ledger(private).unlink()
    shutil.rmtree(private / UPDATE)
    assert any(one.id == "A10" and one.found == "is missing" for one in audit([private]))
    assert "privacy-ledger.jsonl is missing" in refused(private, 4, *TRAIN)


def test_an_older_copy_of_the_ledger_is_refused(private: Path, fedcollm: Fedcollm, refused: Refuse) -> None:
    assert fedcollm("run", "--rounds", 1, "--no-scores", "-w", private).code == 0
    older = ledger(private).read_bytes()
    assert fedcollm("run", "--no-scores", "-w", private).code == 0
    ledger(private).write_bytes(older)
    told = refused(private, 4, *TRAIN, "--overwrite")
    assert "privacy-ledger.jsonl does not know what exchange/round-0002/client-1" in told


@pytest.mark.parametrize("left", ["the adapter", "the log"])
def test_a_ledger_whose_last_lines_are_gone_is_refused(
    private: Path, fedcollm: Fedcollm, refused: Refuse, left: str
) -> None:
    assert fedcollm(*TRAIN, "-w", private).code == 0
    once = ledger(private).read_bytes()
    assert fedcollm(*TRAIN, "--overwrite", "-w", private).code == 0
    ledger(private).write_bytes(once)  # whole in itself, and it knows the round
    if left == "the log":
        shutil.rmtree(private / UPDATE)
    told = refused(private, 4, *TRAIN, "--overwrite")
    assert "privacy-ledger.jsonl has been cut short, or is another one" in told
    assert any(one.id == "A10" and one.level == "FAIL" and "last lines" in one.found for one in audit([private]))
    assert ledger(private).read_bytes() == once
    assert fedcollm(*TRAIN, "--overwrite", "--i-understand-reset", "-w", private).code == 0
    assert fedcollm(*TRAIN, "--overwrite", "-w", private).code == 0  # the reset gave the lost lines up


def test_an_edited_ledger_is_refused(private: Path, fedcollm: Fedcollm, refused: Refuse) -> None:
    assert fedcollm(*TRAIN, "-w", private).code == 0
    edit(ledger(private), '"steps": 6', '"steps": 1')
    assert "line 1 of privacy-ledger.jsonl has been changed" in refused(private, 4, *TRAIN, "--overwrite")


def test_trackers_get_no_losses(private: Path, fedcollm: Fedcollm) -> None:
    (private / "machine.toml").write_text('trackers = ["tensorboard"]\n')
    outcome = fedcollm(*TRAIN, "-w", private)
    assert outcome.code == 0, outcome.err
    assert "warning: trackers get nothing" in outcome.err
    assert not (private / "private/client-1/tensorboard").exists()


def test_the_report_leaves_the_losses_of_private_training_out(private: Path, fedcollm: Fedcollm) -> None:
    assert fedcollm("run", "--rounds", 1, "--no-scores", "-w", private).code == 0
    assert fedcollm("report", "--quiet", "-w", private).code == 0
    assert not list((private / "results/report").rglob("*loss-client-train*"))


def test_a_finished_run_cannot_be_released_again_from_a_copied_checkpoint(
    private: Path, refused: Refuse, tmp_path: Path
) -> None:
    (private / "machine.toml").write_text("checkpoint_steps = 2\n")
    unfinished, copies = Workspace(private).unfinished("client-train", 1, 1), [tmp_path / "mid", tmp_path / "last"]

    def copy(event: Event) -> None:
        if event.kind == "step" and event.step == 3:
            shutil.copytree(unfinished, copies[0])
        if event.kind == "note":  # how training went: nothing is published yet
            shutil.copytree(unfinished, copies[1])

    client_train(Workspace(private), client=1, round=1, report=copy)
    adapter = tensors(private)
    shutil.move(private / UPDATE, tmp_path / "released")
    shutil.copytree(copies[0], unfinished)
    told = refused(private, 5, *TRAIN)
    assert "by privacy-ledger.jsonl this run has finished; its checkpoint of step 2 must not be used again" in told
    shutil.rmtree(unfinished)
    shutil.copytree(copies[1], unfinished)  # as after a crash between the ledger's line and publishing
    client_train(Workspace(private), client=1, round=1)
    assert all(np.array_equal(adapter[name], again) for name, again in tensors(private).items())
    assert spent(private) == [Charge(1.0, 4 / 12, 6)]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint_and_has_spent_once(
    private: Path, fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(private / "fedcollm.toml", "\nsteps = 6\n", "\nsteps = 300\n")
    (private / "machine.toml").write_text("checkpoint_steps = 20\n")
    assert fedcollm("broadcast", "--round", 1, "--overwrite", "-w", private).code == 0
    work = start(*TRAIN, "-w", private, environment=SLOWLY)
    work.wait_until(lambda: any(private.glob("private/client-1/round-0001/.client-train/*/checkpoint-[1-9]*/complete")))
    code, said = work.stop(signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert spent(private) == [Charge(1.0, 4 / 12, 300)]
    assert not (private / UPDATE).exists()

    monkeypatch.setattr(fedcollm_cli.console, "PLAIN_INTERVAL_S", 0.0)
    outcome = fedcollm(*TRAIN, "-w", private)
    assert outcome.code == 0, outcome.err
    steps = [int(step) for step in re.findall(r" (\d+)/300 ", outcome.err)]
    assert steps[0] > 1
    assert (steps[0] - 1) % 20 == 0
    assert spent(private) == [Charge(1.0, 4 / 12, 300)]
    assert [line.entry.kind for line in read_ledger(ledger(private))] == ["reserved", "resumed", "finished"]
    assert manifest(private)["steps"] == 300


# --- max_update_norm, with privacy and without


@pytest.mark.parametrize("settings", ["", "noise_multiplier = 1.0"], ids=["open", "private"])
def test_a_long_update_is_shortened_before_it_is_published(
    settings: str, workspace_folder: Path, fedcollm: Fedcollm
) -> None:
    if settings:
        privately(workspace_folder, settings)
    edit(workspace_folder / "fedcollm.toml", "[distillation]", "[aggregation]\nmax_update_norm = 0.01\n[distillation]")
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    outcome = fedcollm(*TRAIN, "-w", workspace_folder)
    assert outcome.code == 0, outcome.err
    assert re.search(r"update shortened from norm 0\.\d+ to 0\.01", outcome.err)
    assert moved(workspace_folder) == pytest.approx(0.01, rel=1e-4)
    metrics = manifest(workspace_folder)["metrics"]
    assert metrics["update_norm"] == pytest.approx(moved(workspace_folder), rel=1e-6)
    if not settings:  # the loss of what is published, which has hardly moved
        assert metrics["slm_ft_after"] == pytest.approx(metrics["slm_ft_before"], rel=0.01)


def test_a_short_update_is_left_alone(workspace_folder: Path, fedcollm: Fedcollm, finished_once: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[distillation]", "[aggregation]\nmax_update_norm = 1e3\n[distillation]")
    assert fedcollm("broadcast", "--round", 1, "-w", workspace_folder).code == 0
    outcome = fedcollm(*TRAIN, "-w", workspace_folder)
    assert "shortened" not in outcome.err
    one, other = tensors(workspace_folder), tensors(finished_once)
    assert all(np.array_equal(one[name], other[name]) for name in one)
