"""The model card: what manifest, agreement, split and scores say, and a command where there is nothing to say."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from builders import rewrite
from stages.artefacts.reading import read_artefact
from stages.artefacts.subjects import adapter_of
from stages.evaluate import evaluate
from stages.export.model_card import model_card
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
    assert "| LoRA | r 4, alpha 8, dropout 0.0, on PEFT's default modules |" in card
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


def test_a_card_is_tidy_markdown(finished: Path) -> None:
    for model in ("slm", "aggregate"):
        card = card_of(finished, model)
        assert card.startswith("---\nlibrary_name: peft\n")
        assert "{" not in card
        assert not re.search(r"\n{3,}|[ \t]\n|\A\n|\n\n\Z", card)
