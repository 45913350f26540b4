"""A11: knowledge that no model can have said, of other rows or another vocabulary, and choices that were others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from builders import Outcome, sign
from damages import problems
from stages.audit.audit import audit

CLIENT, SERVER = "exchange/round-0001/client-2", "exchange/round-0001/server"
VOICE = "exchange/round-0001/vocabulary-client-2"
BY_LETTER = "exchange/round-0001/vocabulary-client-1"
LLM = "private/server/round-0001/llm"
Tensors = dict[str, np.ndarray]
Harm = Callable[[Path], object]


def read(path: Path) -> tuple[Tensors, dict[str, object]]:
    """The tensors of a file, and what it says of itself."""
    with safetensors.safe_open(path, "numpy") as file:
        [said] = file.metadata().values()
    return safetensors.numpy.load_file(path), json.loads(said)


def write(path: Path, tensors: Tensors, said: dict[str, object]) -> None:
    """Write it soundly, with a manifest that agrees."""
    safetensors.numpy.save_file(tensors, path, metadata={path.stem: json.dumps(said, sort_keys=True)})
    sign(path.parent)


def changed(place: str, how: Callable[[Tensors], object], **says: object) -> Harm:
    """A file that was changed in this way, and says this of itself."""

    def harm(root: Path) -> None:
        tensors, said = read(root / place)
        how(tensors)
        write(root / place, tensors, said | says)

    return harm


def put(name: str, at: object, value: object) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].__setitem__(at, value)


def same(tensors: Tensors) -> None:
    pass


def told(how: Callable[[Tensors], object], **says: object) -> Harm:
    """The knowledge of client 2."""
    return changed(f"{CLIENT}/knowledge.safetensors", how, **says)


def swap_two_tokens(tensors: Tensors) -> None:
    tensors["tokens"][0, :2] = tensors["tokens"][0, 1::-1].copy()


def another_letter(tensors: Tensors) -> None:
    """Of one token of two bytes or more, so that no other token has its text."""
    lengths = np.diff(tensors["offsets"])
    tensors["content"][tensors["offsets"][lengths.argmax()]] ^= 1


def one_row_less(root: Path) -> None:
    """Client 2 leaves out row 1 by its cuts, and tells its loss all the same."""
    tensors, said = read(root / VOICE / "cuts.safetensors")
    count = tensors["positions"][0]
    tensors["positions"][0], tensors["ends"] = 0, tensors["ends"][count:]
    write(root / VOICE / "cuts.safetensors", tensors, said)
    tensors, said = read(root / CLIENT / "knowledge.safetensors")
    cut = {name: tensor[count:] if name != "losses" else tensor for name, tensor in tensors.items()}
    write(root / CLIENT / "knowledge.safetensors", cut, said)


def metrics(place: str, **figures: float | None) -> Harm:
    """A manifest that tells these figures."""

    def harm(root: Path) -> None:
        said = json.loads((root / place / "manifest.json").read_text())["metrics"]
        named = {name.replace("client_", "client-"): value for name, value in figures.items()}
        sign(root / place, metrics={name: value for name, value in (said | named).items() if value is not None})

    return harm


def another_parent(root: Path) -> None:
    folder = root / "exchange/round-0002/client-2"
    parents = json.loads((folder / "manifest.json").read_text())["parents"]
    sign(folder, parents=parents | {"vocabulary-client-2": "0" * 64})


def copied(root: Path) -> None:
    """Client 3 tells what client 1 tells, vocabulary and all."""
    for name in ("vocabulary-client", "client"):
        place = root / "exchange/round-0001"
        for path in (place / f"{name}-1").glob("*.safetensors"):
            shutil.copy(path, place / f"{name}-3" / path.name)
        sign(place / f"{name}-3")


KNOWS = f"A11 FAIL {CLIENT}/knowledge.safetensors: knowledge.safetensors"
CUT = f"A11 FAIL {VOICE}/cuts.safetensors: cuts.safetensors"

DAMAGE: dict[str, tuple[Harm, str]] = {
    # a damage, and a line that it gives
    "NaN": (told(put("log_probabilities", (0, 0), np.nan)), f"{KNOWS} holds NaN or infinity"),
    "NaN of a row": (told(put("losses", 3, np.nan)), f"{KNOWS} holds NaN or infinity"),
    "infinite": (told(put("chances", 0, -np.inf)), f"{KNOWS} holds NaN or infinity"),
    "not sorted": (told(swap_two_tokens), f"{KNOWS}.* not in rising order"),
    "an id twice": (told(lambda t: t["tokens"].__setitem__((0, 1), t["tokens"][0, 0])), f"{KNOWS}.* not in rising"),
    "beyond": (told(put("tokens", (0, -1), 400)), f"{KNOWS}.* outside the vocabulary of 400"),
    "negative id": (told(put("tokens", (0, 0), -1)), f"{KNOWS}.* outside the vocabulary of 400"),
    "above one": (told(put("log_probabilities", (0, 0), 0.5)), f"{KNOWS}.* probabilities of a position add up to"),
    "confidence": (told(put("confidence", 0, 1.5)), f"{KNOWS}.* a confidence is no probability"),
    "a sure answer": (told(put("chances", 0, 1.0)), f"{KNOWS} a token of a completion is likelier than"),
    "another loss": (told(lambda t: t["losses"].__imul__(0.5)), f"{KNOWS} a row's loss is not that of its tokens"),
    "other rows": (told(same, data_sha256="0" * 64), f"{KNOWS} is of another data: 0000"),
    "temperature": (told(same, temperature=9.0), f"{KNOWS} is of another temperature: 9.0, here it is 1.0"),
    "no temperature": (told(same, temperature=-1.0), f"{KNOWS} does not say that it is a fedcollm-knowledge/1"),
    "fewer tokens": (told(same, top_k=8), f"{KNOWS} is of another top_k: 8, here it is 32"),
    "a row left out": (one_row_less, f"{KNOWS} tells a loss of a row that its party leaves out"),
    "a place less": (
        told(lambda t: t.update({name: one[1:] for name, one in t.items() if name != "losses"})),
        f"{KNOWS} has other arrays than knowledge of",
    ),
    "told in another vocabulary": (told(same, vocabulary_sha256="0" * 64), f"{KNOWS} is of another vocabulary: 0000"),
    "another vocabulary": (
        changed(f"{VOICE}/vocabulary.safetensors", another_letter),
        f"A11 FAIL {VOICE}: cuts.safetensors is of another vocabulary than the one beside it",
    ),
    "another tokenizer": (
        changed(f"{VOICE}/vocabulary.safetensors", same, tokenizer_sha256="0" * 64),
        f"A11 FAIL {VOICE}: cuts.safetensors is of another vocabulary",
    ),
    "another vocabulary later": (
        another_parent,
        f"A11 FAIL exchange/round-0002/client-2: is told in another vocabulary than {CLIENT}",
    ),
    "cuts of other rows": (
        changed(f"{VOICE}/cuts.safetensors", same, data_sha256="0" * 64),
        f"{CUT} is of other public",
    ),
    "cuts of nothing": (
        changed(f"{VOICE}/cuts.safetensors", same, data_sha256=[]),
        f"A11 FAIL {VOICE}: .* of which row",
    ),
    "cuts beyond": (changed(f"{VOICE}/cuts.safetensors", put("ends", -1, 1 << 20)), f"{CUT} cuts row 12 at bytes that"),
    "cuts backwards": (
        changed(f"{BY_LETTER}/cuts.safetensors", put("ends", 1, 0)),
        f"A11 FAIL {BY_LETTER}: cuts.safetensors cuts row 1 at bytes that it has not, or not in order",
    ),
    "figures": (metrics(CLIENT, loss=0.5), f"A11 FAIL {CLIENT}: tells loss 0.5; expected"),
    "no figures": (metrics(SERVER, rows=None), f"A11 FAIL {SERVER}: tells rows not; expected 12"),
    "rows": (lambda f: sign(f / CLIENT, examples=11), f"A11 FAIL {CLIENT}: tells examples 11; expected 12"),
    "positions": (lambda f: sign(f / VOICE, tokens=1), f"A11 FAIL {VOICE}: tells tokens 1; expected"),
    "a client's choice": (
        metrics("private/client-2/round-0002/slm", rows_from_server=99.0),
        "A11 FAIL private/client-2/round-0002/slm: tells rows_from_server 99; expected .*, by what was told",
    ),
    "the LLM's choice": (
        metrics(LLM, rows_from_client_3=13.0),
        f"A11 FAIL {LLM}: tells rows_from_client-3 13; expected 0 to ",
    ),
    "the LLM's choice in round 2": (
        metrics(LLM.replace("0001", "0002"), rows_from_client_1=-1.0),
        "A11 WARN private/server/round-0002/llm: tells rows_from_client-1 -1; expected ",
    ),
    "no choice": (metrics(LLM, rows_from_client_1=None), f"A11 FAIL {LLM}: tells rows_from_client-1 not; expected"),
    "copied": (copied, "A11 WARN exchange/round-0001/client-3: is client-1's knowledge, byte for byte"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_no_model_can_have_told_is_found_and_named(kind: str, unlike: Path) -> None:
    harm, expected = DAMAGE[kind]
    harm(unlike)
    said = problems(audit([unlike]))
    assert any(re.match(expected, line) for line in said), said


def test_what_was_told_is_measured_and_every_choice_is_made_again(unlike: Path) -> None:
    found = [one for one in audit([unlike]) if one.id == "A11"]
    [knows] = [one for one in found if one.where == CLIENT]
    tensors, _ = read(unlike / CLIENT / "knowledge.safetensors")
    assert knows.measured["loss"] == pytest.approx(tensors["losses"].mean())
    assert knows.measured["positions"] == len(tensors["chances"])
    size_bytes = (unlike / CLIENT / "knowledge.safetensors").stat().st_size
    assert knows.measured["bytes_a_row"] == pytest.approx(size_bytes / 12)
    for client in (1, 2, 3):
        own = read(unlike / f"exchange/round-0002/client-{client}/knowledge.safetensors")[0]["losses"]
        teacher = read(unlike / "exchange/round-0002/server/knowledge.safetensors")[0]["losses"]
        [chose] = [one for one in found if one.where == f"private/client-{client}/round-0002/slm"]
        assert chose.measured == {"server": (teacher < own).sum()}
    [every] = [one for one in found if not one.where]
    sizes = sorted(path.stat().st_size / 12 for path in unlike.glob("exchange/round-*/*/knowledge.safetensors"))
    size = " to ".join(dict.fromkeys(f"{one:.0f}" for one in (sizes[0], sizes[-1])))
    assert every.text == (
        f"vocabularies of 4 parties, 8 files of knowledge, {size} bytes a row; "
        "for 8 models the choice of teachers was repeated and is the same"
    )


def test_without_the_rows_texts_all_else_is_checked_and_that_is_said(unlike: Path) -> None:
    shutil.rmtree(unlike / "private")
    found = audit([unlike])
    assert problems(found) == []
    skipped = [one.found for one in found if (one.id, one.level) == ("A11", "SKIP")]
    assert skipped == [
        "whether cuts are those of the rows' texts: no public rows are here",
        "the choice of teachers cannot be repeated: no model that learned from others is here",
    ]
    [every] = [one.text for one in found if (one.id, one.level) == ("A11", "OK") and not one.where]
    assert "teachers" not in every
    told(put("confidence", 0, 1.5))(unlike)
    assert [line for line in problems(audit([unlike])) if line.startswith(f"{KNOWS}")]


def test_an_exchange_without_an_agreement_is_held_against_what_it_says_of_itself(unlike: Path, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    shutil.copytree(unlike / "exchange", there)
    assert problems(audit([there])) == []
    changed("round-0001/client-2/knowledge.safetensors", put("tokens", (0, -1), 400))(there)
    assert any("outside the vocabulary of 400" in line for line in problems(audit([there])))


def test_one_folder_is_held_against_the_vocabulary_of_its_exchange(unlike: Path) -> None:
    told(put("losses", 0, 0.25))(unlike)
    assert any("is not that of its tokens" in line for line in problems(audit([unlike / CLIENT])))
    shutil.rmtree(unlike / VOICE)
    [skipped] = [one for one in audit([unlike / CLIENT]) if one.id == "A11" and one.where]
    assert skipped.found == "what client-2 has told of its vocabulary is not here"


def test_knowledge_against_an_unsound_vocabulary_is_passed_over_and_that_is_said(unlike: Path) -> None:
    changed(f"{VOICE}/vocabulary.safetensors", another_letter)(unlike)
    [skipped, _] = [
        one.text for one in audit([unlike]) if (one.id, one.level) == ("A11", "SKIP") and "exch" in one.where
    ]
    assert skipped.startswith(f"{CLIENT}: what client-2 has told of its vocabulary is not sound: cuts.safetensors")


def test_an_audit_for_one_client_chooses_again_for_that_client(unlike: Path) -> None:
    metrics("private/client-2/round-0002/slm", rows_from_server=99.0)(unlike)
    assert problems(audit([unlike], client=1)) == []
    assert any("rows_from_server 99" in line for line in problems(audit([unlike], client=2)))


def test_no_text_of_others_reaches_a_terminal_raw(unlike: Path, fedcollm: Callable[..., Outcome]) -> None:
    told(same, data_sha256="\x1b[31m\n")(unlike)
    outcome = fedcollm("audit", "-w", unlike)
    assert outcome.code == 4
    assert "\\x1b[31m\\n" in outcome.out
    assert "\x1b" not in outcome.out + outcome.err
