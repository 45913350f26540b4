"""The demo of FedMKT: whose rules its clients' rows are on, and a whole comparison with tiny budgets."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome
from stages.data.prepare import prepare
from stages.demo.demo import WORLD_SEED
from stages.demo.tiny_models import build_model
from stages.demo.unlike_models import SHAPES, tokenizers
from stages.demo.world import World, build_world, write_world
from stages.workspace.init import init
from stages.workspace.paths import Workspace

METHODS = {"fedmkt", "llm2slm", "standalone", "standalone-public", "centralized"}


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(WORLD_SEED)


@pytest.fixture
def study(tmp_path: Path, world: World) -> Path:
    write_world(tmp_path / "demo/study/data", world.unlike_questions, world.unlike_corpora)
    return init(tmp_path / "demo/study", template="demo-fedmkt").root


def shrink(study: Path) -> None:
    """One round of one step a stage, four questions of each task, and models of some thousand parameters."""
    toml = study / "fedcollm.toml"
    text = re.sub(r"^epochs = .*$", "steps = 1", toml.read_text(), flags=re.M)
    text = re.sub(r"^rounds = .*$", "rounds = 1", text, flags=re.M)
    toml.write_text(text + "limit = 4\n")
    for name, tokenizer in tokenizers().items():
        shape = dataclasses.replace(SHAPES[name], width=16, heads=2, layers=1, passes=1)
        corpus = ["Question: Where?\nAnswer: caves"] * 100
        build_model(study.parent / "models" / name, corpus, tokenizer, shape, seed=1, report=lambda *_: None)


def test_a_question_is_dealt_with_the_rule_that_it_asks_about(world: World) -> None:
    dealt = world.unlike_questions
    for split in ("train", "validation", "test"):
        whole = [row["id"] for (_, of), rows in world.questions.items() if of == split for row in rows]
        shares = [{row["id"] for row in dealt[f"rules-{k}", split]} for k in (1, 2, 3)]
        assert sum(map(len, shares)) == len(set().union(*shares)) == len(whole)
    for k in (1, 2, 3):
        corpus = "".join(world.unlike_corpora[f"slm-{k}"])
        for row in dealt[f"rules-{k}", "test"]:
            # Of each rule's eight facts three are read as question and answer: this question, of another adjective.
            start, kind = row["question"].split(" the ")[0], row["question"].split(" the ")[1].split()[1].rstrip("?")
            assert re.search(rf"Question: {start} the \w+ {kind}\b", corpus), row


def test_private_rows_are_on_the_rules_of_the_clients_own_model_and_public_rows_on_all(study: Path) -> None:
    workspace = Workspace(study)
    parties = prepare(workspace)["parties"]
    for k in (1, 2, 3):
        assert set(parties[f"client-{k}"]["sources"]) == {f"rules-{k}"}
        assert workspace.public_data(k).read_bytes() == workspace.auxiliary_data.read_bytes()
        assert workspace.of_client(k).agreement.slm.model == f"../models/slm-{k}"
    assert set(parties["server"]["sources"]) == {"rules-1", "rules-2", "rules-3"}


def test_the_demo_of_fedmkt_compares_each_clients_own_model_and_the_llm(
    study: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(study)
    monkeypatch.chdir(study.parent.parent)
    outcome = fedcollm("demo", "--method", "fedmkt", study.parent.name, "--json")
    assert outcome.code == 0, outcome.err
    status = fedcollm("status", "--workspace", study)
    assert (status.code, status.out.count("stale")) == (0, 0), "made by a relative name, looked at by an absolute one"
    shown = json.loads(outcome.out)
    comparison = shown["comparison"]
    assert set(comparison["methods"]) == METHODS
    assert comparison["absent"] == []
    assert set(comparison["tables"]) == {"llm", "client-1", "client-2", "client-3"}
    own = {"zero-shot", "standalone", "standalone-public", "llm2slm", "fedmkt"}
    for k in (1, 2, 3):
        assert set(comparison["tables"][f"client-{k}"]) == own
    assert set(comparison["tables"]["llm"]) == {"zero-shot", "centralized", "fedmkt"}
    assert Path(shown["report"]).read_text().startswith("<!doctype html>")
    again = fedcollm("demo", "--method", "fedmkt", study.parent)
    assert again.code == 0
    assert "from scratch" not in again.err + outcome.err, "what is there is used again"
    assert "knowing every rule of this world 7" in again.out
    for row in ("client 1", "client 3", "LLM2SLM", "Standalone + D_p"):
        assert row in again.out


def test_a_folder_with_another_methods_demo_is_refused_before_a_model_is_built(
    study: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("demo", study.parent)
    assert outcome.code == 2
    assert "this folder holds the demo of fedmkt, not of fedcollm" in outcome.err
    assert f"fedcollm demo {study.parent} --method fedmkt" in " ".join(outcome.err.split())
    assert not (study.parent / "models").exists()
