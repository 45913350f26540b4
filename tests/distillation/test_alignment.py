"""alignment: vocabularies mapped on bytes, distributions that stay distributions, positions that mean the same."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import vocabularies
from builders import ROOT
from stages.artefacts.vocabulary_files import Kind, Vocabulary
from stages.distillation import alignment, nearest_tokens
from stages.distillation.alignment import (
    MAPPINGS,
    OTHER,
    Alignment,
    exact,
    leading,
    mapped,
    matching,
    min_edit,
)
from stages.distillation.alignment_files import alignment_bytes, parse_alignment
from stages.distillation.nearest_tokens import nearest
from stages.models.token_bytes import ends_of, vocabulary_of
from stages.runtime.errors import Damaged
from stages.training.losses import TopK, captured_distillation, forward_kl, top_k
from vocabularies import vocabulary

# --- the nearest token


def distance(one: bytes, other: bytes) -> int:
    """Edit distance, by the textbook's table (Wagner and Fischer, 1974)."""
    row = list(range(len(other) + 1))
    for i, byte in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, against in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (byte != against))
    return row[-1]


def by_all_pairs(query: bytes, targets: Sequence[bytes]) -> int:
    """The nearest, by looking at each: within half of the query's bytes, of equal ones the smallest bytes."""
    found = min(((distance(query, token), token) for token in targets), default=(len(query), b""))
    return targets.index(found[1]) if 2 * found[0] <= len(query) and found[1] in targets else -1


TOKEN = st.binary(min_size=1, max_size=3) | st.text("ab é中", min_size=1, max_size=6).map(str.encode)


@given(st.lists(TOKEN, unique=True, max_size=25), st.lists(TOKEN, unique=True, max_size=25), st.sampled_from([1, 40]))
@settings(max_examples=300, deadline=None)
def test_the_nearest_token_is_that_of_all_pairs(queries: list[bytes], targets: list[bytes], block: int) -> None:
    before, nearest_tokens.BLOCK = nearest_tokens.BLOCK, block
    try:
        queries = [query for query in queries if query not in targets]
        assert nearest(queries, targets) == [by_all_pairs(query, targets) for query in queries]
    finally:
        nearest_tokens.BLOCK = before


@pytest.mark.parametrize(
    ("query", "targets", "found"),
    [
        (b" 1997", [b" 1998", b" 199", b" 1990"], b" 199"),  # all one edit away: the smallest bytes
        (b"abcd", [b"abXY"], b"abXY"),  # two of four
        (b"abcde", [b"abXYZ"], None),  # three of five are more than half
        (b"a", [b"b", b""], None),  # one of one
        (b"x" * 254, [b"x" * 200], b"x" * 200),
        (b"x" * 255, [b"x" * 254], None),  # too long to be compared
    ],
)
def test_nothing_is_near_beyond_half_the_length(query: bytes, targets: list[bytes], found: bytes | None) -> None:
    (place,) = nearest([query], targets)
    assert (targets[place] if place >= 0 else None) == found


# --- the three methods

TEACHER = vocabulary(
    [(Kind.SPECIAL, b""), (Kind.SPECIAL, b""), b" whale", b" wh", b"ale", b" 1997", b"total", (Kind.BYTE, b"a"), b"a"],
    bos=0,
    eos=1,
)
STUDENT = vocabulary(
    [b" whale", b" whales", b" 199", b"7", b"total", b"a", (Kind.NOTHING, b""), (Kind.SPECIAL, b"")], eos=7, bos=7
)


def test_exact_keeps_equal_bytes_and_roles() -> None:
    found = exact(TEACHER, STUDENT)
    assert found.teacher.tolist() == [7, 7, 0, OTHER, OTHER, OTHER, 4, 5, 5]
    assert found.student.tolist() == list(range(8))


def test_min_edit_takes_the_nearest_where_there_is_no_equal() -> None:
    # " wh" lies three edits from " 199", " whale" and so on, of three bytes: none. "ale": "a" is two edits of three.
    # " 1997": " 199" is one of five.
    assert min_edit(TEACHER, STUDENT).teacher.tolist() == [7, 7, 0, OTHER, OTHER, 2, 4, 5, 5]


def test_a_pair_is_searched_once_and_stays_as_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = min_edit(TEACHER, STUDENT)
    monkeypatch.setattr(alignment, "nearest", None)  # whoever asks it now fails
    found.teacher[:] = OTHER
    assert min_edit(TEACHER, STUDENT).teacher.tolist() == [7, 7, 0, OTHER, OTHER, 2, 4, 5, 5]


def test_of_many_pairs_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_NEAREST", {})
    for number in range(alignment.MOST_KEPT + 2):
        assert min_edit(vocabulary([b"other%d" % number]), vocabulary([b"others"])).teacher.tolist() == [0]
    assert len(alignment._NEAREST) == alignment.MOST_KEPT


