"""align: whether two models could teach each other, told before any weights are here, the same way each time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vocabularies
from builders import Outcome, published
from stages.align import align
from stages.artefacts.vocabulary_files import Kind, read_vocabulary
from stages.distillation.alignment_files import parse_alignment
from stages.runtime.errors import Damaged, Refused, UsageProblem
from stages.runtime.events import Event
from stages.workspace.paths import Workspace

Fedcollm = Callable[..., Outcome]
ROWS = [
    ("the cat sat on", " the mat"),
    ("Question: which?\nAnswer:", " a whale"),
    ("In 1997 there were", " 1,234 cats"),
]


def put(folder: Path, role: str, tokenizer: Any) -> None:
    """A base of this tokenizer, without weights, in the place of what is there."""
    models = folder / "models"
    if models.is_symlink():
        models.unlink()
    shutil.rmtree(models / role, ignore_errors=True)
    vocabularies.saved(models / role, tokenizer)


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": one, "completion": other}) + "\n" for one, other in rows))


@pytest.fixture
def pair(workspace_folder: Path) -> Path:
    """A workspace whose SLM spells and whose LLM has words."""
    put(workspace_folder, "slm", vocabularies.single_bytes())
    put(workspace_folder, "llm", vocabularies.sentence_piece(first=True))
    write(workspace_folder / "private/server/auxiliary.jsonl", ROWS)
    return workspace_folder


def test_both_maps_both_vocabularies_and_a_report_are_written(pair: Path) -> None:
    found = align(Workspace(pair))
    folder = pair / "private/server/alignment"
    slm, llm = (read_vocabulary(folder / f"vocabulary-{role}.safetensors") for role in ("slm", "llm"))
    assert (slm.rows, llm.rows) == (257, found.vocabularies["llm"].rows)
    for teacher, student, name in ((slm, llm, "slm-to-llm"), (llm, slm, "llm-to-slm")):
        path = folder / f"map-{name}.safetensors"
        parse_alignment(path.read_bytes(), path, teacher, student)
    assert json.loads((folder / "report.json").read_text()) == found.model_dump()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*found.files, "report.json"])


def test_what_is_measured_is_what_can_be_counted_by_hand(pair: Path) -> None:
    """The SLM reads one byte at a time: it predicts at each byte of an answer, and its next token is that byte."""
    found = align(Workspace(pair))
    [to_slm, to_llm] = found.directions
    assert (to_slm.teacher, to_slm.student, to_llm.teacher) == ("llm", "slm", "slm")
    answers = [completion for _, completion in ROWS]
    assert to_slm.measured is not None
    assert to_llm.measured is not None
    assert (to_slm.measured.rows, to_slm.measured.left_out) == (3, 0)
    assert to_slm.measured.positions == sum(map(len, answers)) == 27
    # Wherever the LLM predicts, the SLM has read as much; so all positions of the LLM are matched, either way.
    tokenizer = vocabularies.sentence_piece(first=True)
    tokens = sum(len(tokenizer.encode(a + b)) - len(tokenizer.encode(a)) for a, b in ROWS)
    assert to_llm.measured.positions == to_llm.measured.matched == to_slm.measured.matched == tokens
    # Exact: right where the LLM's next token is one byte. Leading: its next token always begins with the SLM's.
    pieces = [piece for a, b in ROWS for piece in tokenizer.tokenize(a + b)[len(tokenizer.tokenize(a)) :]]
    assert len(pieces) == tokens
    single = sum(len(piece) == 1 or piece.startswith("<0x") for piece in pieces)
    assert 0 < single < tokens
    assert to_slm.measured.agreeing["exact"] == to_llm.measured.agreeing["exact"] == single
    assert to_llm.measured.agreeing["leading"] == tokens
    assert (to_llm.method, to_llm.because) == ("leading", "it measures best")
    assert to_llm.usable == 1.0
    assert found.vocabularies["slm"].tokens == 256
    assert found.vocabularies["llm"].tokens == len(tokenizer) - 3, "all but <unk>, <s> and </s>"
    for one in found.directions:
        assert one.exact <= one.near <= found.vocabularies[one.teacher].tokens
        assert one.led <= found.vocabularies[one.student].tokens
    assert to_llm.exact == 256, "of each byte the LLM has a token"


def test_a_second_time_it_is_done_already_and_other_inputs_are_refused(pair: Path) -> None:
    events: list[Event] = []
    first = align(Workspace(pair))
    before = published(pair)
    assert align(Workspace(pair), report=events.append) == first
    assert "already done" in [event.text for event in events]
    assert published(pair) == before
    with pytest.raises(Refused, match="changed since: --method") as caught:
        align(Workspace(pair), method="exact")
    assert caught.value.mend == "fedcollm align --method exact --overwrite"
    write(pair / "private/server/auxiliary.jsonl", ROWS[:2])
    put(pair, "slm", vocabularies.byte_level(300))
    with pytest.raises(Refused, match="changed since: the SLM's tokenizer, the rows"):
        align(Workspace(pair))
    again = align(Workspace(pair), method="exact", overwrite=True)
    assert {one.method for one in again.directions} == {"exact"}
    assert {one.because for one in again.directions} == {"it was asked for"}


def test_two_workspaces_with_the_same_tokenizers_and_rows_hold_the_same_bytes(pair: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair, other)
    for folder in (pair, other):
        align(Workspace(folder))
    assert published(pair / "private/server") == published(other / "private/server")
    left, right = (
        {path.name: path.read_bytes() for path in (one / "private/server/alignment").iterdir()} for one in (pair, other)
    )
    assert left == right


def test_without_rows_the_papers_method_is_taken_and_nothing_is_measured(pair: Path) -> None:
    (pair / "private/server/auxiliary.jsonl").unlink()
    for path in pair.glob("private/client-*/train.jsonl"):
        path.unlink()
    for one in align(Workspace(pair)).directions:
        assert (one.measured, one.usable, one.method) == (None, None, "min-edit")
        assert one.because.startswith("it is the paper's")


def test_a_client_s_own_rows_serve_where_the_server_s_are_not_here(pair: Path) -> None:
    (pair / "private/server/auxiliary.jsonl").unlink()
    for path in pair.glob("private/client-*/train.jsonl"):
        path.unlink()
    write(pair / "private/client-2/train.jsonl", ROWS[:1])
    measured = align(Workspace(pair)).directions[0].measured
    assert measured is not None
    assert (measured.rows, measured.positions) == (1, len(" the mat"))


def test_rows_that_a_tokenizer_changes_are_left_out_and_little_reach_is_warned_of(pair: Path) -> None:
    put(pair, "slm", vocabularies.characters())
    put(pair, "llm", vocabularies.byte_level(320))
    write(pair / "private/server/auxiliary.jsonl", [("the cat", " the mat"), ("한국어", " the mat")])
    events: list[Event] = []
    found = align(Workspace(pair), method="exact", report=events.append)
    warnings = [event.text for event in events if event.kind == "warning"]
    assert any(text.startswith("1 rows are left out") for text in warnings)
    to_slm = found.directions[0]
    assert to_slm.usable is not None
    assert to_slm.usable < 0.5
    assert f"at {100 * to_slm.usable:.0f} % of answer positions only, the LLM reaches" in warnings[0]


def test_a_tokenizer_that_cannot_be_aligned_is_refused_by_name_and_nothing_is_written(pair: Path) -> None:
    put(pair, "llm", vocabularies.words())
    with pytest.raises(UsageProblem, match="the LLM's tokenizer cannot be aligned"):
        align(Workspace(pair))
    assert not (pair / "private/server/alignment").exists()


def test_a_map_that_was_changed_is_damaged(pair: Path) -> None:
    align(Workspace(pair))
    path = pair / "private/server/alignment/map-slm-to-llm.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"map-slm-to-llm.safetensors has been changed"):
        align(Workspace(pair))
    path.with_name("report.json").write_text("{}")
    with pytest.raises(Damaged, match="not a report of align"):
        align(Workspace(pair))


def test_of_several_clients_each_table_stands_below_its_title(unlike: Path, fedcollm: Fedcollm) -> None:
    said = fedcollm("align", "--server", "-w", unlike).out
    titles = [said.index(f"client {k} (SLM) and the server (LLM)") for k in (1, 2, 3)]
    tables = [place for place in range(len(said)) if said.startswith("share of", place)]
    assert len(tables) == 3
    assert sorted(titles + tables) == [place for pair in zip(titles, tables, strict=True) for place in pair]
    assert said.startswith("client 1 (SLM)")
    one = read_vocabulary(unlike / "exchange/round-0001/vocabulary-client-1/vocabulary.safetensors")
    tokens = sum(kind in (Kind.TEXT, Kind.BYTE) for kind in one.kinds)
    assert f"SLM {tokens:,} tokens, {one.rows:,} token ids" in said


def test_the_command_prints_a_table_and_json(pair: Path, fedcollm: Fedcollm) -> None:
    shown = fedcollm("align", "-w", pair)
    assert shown.code == 0
    for words in (
        "LLM to SLM",
        "SLM to LLM",
        "there, its next token is reached: leading",
        "since it measures best",
    ):
        assert words in shown.out
    told = fedcollm("align", "-w", pair, "--json", "--quiet")
    value = json.loads(told.out)
    assert value["path"] == "private/server/alignment"
    assert value["directions"][1]["coverage"] == 1.0
    assert value["directions"][1]["agreement"]["leading"] == 1.0
    assert set(value["files"]) == {
        *(f"vocabulary-{role}.safetensors" for role in ("slm", "llm")),
        *(f"map-{way}.safetensors" for way in ("slm-to-llm", "llm-to-slm")),
    }
    put(pair, "llm", vocabularies.word_piece())
    refused = fedcollm("align", "-w", pair)
    assert refused.code == 2
    assert "WordPiece" in refused.err
