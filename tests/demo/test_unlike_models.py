"""The demo's unlike models: what each has read, how its tokenizer cuts, and that they load as any base does."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import ROOT
from stages.demo.tiny_models import build_model
from stages.demo.unlike_models import SHAPES, tokenizers
from stages.demo.world import ADJECTIVES, ATTRIBUTES, KINDS, PROMPT, World, build_world
from stages.models.token_bytes import ends_of, vocabulary_of

NAMES = ("slm-1", "slm-2", "slm-3", "llm")
TINY = {
    name: dataclasses.replace(shape, width=16, heads=2, layers=1, passes=2, learning_rate=0.02)
    for name, shape in SHAPES.items()
}


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(5)


def questions() -> list[str]:
    """Every question of every world with every value."""
    return [
        f"{PROMPT.format(question=asks.format(f'{adjective} {kind}'))} {value}"
        for domain, attributes in ATTRIBUTES.items()
        for _, asks, values in attributes
        for adjective, kind, value in itertools.product(ADJECTIVES.split(), KINDS[domain].split(), values.split())
    ]


def built(folder: Path, world: World) -> dict[str, list[float]]:
    """All four, much smaller and briefly trained; each model's losses on the way."""
    losses: dict[str, list[float]] = {name: [] for name in NAMES}
    for name, tokenizer in tokenizers().items():
        told = losses[name]
        build_model(
            folder / name,
            world.unlike_corpora[name],
            tokenizer,
            TINY[name],
            seed=3,
            report=lambda _step, _total, loss, told=told: told.append(loss),  # type: ignore[misc]
        )
    return losses


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_each_small_model_has_read_of_other_rules_and_the_large_one_not_of_all(world: World) -> None:
    read = {name: set(corpus) for name, corpus in world.unlike_corpora.items()}
    assert tuple(read) == NAMES
    whole = set(itertools.chain(*world.sentences))
    assert read["slm-1"] | read["slm-2"] | read["slm-3"] == whole
    assert sum(len(read[name]) for name in NAMES[:3]) == len(whole), "nobody reads of a rule that another reads of"
    assert read["llm"] < whole
    for name in NAMES[:3]:
        # A third of 120 rules, of which the LLM has read the first four fifths: 8 of 40 are news to it.
        assert len(read[name] - read["llm"]) * 5 == len(read[name])


def test_a_context_holds_every_question_with_its_answer_and_the_end() -> None:
    for name, tokenizer in tokenizers().items():
        longest = max(map(len, tokenizer(questions())["input_ids"]))
        assert longest < SHAPES[name].context == tokenizer.model_max_length


def test_a_word_is_many_tokens_of_one_and_one_of_another() -> None:
    counts = {name: len(tokenizer.encode(" treetops")) for name, tokenizer in tokenizers().items()}
    assert counts["slm-1"] == len(" treetops")
    assert counts["slm-1"] > counts["slm-2"] > counts["llm"] == 1
    assert {name: len(tokenizer) for name, tokenizer in tokenizers().items()}["slm-2"] == 400


def test_saved_models_load_and_their_tokenizers_can_be_aligned(tmp_path: Path, world: World) -> None:
    losses = built(tmp_path, world)
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        vocabulary = vocabulary_of(tokenizer, model.config.vocab_size, name)
        text = questions()[-1]
        ends = ends_of(vocabulary, tokenizer.encode(text), text)
        assert ends is not None
        assert ends[-1] == len(text)
        assert model.config.model_type == SHAPES[name].architecture
        assert losses[name][-1] < losses[name][0]


def test_the_same_seed_builds_the_same_bytes(tmp_path: Path, world: World) -> None:
    for folder in ("one", "two"):
        built(tmp_path / folder, world)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "one")) >= 4 * len(NAMES)


def test_two_processes_make_the_same_tokenizers() -> None:
    code = "from stages.demo.unlike_models import tokenizers\n"
    code += "for one in tokenizers().values(): print(one.backend_tokenizer.to_str())"

    def told() -> Sequence[str]:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    assert told() == [one.backend_tokenizer.to_str() for one in tokenizers().values()]