def test_leading_counts_a_student_s_token_towards_its_longest_prefix() -> None:
    found = leading(TEACHER, STUDENT)
    assert found.teacher.tolist() == list(range(9))
    # " whales" begins with " whale"; " 199" and "7" with nothing that the teacher has; "a" is text, not the lone byte.
    assert found.student.tolist() == [2, 2, OTHER, OTHER, 6, 8, OTHER, 1]


def test_special_tokens_meet_only_those_that_are_written_alike() -> None:
    teacher = vocabulary([(Kind.SPECIAL, b"<user>"), (Kind.SPECIAL, b"<tool>"), b"<user>"])
    student = vocabulary([b"<user>", b"<tool>", (Kind.SPECIAL, b"<user>")])
    for method in (exact, min_edit, leading):
        found = method(teacher, student)
        assert (found.teacher[0], found.student[2]) in [(2, 2), (0, 0)]
        assert OTHER in (found.teacher[1], found.student[1])
        assert found.teacher[2] in (0, 2)
        assert found.student[0] != found.student[2]


@given(st.lists(TOKEN, unique=True, min_size=1, max_size=20), st.lists(TOKEN, unique=True, min_size=1, max_size=20))
def test_a_leading_prefix_is_one_and_no_longer_one_is(ours: list[bytes], theirs: list[bytes]) -> None:
    for token, outcome in zip(theirs, leading(vocabulary(ours), vocabulary(theirs)).student, strict=True):
        prefixes = [one for one in ours if token.startswith(one)]
        assert (ours[outcome] if outcome != OTHER else None) == max(prefixes, key=len, default=None)


