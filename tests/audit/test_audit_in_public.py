"""audit and verify of FedMKT: what clients keep, what travels, and whose model each folder is of."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from builders import edit, sign
from damages import flip, problems, put, tensors_of
from stages.audit.audit import audit
from stages.audit.verify import verify
from stages.federation.run import run
from stages.runtime.errors import Problem, Refused
from stages.workspace.paths import Workspace

OWN = "private/client-2/round-0001"
KNOWLEDGE = "exchange/round-0001/client-2"


def test_a_sound_workspace_of_unlike_models_is_clean(unlike: Path) -> None:
    found = audit([unlike])
    assert problems(found) == []
    said = {one.id: one.text for one in found if one.level == "OK" and not one.where}
    assert "26 manifests, every parent is here" in said["A1"]  # 4 vocabularies; 3 x 3 of clients, 2 of the LLM, twice
    assert said["A3"].startswith("14 adapters")
    skipped = {one.id: one.found for one in found if one.level == "SKIP"}
    assert skipped["A5"] == "nothing is averaged: every model is trained by itself"
    assert skipped["A6"].startswith("no update travels")


def test_the_exchange_by_itself_is_clean_too(unlike: Path, tmp_path: Path) -> None:
    shutil.copytree(unlike / "exchange", tmp_path / "elsewhere")
    assert problems(audit([tmp_path / "elsewhere"])) == []


@pytest.mark.parametrize("method", ["llm2slm", "standalone-public"])
def test_a_baseline_that_tells_less_is_clean(method: str, unlike_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    edit(toml, '"fedmkt"', f'"{method}"')
    edit(toml, "rounds = 2", "rounds = 1")
    run(Workspace(unlike_folder), scores=False)
    assert problems(audit([unlike_folder])) == []
    # 3 x trained and slm; with llm2slm 4 vocabularies and what the LLM knows
    assert verify(Workspace(unlike_folder)).folders == (11 if method == "llm2slm" else 6)


def test_a_client_s_adapter_in_another_client_s_folder_is_found(unlike: Path) -> None:
    shutil.rmtree(unlike / OWN / "slm")
    shutil.copytree(unlike / "private/client-3/round-0001/slm", unlike / OWN / "slm")
    said = problems(audit([unlike]))
    assert f"A1 FAIL {OWN}/slm: it says it is client-3/round-0001/slm; expected client-2/round-0001/slm" in said
    with pytest.raises(Refused, match="is of another client: 3, here it is 2"):
        verify(Workspace(unlike))


def test_a_client_whose_model_changes_between_rounds_is_found(unlike: Path) -> None:
    base = {"architecture": "llama", "weights_sha256": "0" * 64, "tokenizer_sha256": "0" * 64}
    sign(unlike / "exchange/round-0002/client-2", base=base)
    said = problems(audit([unlike]))
    assert any(re.match(r"A1 FAIL exchange/round-0002/client-2: has another base than .*client-2", one) for one in said)


def test_a_client_s_layout_is_held_against_its_own_and_nobody_else_s(unlike: Path) -> None:
    folder = unlike / "private/client-2/round-0002/slm"
    put(folder, {name.replace("layers.0", "layers.1"): one for name, one in tensors_of(folder).items()})
    said = [one for one in problems(audit([unlike])) if one.startswith("A3")]
    assert len(said) == 1
    assert re.match(rf"A3 FAIL private/client-2/round-0002/slm: .* as in {OWN}/slm", said[0])


def test_knowledge_that_the_llm_did_not_learn_from_is_a_warning(unlike: Path) -> None:
    sign(unlike / "private/server/round-0002/llm", parents={"client-1": "0" * 64})
    said = problems(audit([unlike]))
    where = "A1 WARN exchange/round-0002/client-3: is not in what the LLM learned from of its round"
    assert any(one.startswith(where) for one in said)


@pytest.mark.parametrize(
    "place",
    [
        "exchange/round-0001/vocabulary-server/cuts.safetensors",
        "exchange/round-0002/server/knowledge.safetensors",
        f"{OWN}/trained/adapter_model.safetensors",
    ],
)
def test_verify_reads_every_file_of_every_folder(place: str, unlike: Path) -> None:
    assert verify(Workspace(unlike)).folders == 26
    flip(unlike / place)
    with pytest.raises(Problem, match="is not the file its manifest names"):
        verify(Workspace(unlike))


def test_verify_follows_what_was_told_from_the_vocabulary_to_who_learned_from_it(unlike: Path) -> None:
    sign(unlike / KNOWLEDGE, seed=99)
    with pytest.raises(Refused, match=r"was made from another exchange/round-0001/client-2 than lies here"):
        verify(Workspace(unlike))
