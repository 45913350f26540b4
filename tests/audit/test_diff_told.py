"""diff of knowledge and of vocabularies, against the same worked out here place by place."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders import Outcome
from stages.audit.diff_told import KnowledgeDifference, VocabularyDifference, diff_told
from stages.runtime.errors import NotReady


def test_knowledge_of_two_rounds_differs_row_by_row_and_place_by_place(unlike: Path) -> None:
    folders = [unlike / f"exchange/round-000{round}/client-2" for round in (1, 2)]
    a, b = (load_file(folder / "knowledge.safetensors") for folder in folders)
    found = diff_told(*folders)
    assert isinstance(found, KnowledgeDifference)
    assert (found.rows, found.better) == (12, (b["losses"] < a["losses"]).sum())
    assert found.worse == (b["losses"] > a["losses"]).sum()
    assert (found.nats_a, found.nats_b) == pytest.approx((a["losses"].mean(), b["losses"].mean()))
    apart, divergence = [], []
    for place in range(len(a["tokens"])):
        p, q = (
            dict(zip(one["tokens"][place].tolist(), np.exp(one["log_probabilities"][place], dtype=float), strict=False))
            for one in (a, b)
        )
        common = p.keys() & q.keys()
        outcomes = [(p[token], q[token]) for token in common]
        outcomes.append((1 - sum(p[t] for t in common), 1 - sum(q[t] for t in common)))
        apart.append(sum(abs(x - y) for x, y in outcomes) / 2)
        divergence.append(sum(x * math.log(x / y) for x, y in outcomes))
    assert found.total_variation == pytest.approx(np.mean(apart), rel=1e-6)
    assert found.divergence == pytest.approx(np.mean(divergence), rel=1e-5)
    same = diff_told(folders[0], folders[0])
    assert isinstance(same, KnowledgeDifference)
    assert (same.better, same.worse, same.total_variation) == (0, 0, 0)


def test_of_two_tokenizers_rows_are_compared_and_probabilities_are_not(unlike: Path) -> None:
    found = diff_told(unlike / "exchange/round-0001/client-1", unlike / "exchange/round-0001/server")
    assert isinstance(found, KnowledgeDifference)
    assert (found.rows, found.total_variation, found.divergence) == (12, None, None)


def test_vocabularies_differ_in_tokens_and_in_ids(unlike: Path) -> None:
    places = [unlike / f"exchange/round-0001/vocabulary-{name}" for name in ("client-2", "server")]
    found = diff_told(*places)
    assert isinstance(found, VocabularyDifference)
    assert (found.tokens_a, found.tokens_b) == (400, 500)
    assert found.only_in_b - found.only_in_a == 100  # each has one special token, which stands for no text
    assert len(found.shown_b) == min(found.only_in_b, 20)
    same = diff_told(places[0], places[0])
    assert isinstance(same, VocabularyDifference)
    assert (same.only_in_a, same.only_in_b, same.moved) == (0, 0, 0)


def test_knowledge_without_its_vocabulary_cannot_be_read(unlike: Path) -> None:
    place = unlike / "exchange/round-0001"
    shutil.rmtree(place / "vocabulary-client-2")
    with pytest.raises(NotReady, match="the vocabulary of client-2 is not here"):
        diff_told(place / "client-2", place / "client-1")
    (place / "client-3/knowledge.safetensors").unlink()
    with pytest.raises(NotReady, match="here is no knowledge with its manifest"):
        diff_told(place / "client-1", place / "client-3")


@pytest.mark.parametrize("other", ["private/client-1/round-0001/slm", "exchange/round-0001/vocabulary-client-1"])
def test_knowledge_and_something_else_are_not_compared(
    other: str, unlike: Path, fedcollm: Callable[..., Outcome]
) -> None:
    knowledge = unlike / "exchange/round-0001/client-1"
    for pair in ((knowledge, unlike / other), (unlike / other, knowledge)):
        outcome = fedcollm("diff", *pair)
        assert (outcome.code, "here is no knowledge, as in the other folder" in outcome.err) == (2, True)
        assert "two folders of knowledge, two of vocabularies, or two adapters" in " ".join(outcome.err.split())


def test_the_command_tells_it(unlike: Path, fedcollm: Callable[..., Outcome]) -> None:
    places = [unlike / f"exchange/round-000{round}/server" for round in (1, 2)]
    a, b = (load_file(folder / "knowledge.safetensors")["losses"] for folder in places)
    better, worse = (b < a).sum(), (b > a).sum()
    said, probabilities = fedcollm("diff", *places).out.splitlines()
    means = f"mean loss of an answer {a.mean():.4g} nats in A, {b.mean():.4g} in B"
    assert said == f"of 12 rows that both tell, B knows {better} better, {worse} worse; {means}"
    told = json.loads(fedcollm("diff", *places, "--json").out)
    assert told["rows"] == 12
    assert probabilities.startswith(f"probabilities are apart by {told['total_variation']:.4g} in total variation, ")
    unlike_pair = fedcollm("diff", places[0], places[0].with_name("client-1")).out
    assert "probabilities are not compared: the two are told in other vocabularies" in unlike_pair


def test_vocabularies_are_compared_in_words() -> None:
    found = VocabularyDifference(3, 5, 1, 3, ["'a'"], ["'b'", "'c'"], 1)
    assert found.as_lines == [
        "3 tokens in A, 5 in B",
        "1 token only in A: 'a'",
        "3 tokens only in B: 'b', 'c' and 1 more",
        "1 token has another id",
    ]
    same = VocabularyDifference(3, 3, 0, 0, [], [], 0)
    assert same.as_lines == ["3 tokens in A, 3 in B", "0 tokens have another id"]