KINDS = {
    "GPT-2": vocabularies.byte_level,
    "Llama 3": lambda: vocabularies.byte_level(400, llama_3=True),
    "Llama 2": lambda: vocabularies.sentence_piece(first=True),
    "Gemma": lambda: vocabularies.sentence_piece(260, dummy=False),
    "characters": vocabularies.characters,
    "bytes": vocabularies.single_bytes,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


def vocabulary_for(tokenizer: Any, padding: int = 0) -> Vocabulary:
    return vocabulary_of(tokenizer, len(tokenizer) + padding, "the SLM")


@pytest.mark.parametrize("method", MAPPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokenizers_map_each_token_on_itself(kind: str, method: Any, tokenizers: dict[str, Any]) -> None:
    ours, padded = vocabulary_for(tokenizers[kind]), vocabulary_for(tokenizers[kind], padding=5)
    found = MAPPINGS[method](ours, padded, lambda _: None)
    assert found.teacher.tolist() == list(range(ours.rows))
    assert found.student[: ours.rows].tolist() == list(range(ours.rows))


# --- distributions


def chances(count: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What a teacher with nine tokens says of its k likeliest, as captures hold it."""
    logits = torch.randn((count, 9), generator=torch.Generator().manual_seed(seed)) * 3
    short = top_k(logits, k, temperature=1.0)
    return short.tokens.numpy().astype(np.int32), short.log_probabilities.numpy()


@given(st.lists(st.integers(OTHER, 5), min_size=9, max_size=9), st.integers(1, 9), st.integers(0, 99))
def test_mapped_probabilities_add_up_and_sum_to_one(outcomes: list[int], k: int, seed: int) -> None:
    tokens, logs = chances(4, k, seed)
    alignment = Alignment("exact", np.array(outcomes, np.int32), np.arange(6, dtype=np.int32))
    found = mapped(alignment, tokens, logs)
    assert np.allclose(np.exp(found.log_probabilities.astype(float)).sum(axis=1), 1, atol=1e-6)
    for row in range(4):
        expected: dict[int, float] = {OTHER: 0.0 if k == 9 else float(np.exp(logs[row, k]))}
        for token, log in zip(tokens[row], logs[row], strict=False):
            expected[outcomes[token]] = expected.get(outcomes[token], 0.0) + float(np.exp(log))
        named = found.outcomes[row][found.outcomes[row] != OTHER]
        assert named.tolist() == sorted(set(expected) - {OTHER}), "rising, each once"
        assert (found.outcomes[row][len(named) :] == OTHER).all()
        assert np.isneginf(found.log_probabilities[row, len(named) : k]).all()
        said = np.exp(found.log_probabilities[row])
        for place, outcome in enumerate(named.tolist()):
            assert said[place] == pytest.approx(expected[outcome], rel=1e-5)
        assert said[k] == pytest.approx(expected[OTHER], rel=1e-5, abs=1e-12)


def test_colliding_tokens_count_together_and_the_tail_is_kept() -> None:
    alignment = Alignment("min-edit", np.array([4, 4, OTHER, 1], np.int32), np.arange(5, dtype=np.int32))
    found = mapped(alignment, np.array([[0, 1, 2]]), np.log([[0.5, 0.2, 0.1, 0.2]]).astype(np.float32))
    assert found.outcomes.tolist() == [[4, OTHER, OTHER]]
    assert np.exp(found.log_probabilities[0]) == pytest.approx([0.7, 0, 0, 0.3])


@pytest.mark.parametrize("k", [3, 64])
def test_the_same_tokenizer_with_permuted_ids_loses_no_bit(k: int, tokenizers: dict[str, Any]) -> None:
    ours = vocabulary_for(tokenizers["GPT-2"])
    order = np.random.default_rng(0).permutation(ours.rows)  # its token i is our token order[i]
    kinds = [(Kind(ours.kinds[place]), ours.tokens[place]) for place in order]
    place_of = np.argsort(order)
    roles = {name: int(place_of[place]) for name, place in ours.roles.items()}
    theirs = Vocabulary.of(kinds, roles, "0" * 64)
    logits = torch.randn((5, ours.rows), generator=torch.Generator().manual_seed(1))
    said = top_k(logits, k, temperature=2.0)
    found = mapped(exact(ours, theirs), said.tokens.numpy(), said.log_probabilities.numpy())
    permuted = place_of[said.tokens.numpy()]
    order_of_row = np.argsort(permuted, axis=1)
    assert found.outcomes.tolist() == np.take_along_axis(permuted, order_of_row, axis=1).tolist()
    expected = np.take_along_axis(said.log_probabilities.numpy()[:, :k], order_of_row, axis=1)
    assert (found.log_probabilities[:, :k] == expected).all()
    assert (found.log_probabilities[:, k] == said.log_probabilities.numpy()[:, k]).all()


def test_equal_tokenizers_give_the_captured_distillation_of_today_bit_for_bit(tokenizers: dict[str, Any]) -> None:
    ours = vocabulary_for(tokenizers["GPT-2"])
    draw = torch.Generator().manual_seed(2)
    teacher, student = (torch.randn((6, ours.rows), generator=draw) for _ in range(2))
    said = top_k(teacher, 8, temperature=1.0)
    found = mapped(exact(ours, ours), said.tokens.numpy(), said.log_probabilities.numpy())
    again = TopK(
        torch.from_numpy(found.outcomes.astype(np.int64)), torch.from_numpy(found.log_probabilities), said.confidence
    )
    losses = []
    for one in (said, again):
        logits = student.clone().requires_grad_()
        loss = captured_distillation(logits, one, 6, vocabulary=ours.rows, temperature=1.0, divergence=forward_kl)
        loss.backward()
        losses.append((loss.item(), logits.grad))
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])


# --- positions

SAID = "Question: is 12345 naïve?\nAnswer: a whale 🙂 — yes\n\n 7"


def read(tokenizer: Any, text: str) -> tuple[Vocabulary, list[int], np.ndarray]:
    """A text's tokens with those that the tokenizer puts first, and the ends of positions that predict one."""
    found, ids = vocabulary_for(tokenizer), tokenizer.encode(text)
    ends = ends_of(found, ids, text)
    assert ends is not None
    return found, ids, ends[:-1]


WHOLE = [name for name in KINDS if name != "characters"]  # which do not know every character of the text


@pytest.mark.parametrize("ours", WHOLE)
@pytest.mark.parametrize("theirs", WHOLE)
def test_matched_positions_have_read_the_same_and_predict_what_follows(
    ours: str, theirs: str, tokenizers: dict[str, Any]
) -> None:
    text, sides = SAID.encode(), [read(tokenizers[name], SAID) for name in (ours, theirs)]
    places = matching(sides[0][2], sides[1][2])
    assert len(places[0]) == len(places[1]) > 3
    matched = []
    for (found, ids, ends), chosen in zip(sides, places, strict=True):
        for place in chosen.tolist():
            following = found.tokens[ids[place + 1]]  # never the token just read
            left = text[ends[place] :]
            assert left.startswith(following) or (ends[place] == 0 and (b" " + left).startswith(following))
            assert following
        matched.append(ends[chosen].tolist())
    assert matched[0] == matched[1] == sorted(set(matched[0]))
    common = set(sides[0][2].tolist()) & set(sides[1][2].tolist())
    assert set(matched[0]) == common, "none is passed over"


def test_a_first_token_on_one_side_shifts_nothing() -> None:
    # With a first token and a lone space before the first word three positions have read nothing: the last counts.
    ours, theirs = matching(np.array([0, 0, 0, 3, 7]), np.array([1, 3, 5, 7]))
    assert (ours.tolist(), theirs.tolist()) == ([3, 4], [1, 3])
    ours, theirs = matching(np.array([0, 0, 2]), np.array([0, 2]))
    assert (ours.tolist(), theirs.tolist()) == ([1, 2], [0, 1])


def test_the_end_answers_the_end() -> None:
    ours, theirs = (
        vocabulary([b"ab", b"c", (Kind.SPECIAL, b"")], eos=2),
        vocabulary([(Kind.SPECIAL, b""), *(b"abc"[i : i + 1] for i in range(3))], eos=0),
    )
    first, second = ends_of(ours, [0, 1, 2], "abc"), ends_of(theirs, [1, 2, 3, 0], "abc")
    assert first is not None
    assert second is not None
    a, b = matching(first[:-1], second[:-1])
    assert (a.tolist(), b.tolist()) == ([0, 1], [1, 2])
    found = exact(ours, theirs)
    assert found.teacher[2] == 0, "what follows at the last matched position is the end, for both"


def test_nothing_matches_nothing() -> None:
    empty = np.array([], np.int32)
    assert [len(one) for one in matching(empty, np.array([1, 2]))] == [0, 0]


def test_a_teacher_that_is_sure_of_the_answer_pulls_as_its_label_does(tokenizers: dict[str, Any]) -> None:
    """Defect of others: the target named the token just read, and one position in five was taught to repeat itself."""
    (ours, ids, ends), (theirs, labels, their_ends) = (read(tokenizers[name], SAID) for name in ("Llama 2", "GPT-2"))
    places, answers = matching(ends, their_ends)
    following = np.array(ids)[places + 1]
    wanted = np.array(labels)[answers + 1]
    alignment = exact(ours, theirs)
    is_same = alignment.teacher[following] == wanted
    assert is_same.sum() > 3
    tokens = following[is_same][:, None]
    found = mapped(alignment, tokens, np.tile(np.array([[0.0, -np.inf]], np.float32), (len(tokens), 1)))
    logits = torch.randn((len(tokens), theirs.rows), generator=torch.Generator().manual_seed(0), requires_grad=True)
    label = torch.from_numpy(wanted[is_same])
    log = torch.log_softmax(logits, dim=-1)
    target = torch.from_numpy(np.exp(found.log_probabilities[:, 0]))
    soft = -(target * log.gather(1, torch.from_numpy(found.outcomes.astype(np.int64)))[:, 0]).sum()
    (pull,) = torch.autograd.grad(soft, logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, label, reduction="sum"), logits)
    assert torch.allclose(pull, plain, atol=1e-6)
    just_read = np.array(labels)[answers][is_same]
    assert (pull[torch.arange(len(tokens)), torch.from_numpy(just_read)] >= 0)[just_read != wanted[is_same]].all()


# --- files, and two processes


def test_a_map_comes_back_and_only_for_its_vocabularies() -> None:
    for method in (exact, min_edit, leading):
        made = method(TEACHER, STUDENT)
        content = alignment_bytes(made, TEACHER, STUDENT)
        found = parse_alignment(content, Path("map"), TEACHER, STUDENT)
        assert (found.method, found.teacher.tolist(), found.student.tolist()) == (
            made.method,
            made.teacher.tolist(),
            made.student.tolist(),
        )
        with pytest.raises(Damaged, match="not an alignment of these two vocabularies"):
            parse_alignment(content, Path("map"), STUDENT, TEACHER)
        with pytest.raises(Damaged):
            parse_alignment(content[:-4], Path("map"), TEACHER, STUDENT)
    beyond = Alignment("exact", np.full(9, 8, np.int32), np.arange(8, dtype=np.int32))
    with pytest.raises(Damaged, match="a token that there is not"):
        parse_alignment(alignment_bytes(beyond, TEACHER, STUDENT), Path("map"), TEACHER, STUDENT)


IN_A_PROCESS = """
import sys
import vocabularies
from stages.artefacts.vocabulary_files import vocabulary_bytes
from stages.distillation.alignment import MAPPINGS
from stages.distillation.alignment_files import alignment_bytes
from stages.models.token_bytes import vocabulary_of
from transformers import AutoTokenizer
sides = [vocabulary_of(one, len(one), "it") for one in map(AutoTokenizer.from_pretrained, sys.argv[1:])]
out = sys.stdout.buffer
for one in sides:
    out.write(vocabulary_bytes(one))
for ours, theirs in (sides, sides[::-1]):
    for mapping in MAPPINGS.values():
        out.write(alignment_bytes(mapping(ours, theirs, lambda _: None), ours, theirs))
"""


def test_two_processes_write_the_same_bytes_whatever_their_hashes(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    folders = [vocabularies.saved(tmp_path / name, tokenizers[name]) for name in ("Gemma", "Llama 3")]
    digests = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, "-c", IN_A_PROCESS, *map(str, folders)]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert len(done.stdout) > 10_000
        digests.append(hashlib.sha256(done.stdout).hexdigest())
    assert digests[0] == digests[1]
