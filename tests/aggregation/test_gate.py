"""aggregate's gate: an average that makes the SLM worse is not published; and rules other than the mean, end to end."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import ROOT, Outcome, edit, rows, scale, sign, write_rows
from stages.aggregate import aggregate
from stages.federation.run import run
from stages.workspace.paths import Workspace

ROUND = "exchange/round-0001"
AGGREGATE = "private/server/round-0001/aggregate"
WEIGHTS = "adapter_model.safetensors"
HELD_OUT = rows(70, start=200)
"""More than training's own sample of 64."""


@pytest.fixture
def held(answered: Path) -> Path:
    """Every client has answered in round 1, and the server has held-out rows."""
    write_rows(answered / "private/server/held-out.jsonl", HELD_OUT)
    return answered


def loss(folder: Path, adapter: Path) -> float:
    """Cross-entropy per answer token by transformers and PEFT alone, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/slm")
    base = AutoModelForCausalLM.from_pretrained(folder / "models/slm")
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    total = 0.0
    for row in HELD_OUT:
        ids = torch.tensor([tokenizer.encode(row["prompt"] + row["completion"])])
        with torch.no_grad():
            logits = model(ids).logits[0, -2]
        total -= float(torch.log_softmax(logits, -1)[ids[0, -1]])  # one word is the answer
    return total / len(HELD_OUT)


def manifest(folder: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((folder / AGGREGATE / "manifest.json").read_text())
    return found


def test_an_average_that_helps_is_published_with_both_losses(held: Path, fedcollm: Callable[..., Outcome]) -> None:
    aggregate(Workspace(held), round=1)
    plain = (held / AGGREGATE / WEIGHTS).read_bytes()
    outcome = fedcollm("aggregate", "--round", 1, "--gate", 0.5, "--overwrite", "-w", held)
    assert outcome.code == 0
    assert "warning" not in outcome.err
    assert (held / AGGREGATE / WEIGHTS).read_bytes() == plain
    metrics = manifest(held)["metrics"]
    assert (metrics["gate"], metrics["gate_kept"]) == (0.5, 0.0)
    assert metrics["gate_before"] == pytest.approx(loss(held, held / ROUND / "broadcast"), rel=1e-4)
    assert metrics["gate_after"] == pytest.approx(loss(held, held / AGGREGATE), rel=1e-4)
    assert metrics["gate_after"] < metrics["gate_before"]
    assert any(name.startswith("cross_term/") for name in metrics)


def test_an_average_that_harms_is_not_and_the_broadcast_is_published_byte_for_byte(
    held: Path, fedcollm: Callable[..., Outcome]
) -> None:
    for k in (1, 2, 3):
        scale(held / ROUND / f"client-{k}", -20)
    outcome = fedcollm("aggregate", "--round", 1, "--gate", 0.01, "-w", held)
    assert outcome.code == 0
    assert "warning: the old adapter is kept: loss on 70 held-out rows" in outcome.err
    for name in (WEIGHTS, "adapter_config.json"):
        assert (held / AGGREGATE / name).read_bytes() == (held / ROUND / "broadcast" / name).read_bytes()
    metrics = manifest(held)["metrics"]
    assert metrics["gate_kept"] == 1.0
    assert metrics["gate_after"] > metrics["gate_before"] + 0.01
    assert fedcollm("co-distill", "--round", 1, "-w", held).code == 0  # the round goes on


@pytest.mark.parametrize("words", [("--gate", 0.01), ("--keep-old",)])
def test_a_first_round_that_is_not_taken_scores_as_the_base_does(
    words: tuple[object, ...], held: Path, fedcollm: Callable[..., Outcome]
) -> None:
    """Its aggregate is the adapter that was drawn from the seed, whose B is zero: sound, though it changes nothing."""
    for k in (1, 2, 3):
        scale(held / ROUND / f"client-{k}", -20)
    assert fedcollm("aggregate", "--round", 1, *words, "-w", held).code == 0
    outcome = fedcollm("evaluate", "--round", 1, "--model", "aggregate", "-w", held)
    assert outcome.code == 0, outcome.err
    assert fedcollm("evaluate", "--zero-shot", "-w", held).code == 0
    kept, base = (
        json.loads((held / "results" / name).read_text())
        for name in ("round-0001/aggregate.json", "zero-shot/slm.json")
    )
    assert kept["tasks"] == base["tasks"]
    assert kept["adapter_sha256"] == hashlib.sha256((held / ROUND / "broadcast" / WEIGHTS).read_bytes()).hexdigest()


def test_an_average_that_changes_nothing_although_it_was_taken_is_not_scored(
    held: Path, fedcollm: Callable[..., Outcome]
) -> None:
    assert fedcollm("aggregate", "--round", 1, "--gate", 0.5, "-w", held).code == 0
    scale(held / AGGREGATE, 0)
    outcome = fedcollm("evaluate", "--round", 1, "--model", "aggregate", "-w", held)
    assert outcome.code == 6
    assert "the adapter does not change the model" in outcome.err


def test_the_gate_lets_through_what_rises_by_no_more_than_its_amount(held: Path) -> None:
    for k in (1, 2, 3):
        scale(held / ROUND / f"client-{k}", -1)
    metrics = aggregate(Workspace(held), round=1, gate=1e6).metrics
    rise = metrics["gate_after"] - metrics["gate_before"]
    assert rise > 0
    assert metrics["gate_kept"] == 0.0
    kept = [aggregate(Workspace(held), round=1, gate=rise * by, overwrite=True).metrics for by in (0.99, 1, 1.01)]
    assert [metrics["gate_kept"] for metrics in kept] == [1.0, 0.0, 0.0]


def test_an_average_whose_loss_is_no_number_is_kept_out_too(held: Path) -> None:
    for k in (1, 2, 3):
        adapter = held / ROUND / f"client-{k}"
        tensors = safetensors.numpy.load((adapter / WEIGHTS).read_bytes())
        huge = {name: np.full_like(tensor, 1e30) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(huge, adapter / WEIGHTS, metadata={"format": "pt"})
        sign(adapter)
    metrics = aggregate(Workspace(held), round=1, gate=1e6).metrics
    assert metrics["gate_kept"] == 1.0
    assert "gate_after" not in metrics
    assert (held / AGGREGATE / WEIGHTS).read_bytes() == (held / ROUND / "broadcast" / WEIGHTS).read_bytes()


def test_the_same_gate_again_is_already_done_and_another_is_refused(
    held: Path, fedcollm: Callable[..., Outcome]
) -> None:
    words = ("aggregate", "--round", 1, "-w", held)
    assert fedcollm(*words, "--gate", 0.5).code == 0
    assert "already done" in fedcollm(*words, "--gate", 0.5).err
    assert "already done" in fedcollm(*words).err  # whoever asks for none takes it as it is
    other = fedcollm(*words, "--gate", 0.25)
    assert other.code == 5
    assert "was made otherwise; changed since: the gate\n" in other.err
    assert "--overwrite" in other.err
    write_rows(held / "private/server/held-out.jsonl", HELD_OUT[:5])
    assert "changed since: the held-out rows\n" in fedcollm(*words, "--gate", 0.5).err
    assert fedcollm(*words, "--gate", 0.25, "--overwrite").code == 0


def test_one_that_passed_no_gate_is_not_taken_for_one_that_did(held: Path, fedcollm: Callable[..., Outcome]) -> None:
    words = ("aggregate", "--round", 1, "-w", held)
    assert fedcollm(*words).code == 0
    assert fedcollm(*words, "--gate", 0.5).code == 5


def test_without_held_out_rows_the_gate_waits_and_says_what_mends_it(
    answered: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("aggregate", "--round", 1, "--gate", 0.1, "-w", answered)
    assert outcome.code == 3
    assert "the gate needs held-out rows, and there are none" in outcome.err
    assert "private/server/held-out.jsonl" in outcome.err
    assert "mend  put JSONL rows there that nobody trains on, or set data.held_out_share" in outcome.err
    assert not (answered / AGGREGATE).exists()


@pytest.mark.parametrize("amount", ["nan", "inf", "-0.1"])
def test_an_amount_that_is_none_is_refused(amount: str, held: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("aggregate", "--round", 1, f"--gate={amount}", "-w", held)
    assert outcome.code == 2
    assert f"a gate of {amount} is no amount of loss" in outcome.err
    assert "mend  give a number such as --gate 0.1" in outcome.err


def test_a_held_out_row_without_an_answer_is_refused_by_line(held: Path, fedcollm: Callable[..., Outcome]) -> None:
    write_rows(held / "private/server/held-out.jsonl", [*HELD_OUT[:2], {"prompt": "Q : what ? A :"}])
    outcome = fedcollm("aggregate", "--round", 1, "--gate", 0.1, "-w", held)
    assert outcome.code == 4
    assert "line 3 of held-out.jsonl: no completion" in outcome.err


def test_a_model_is_loaded_only_where_there_is_a_gate(held: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stages.aggregate import aggregate\n"
        f"from stages.workspace.paths import Workspace; workspace = Workspace(Path({str(held)!r}))\n"
        "for gate in (None, 0.5):\n"
        "    aggregate(workspace, round=1, gate=gate, overwrite=True); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["False", "True"]


def test_run_asks_the_gate_of_the_settings_in_every_round(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[distillation]", "[aggregation]\ngate = 0.0\n\n[distillation]")
    write_rows(workspace_folder / "private/server/held-out.jsonl", HELD_OUT)
    run(Workspace(workspace_folder), scores=False)
    for number in (1, 2):
        path = workspace_folder / f"private/server/round-000{number}/aggregate/manifest.json"
        metrics = json.loads(path.read_text())["metrics"]
        assert metrics["gate"] == 0.0
        assert metrics["gate_kept"] == float(metrics["gate_after"] > metrics["gate_before"])


# --- other rules than the mean


def with_rule(folder: Path, lines: str, *, clients: int = 3) -> Path:
    """Agree on a rule after the fact, with as many clients; those beyond the third send what the third does."""
    toml = folder / "fedcollm.toml"
    edit(toml, "[distillation]", f"[aggregation]\n{lines}\n\n[distillation]")
    edit(toml, "clients = 3", f"clients = {clients}")
    agreement = hashlib.sha256(toml.read_bytes()).hexdigest()
    sign(folder / ROUND / "broadcast", agreement_sha256=agreement)
    broadcast = hashlib.sha256((folder / ROUND / "broadcast/manifest.json").read_bytes()).hexdigest()
    for k in range(1, clients + 1):
        if k > 3:
            shutil.copytree(folder / ROUND / "client-3", folder / ROUND / f"client-{k}")
        sign(folder / ROUND / f"client-{k}", agreement_sha256=agreement, parents={"broadcast": broadcast}, client=k)
    return folder


def weights(adapter: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load((adapter / WEIGHTS).read_bytes())


def test_a_poisoned_client_is_outvoted_by_the_median_and_the_warning_says_of_what(
    answered: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = with_rule(answered, 'rule = "median"')
    scale(folder / ROUND / "client-2", -1000)
    outcome = fedcollm("aggregate", "--round", 1, "-w", folder)
    assert outcome.code == 0
    assert "warning: median of A and of B, as they are: that is not the median of BA" in outcome.err
    updates = [weights(folder / ROUND / f"client-{k}") for k in (1, 2, 3)]
    for name, tensor in weights(folder / AGGREGATE).items():
        expected = np.median(np.stack([update[name] for update in updates]).astype(np.float64), axis=0)
        np.testing.assert_array_equal(tensor, expected.astype(np.float32))
    assert manifest(folder)["metrics"] == {"rule/median": 1.0}


def test_krum_publishes_the_update_of_one_client_and_names_it(answered: Path, fedcollm: Callable[..., Outcome]) -> None:
    folder = with_rule(answered, 'rule = "krum"\noutliers = 1', clients=5)
    outcome = fedcollm("aggregate", "--round", 1, "-w", folder)
    assert outcome.code == 0
    assert "warning" not in outcome.err
    # Clients 3, 4 and 5 sent the same: two neighbours at distance 0, which none is nearer to than they are.
    assert manifest(folder)["metrics"] == {"rule/krum": 1.0, "chosen/client-3": 1.0}
    assert (folder / AGGREGATE / WEIGHTS).read_bytes() == (folder / ROUND / "client-3" / WEIGHTS).read_bytes()


def test_who_was_shortened_stands_in_the_manifest(answered: Path, fedcollm: Callable[..., Outcome]) -> None:
    folder = with_rule(answered, 'rule = "clipped-mean"')
    scale(folder / ROUND / "client-2", -1000)
    assert fedcollm("aggregate", "--round", 1, "-w", folder).code == 0
    metrics = manifest(folder)["metrics"]
    assert metrics["rule/clipped-mean"] == 1.0
    assert metrics["shortened/client-2"] < 0.01
    assert [name for name in metrics if name.startswith("shortened/")] == ["shortened/client-2"]
