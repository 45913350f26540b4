"""audit and verify of FedMKT: what clients keep, what travels, and whose model each folder is of."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from builders import edit, scale, sign
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
    assert skipped["A9"] == "FedMKT has no secure mode: the server reads what each client knows of public rows"


def test_the_exchange_by_itself_is_clean_too(unlike: Path, tmp_path: Path) -> None:
    shutil.copytree(unlike / "exchange", tmp_path / "elsewhere")
    assert problems(audit([tmp_path / "elsewhere"])) == []


@pytest.mark.parametrize("method", ["llm2slm", "standalone-public"])
def test_a_baseline_that_tells_less_is_clean(method: str, unlike_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    edit(toml, '"fedmkt"', f'"{method}"')
    edit(toml, "rounds = 2", "rounds = 1")
    run(Workspace(unlike_folder), scores=False)
    found = audit([unlike_folder])
    assert problems(found) == []
    [masks] = [one.found for one in found if one.id == "A9"]
    assert masks == f"method {method} has no secure mode: clients send neither updates nor what they know"
    # 3 x trained and slm; with llm2slm 4 vocabularies and what the LLM knows
    assert verify(Workspace(unlike_folder)).folders == (11 if method == "llm2slm" else 6)


# --- clients that are averaged


def test_averaged_clients_are_clean_and_looked_at_as_updates_are(equal: Path) -> None:
    found = audit([equal])
    assert problems(found) == []
    said = {one.id: one.text for one in found if one.level == "OK" and not one.where}
    # 4 vocabularies; of each client 3, of the LLM 2, a broadcast and an average, twice
    assert "30 manifests, every parent is here" in said["A1"]
    assert said["A3"].startswith("18 adapters")
    assert [one.where for one in found if one.id == "A5"] == ["round 0002"]
    assert said["A6"].startswith("2 rounds: no copy, no outlier; cross term at most")
    assert verify(Workspace(equal)).folders == 30


def test_the_exchange_of_averaged_clients_is_clean_by_itself_and_for_one_of_them(equal: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(equal / "exchange", tmp_path / "elsewhere")
    assert problems(audit([elsewhere])) == []
    shown = {Path(one.where).name for one in audit([elsewhere], client=2) if one.id == "A4" and one.where}
    assert shown == {"broadcast", "adapter-client-2"}


def test_an_adapter_that_was_sent_twice_came_late_or_has_no_broadcast_is_found(equal: Path) -> None:
    sent = equal / "exchange/round-0002"
    shutil.copy(sent / "adapter-client-1/adapter_model.safetensors", sent / "adapter-client-3")
    sign(sent / "adapter-client-3")
    said = problems(audit([equal]))
    assert [one for one in said if "adapter-client-3 is client 1's update, byte for byte" in one.replace(":", "")]
    average = equal / "private/server/round-0002/aggregate"
    manifest = json.loads((average / "manifest.json").read_text())
    sign(average, parents={name: one for name, one in manifest["parents"].items() if name != "adapter-client-2"})
    said = problems(audit([equal]))
    late = [one for one in said if "is not in the average of its round" in one]
    assert [one.partition(": ")[0] for one in late] == ["A1 WARN exchange/round-0002/adapter-client-2"]
    parents = json.loads((sent / "adapter-client-2/manifest.json").read_text())["parents"]
    del parents["broadcast"]
    sign(sent / "adapter-client-2", parents=parents)
    said = problems(audit([equal]))
    assert [one for one in said if "it says it is client-2/round-0002/slm" in one]


def test_an_adapter_that_was_sent_where_none_is_averaged_is_found(equal_once: Path, unlike: Path) -> None:
    sent = "exchange/round-0001/adapter-client-1"
    shutil.copytree(equal_once / sent, unlike / sent)
    assert [one for one in problems(audit([unlike])) if one.startswith(f"A1 FAIL {sent}: it says it is client-1/")]


def test_an_average_of_other_adapters_than_lie_here_is_a_broken_link(equal: Path) -> None:
    sent = equal / "exchange/round-0001/adapter-client-2"
    scale(sent, 2.0)
    with pytest.raises(Refused, match="aggregate was made from another exchange/round-0001/adapter-client-2"):
        verify(Workspace(equal))
    assert [one for one in problems(audit([equal])) if one.startswith("A1 FAIL private/server/round-0001/aggregate")]


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
