"""exports: the proof fails where an export says something else than the tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from builders import WORDS, random_adapter, tuned
from stages.export import exported
from stages.models import adapters
from stages.models.identity import tokenizer_sha256
from stages.runtime.errors import BadNumbers


@pytest.fixture
def expected(base_models: Path) -> tuple[Any, exported.Reference]:
    """A tuned model and its reference."""
    found = tuned("slm", vocabulary=len(WORDS) + 2)
    object.__setattr__(found, "tokenizer", AutoTokenizer.from_pretrained(base_models / "slm"))
    return found, exported.reference(found)


def test_the_tuned_model_itself_has_no_error(expected: tuple[Any, exported.Reference]) -> None:
    found, reference = expected
    proof = exported.check_logits(found.model, reference, torch.float32)
    assert proof["error"] == 0
    assert proof["change"] > 0
    assert proof["scale"] == max(float(one.abs().max()) for one in reference.tuned)


def test_the_base_and_another_adapter_are_not_the_tuned_model(expected: tuple[Any, exported.Reference]) -> None:
    found, reference = expected
    with found.model.disable_adapter(), pytest.raises(BadNumbers, match="not those of base and adapter") as caught:
        exported.check_logits(found.model, reference, torch.float32)
    assert "versions of peft and transformers" in str(caught.value.mend)
    adapters.put(found.model, random_adapter(adapters.layout(found.model), seed=4))
    with pytest.raises(BadNumbers, match="not those of base and adapter"):
        exported.check_logits(found.model, reference, torch.bfloat16)


def test_within_the_tolerance_but_nearer_to_the_base_is_not_the_tuned_model(
    expected: tuple[Any, exported.Reference],
) -> None:
    found, reference = expected
    barely = {name: 1e-4 * tensor for name, tensor in adapters.take(found.model).items()}
    adapters.put(found.model, barely)
    reference = exported.reference(found)
    with found.model.disable_adapter(), pytest.raises(BadNumbers, match="bfloat16 does not keep what was tuned"):
        exported.check_logits(found.model, reference, torch.bfloat16)


@pytest.mark.parametrize(
    ("error", "said"), [(0.20, ""), (0.21, "off by up to 21% of what tuning changed"), (0.43, "43%")]
)
def test_an_export_that_loses_more_than_a_fifth_of_what_was_tuned_says_so(error: float, said: str) -> None:
    proof: exported.Proof = {"error": 2 * error, "change": 2.0, "scale": 9.0, "stored_dtype": "bfloat16"}
    found = exported.loss(proof)
    assert said in found
    assert bool(said) == bool(found) == ("export the adapter, without --merged" in found)


def test_nan_is_not_the_tuned_model(expected: tuple[Any, exported.Reference]) -> None:
    found, reference = expected
    with torch.no_grad():
        found.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(BadNumbers, match="the model's logits are NaN or infinite"):
        exported.check_logits(found.model, reference, torch.float32)


def test_a_tokenizer_that_came_back_otherwise_is_refused(base_models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_models / "slm")
    tokenizer.save_pretrained(tmp_path)
    exported.check_tokenizer(tmp_path, tokenizer_sha256(tokenizer))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(BadNumbers, match="the export's tokenizer is not the base's") as caught:
        exported.check_tokenizer(tmp_path, tokenizer_sha256(tokenizer))
    assert "without --merged" in str(caught.value.mend)
