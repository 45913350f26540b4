"""fedcollm shear: from the LLM to a model that [slm] names, trained, exported and scored as any base; interrupted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedModel

from builders import Outcome, drafts, edit, make_workspace
from stages.shearing.card import in_digits

CUT = ("shear", "--layers", 1, "--length", 16)


@pytest.fixture
def study(tmp_path: Path, base_models: Path) -> Path:
    """A workspace that has no SLM yet: [slm] names the folder that shear writes."""
    folder = make_workspace(tmp_path / "study", base_models)
    (folder / "models").unlink()
    shutil.copytree(base_models / "llm", folder / "models/llm")
    return folder


def test_a_sheared_model_goes_through_a_round_as_any_base(study: Path, fedcollm: Callable[..., Outcome]) -> None:
    at = ("-w", study)
    outcome = fedcollm(*CUT, "--heal", 4, "--heal-on", "auxiliary", "--json", *at)
    assert outcome.code == 0, outcome.err
    made = json.loads(outcome.out)
    assert made["path"] == "models/slm"
    assert made["heal"] == {"steps": 4, "learning_rate": 3e-4, "batch_size": 8}
    assert set(made["perplexity"]) == {"whole", "cut", "healed"}

    planned = json.loads(fedcollm("plan", "--json", *at).out)
    assert planned["missing"] == []
    whole, cut = (planned["models"][role]["parameters"] for role in (1, 0))
    loaded: Any = AutoModelForCausalLM.from_pretrained(study / "models/slm")
    assert cut == loaded.num_parameters() < whole
    for words in (("run", "--rounds", 1), ("export", "--round", 1, "--merged")):
        outcome = fedcollm(*words, *at)
        assert outcome.code == 0, outcome.err

    model = HFLM(pretrained=str(study / "models/slm"), device="cpu")
    [ids] = model.tok_batch_encode(["Q : what colour"])[0]
    with torch.no_grad():
        assert torch.equal(model.model(ids[None]).logits, loaded.eval()(ids[None]).logits)


def test_the_choice_is_printed(study: Path, fedcollm: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red blue green square\n\n" * 12)
    (tmp_path / "b.txt").write_text("circle star big small\n\n" * 12)
    words = ("--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt", "--to", study / "small")
    outcome = fedcollm(*CUT, *words, "-w", study)
    assert outcome.code == 0, outcome.err
    made = json.loads((study / "small/shearing.json").read_text())
    assert (made["text"], len(made["text_sha256"])) == ("files", 2)
    lines = [line.split() for line in outcome.out.splitlines() if line.strip()]
    assert lines[0] == ["block", "influence", "kept"]
    [kept] = made["kept"]
    for block, influence in enumerate(made["influence"]):
        assert lines[2 + block] == [str(block), f"{influence:.4f}", *(["yes"] if block == kept else [])]
    assert lines[-1] == ["small"]


def test_what_is_already_made_is_told_in_the_words_of_the_first_time(
    study: Path, fedcollm: Callable[..., Outcome]
) -> None:
    words = (*CUT, "--heal", 2, "--heal-on", "auxiliary", "-w", study)
    first, again = fedcollm(*words), fedcollm(*words)
    assert "already done" in again.err
    assert again.out == first.out
    assert re.search(r"^perplexity: whole [\d.,]+, cut [\d.,]+, healed [\d.,]+$", first.out, re.MULTILINE)


def test_a_large_perplexity_is_written_out() -> None:
    shown = {11.8765: "11.88", 9999.4: "9999", 9999.6: "10,000", 24_587.3: "24,587", 1e300: "1e+300"}
    assert {value: in_digits(value) for value in shown} == shown


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("knobs", ["", "micro_batch = 3\ngradient_checkpointing = true\n", 'micro_batch = "auto"\n'])
def test_memory_is_saved_without_another_result(
    dtype: str, knobs: str, study: Path, fedcollm: Callable[..., Outcome]
) -> None:
    words = (*CUT, "--heal", 4, "--heal-on", "auxiliary", "--dtype", dtype, "--json", "-w", study)
    plain = fedcollm(*words, "--to", study / "plain")
    (study / "machine.toml").write_text(knobs)
    saved = fedcollm(*words, "--to", study / "saved")
    assert (plain.code, saved.code) == (0, 0), plain.err + saved.err
    found, expected = (json.loads(one.out)["perplexity"]["healed"] for one in (saved, plain))
    assert found == pytest.approx(expected, rel=1e-3 if dtype == "bfloat16" else 1e-5)


def test_text_is_named_once(study: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm(*CUT, "--text", study / "a.txt", "--heal-on", "auxiliary", "-w", study)
    assert outcome.code == 2
    assert "error: --text and --heal-on both name text" in outcome.err


@pytest.mark.parametrize("words", [("--learning-rate", 1e-3), ("--batch-size", 4)], ids=str)
def test_an_option_of_healing_without_healing_is_refused(
    words: tuple[str, object], study: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm(*CUT, *words, "-w", study)
    assert outcome.code == 2
    assert f"error: {words[0]} is of healing, which was not asked for" in outcome.err
    assert "mend  give --heal too, or leave it out" in outcome.err
    assert not (study / "models/slm").exists()
    outcome = fedcollm(*CUT, *words, "--heal", 1, "--heal-on", "auxiliary", "--json", "-w", study)
    assert outcome.code == 0, outcome.err
    expected = {"steps": 1, "learning_rate": 3e-4, "batch_size": 8, words[0][2:].replace("-", "_"): words[1]}
    assert json.loads(outcome.out)["heal"] == expected


@pytest.mark.parametrize("replacing", [False, True])
def test_an_interrupted_shear_leaves_what_was_there(
    replacing: bool, study: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = study / "models/slm"
    if replacing:
        assert fedcollm(*CUT, "-w", study).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}
    save = PreTrainedModel.save_pretrained

    def interrupted(model: Any, draft: Path) -> None:
        save(model, draft)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    outcome = fedcollm(*CUT, "--overwrite", "-w", study)
    assert outcome.code == 75
    assert drafts(study) == []
    assert folder.exists() == replacing
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*")} == before


def test_models_of_two_tokenizers_are_told_of_shear(study: Path, fedcollm: Callable[..., Outcome]) -> None:
    shutil.copytree(study / "models/llm", study / "models/slm")
    words = study / "models/slm/tokenizer.json"
    edit(words, '"red": 2', '"blue": 2')
    outcome = fedcollm("run", "-w", study)
    assert outcome.code == 2
    assert "`fedcollm shear --layers ...`" in outcome.err
