"""The model card: what manifest, agreement, split and scores say, and a command where there is nothing to say."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from builders import edit, rewrite
from stages.artefacts.reading import read_artefact
from stages.artefacts.subjects import adapter_of
from stages.evaluate import evaluate
from stages.export.model_card import model_card
from stages.workspace.attacks import Attack
from stages.workspace.paths import Workspace


def card_of(folder: Path, model: str = "slm", *, client: int | None = None) -> str:
    workspace = Workspace(folder)
    adapter = adapter_of(workspace, model, 2, client)  # type: ignore[arg-type]
    subject = f"client-{client}" if client else model
    return model_card(workspace, adapter, subject, merged=False, base_model=None, revision=None)


@pytest.mark.parametrize(
    ("model", "client", "how"),
    [
        ("slm", None, "then taught by the server's large one"),
        ("llm", None, "taught by the clients' averaged small one"),
        ("aggregate", None, "The average of the clients' small models. Made with FedCoLLM"),
        ("slm", 3, "The small model of client 3"),
    ],
)
def test_a_card_says_how_the_model_was_made(model: str, client: int | None, how: str, finished: Path) -> None:
    card = card_of(finished, model, client=client)
    assert f"# tiny: {f'client-{client}' if client else model} of round 2" in card
    assert how in card
    assert "FedCoLLM (https://arxiv.org/abs/2411.11707)" in card
    asked = f"--client {client}" if client else f"--model {model}"
    assert f"Not evaluated: `fedcollm evaluate --round 2 {asked}`" in card


def test_a_card_gives_the_training_the_losses_and_the_hashes(finished: Path) -> None:
    folder = finished / "private/server/round-0002/llm"
    manifest = read_artefact(folder).manifest
    card = card_of(finished, "llm")
    assert "| round | 2 of 2 |" in card
    assert "| clients | 3 |" in card
    assert "| LoRA | r 4, alpha 8, dropout 0.0, on c_attn, PEFT's default for this architecture |" in card
    assert f"| parameters of the adapter | {manifest.parameters} |" in card
    assert "6 steps of AdamW, 4 rows a step, learning rate 0.01 |" in card
    assert "| this round's co-distill | 5 steps, 20 examples, " in card
    before, after = manifest.metrics["llm_ft_before"], manifest.metrics["llm_ft_after"]
    assert f"| {before:.4g} before this round's co-distill, {after:.4g} after |" in card
    for path in (folder / "adapter_model.safetensors", folder / "manifest.json", finished / "fedcollm.toml"):
        assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}` |" in card
    assert manifest.base.weights_sha256 in card
    assert manifest.base.tokenizer_sha256 in card
    assert "Private data of 3 clients and auxiliary data of the server." in card
    assert "| party | rows |" not in card


def test_a_card_tells_the_rows_of_each_party_where_prepare_has_dealt_them(finished: Path) -> None:
    agreement = hashlib.sha256((finished / "fedcollm.toml").read_bytes()).hexdigest()
    split = finished / "private/split.json"
    parties = {"client-1": {"rows": 12}, "server": {"rows": 7}}
    split.write_text(json.dumps({"agreement_sha256": agreement, "parties": parties}))
    assert "| party | rows |\n|---|---|\n| client-1 | 12 |\n| server | 7 |\n" in card_of(finished)
    split.write_text(json.dumps({"agreement_sha256": "0" * 64, "parties": parties}))
    assert "| party | rows |" not in card_of(finished)


def test_a_card_calls_rows_those_of_a_task_only_where_prepare_has_dealt_them(finished: Path) -> None:
    adapter = adapter_of(Workspace(finished), "slm", 2, None)
    with (finished / "fedcollm.toml").open("a") as file:
        file.write('\n[data]\ntasks = ["arc_easy"]\n')
    own = "Private data of 3 clients and auxiliary data of the server."
    dealt = "Training rows of the lm-eval tasks arc_easy, divided among 3 clients and the server."
    card = model_card(Workspace(finished), adapter, "slm", merged=False, base_model=None, revision=None)
    assert (own in card, dealt in card) == (True, False)
    (finished / "private/split.json").write_text(json.dumps({"agreement_sha256": "0" * 64, "parties": {}}))
    card = model_card(Workspace(finished), adapter, "slm", merged=False, base_model=None, revision=None)
    assert (own in card, dealt in card) == (False, True)


def test_a_card_gives_the_scores_of_this_adapter_beside_the_base_s_and_no_others(finished: Path) -> None:
    workspace = Workspace(finished)
    ours = evaluate(workspace, round=2)["tasks"]["colours"]["metrics"]
    shown = f"{ours['acc']:.4f} ± {ours['acc_stderr']:.4f}"
    assert f"| colours | 12 | acc | {shown} | - |" in card_of(finished)
    base = evaluate(workspace)["tasks"]["colours"]["metrics"]
    assert f"| {shown} | {base['acc']:.4f} ± {base['acc_stderr']:.4f} |" in card_of(finished)
    assert "Not evaluated" not in card_of(finished)

    result = finished / "results/round-0002/slm.json"
    rewrite(result, json.loads(result.read_text()) | {"adapter_sha256": "0" * 64})
    assert "Not evaluated: `fedcollm evaluate --round 2 --model slm`" in card_of(finished)
    assert "colours" not in card_of(finished)


def test_a_card_names_the_attack_and_sets_beside_it_what_was_measured_under_the_same(finished: Path) -> None:
    workspace = Workspace(finished)
    near, far = Attack(radius=0.1, steps=2), Attack(radius=0.2, steps=2)
    ours = evaluate(workspace, round=2, attack=near)["tasks"]["colours"]["metrics"]
    shown = f"{ours['robust_acc']:.4f} ± {ours['robust_acc_stderr']:.4f}"
    evaluate(workspace, attack=far)
    assert f"| robust_acc (radius 0.1, steps 2) | {shown} | - |" in card_of(finished)
    base = evaluate(workspace, attack=near)["tasks"]["colours"]["metrics"]
    beside = f"{base['robust_acc']:.4f} ± {base['robust_acc_stderr']:.4f}"
    assert f"| robust_acc (radius 0.1, steps 2) | {shown} | {beside} |" in card_of(finished)


def test_a_card_is_tidy_markdown(finished: Path) -> None:
    for model in ("slm", "aggregate"):
        card = card_of(finished, model)
        assert card.startswith("---\nlibrary_name: peft\n")
        assert "{" not in card
        assert not re.search(r"\n{3,}|[ \t]\n|\A\n|\n\n\Z", card)


# --- FedMKT


def test_a_card_of_a_client_s_own_model_says_what_fedmkt_is_and_who_taught_it(unlike: Path) -> None:
    workspace = Workspace(unlike).of_client(2)
    adapter = adapter_of(workspace, "slm", 2, 2)
    card = model_card(workspace, adapter, "client-2", merged=False, base_model=None, revision=None)
    assert "The model of client 2, tuned on its own data and then on public rows, on which the server's large" in card
    assert "FedMKT (https://arxiv.org/abs/2406.02224): each client tunes a LoRA adapter of a model of its own" in card
    taught = int(adapter.manifest.metrics["rows_from_server"])
    llm = read_artefact(unlike / "private/server/round-0002/llm").manifest.base
    assert f"| the server | of architecture llama, weights {llm.weights_sha256} | {taught} |" in card
    assert "on those of the models that it learned from, and on the data" in card
    modules = "q_proj, v_proj, PEFT's default for this architecture"
    assert f"| LoRA | r 2, alpha 16, dropout 0.0, on {modules} |" in card  # its own, not [slm]'s
    assert "public rows, the same at every party." in card
    assert "| training on public rows, each round | 5 steps of AdamW, 4 rows a step, learning rate 0.01 |" in card
    assert not re.search(r"\n{3,}|[ \t]\n|\A\n|\n\n\Z", card)


def test_a_card_of_the_llm_names_every_client_that_taught_it(unlike: Path) -> None:
    edit(unlike / "fedcollm.toml", "models/slm-3", "facebook/opt-1.3b")
    workspace = Workspace(unlike)
    adapter = read_artefact(workspace.llm(2))
    card = model_card(workspace, adapter, "llm", merged=False, base_model=None, revision=None)
    assert "tuned at the server on public rows, on which the clients' models taught it. Made with FedMKT" in card
    rows = {k: int(adapter.manifest.metrics[f"rows_from_client-{k}"]) for k in (1, 2, 3)}
    for k in (1, 2):
        assert re.search(rf"\| client {k} \| of architecture \w+, weights [0-9a-f]{{64}} \| {rows[k]} \|", card)
    assert f"| client 3 | facebook/opt-1.3b | {rows[3]} |" in card


def test_the_scores_beside_are_of_the_client_s_own_base(unlike_studied_once: Path) -> None:
    workspace = Workspace(unlike_studied_once).of_client(2)
    adapter = adapter_of(workspace, "slm", 1, 2)
    card = model_card(workspace, adapter, "client-2", merged=False, base_model=None, revision=None)
    shown = []
    for place in ("round-0001", "zero-shot"):
        result = json.loads((unlike_studied_once / f"results/{place}/client-2.json").read_text())
        metrics = result["tasks"]["arc_easy"]["metrics"]
        shown.append(f"{metrics['acc']:.4f} ± {metrics['acc_stderr']:.4f}")
    assert f"| arc_easy | 20 | acc | {shown[0]} | {shown[1]} |" in card
