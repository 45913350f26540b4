"""check-rows: every kind of mistake is told, with its lines; what can be mended is, in a copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import Outcome, edit, make_unlike_workspace, write_rows
from stages.data.row_files import read_rows
from stages.files import reading
from stages.planning.check_rows import Checked, check_rows
from stages.planning.row_checks import Lengths
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.workspace.paths import Workspace

RED = {"prompt": "Q : what colour is the red circle ? A :", "completion": " red"}
BLUE = {"prompt": "Q : what colour is the blue circle ? A :", "completion": " blue"}
GREEN = {"prompt": "Q : what colour is the green circle ? A :", "completion": " green"}


def written(folder: Path, *lines: str | dict[str, Any], ends: str = "\n") -> Path:
    path = folder / "own.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes("".join(f"{text}{ends}" for text in texts).encode())
    return path


def checked(folder: Path, path: Path, *, fix: bool = False) -> Checked:
    [found] = check_rows(Workspace(folder), files=[path], fix=fix)
    return found


def remarks(found: Checked) -> dict[str, list[int]]:
    return {f"{one.level} {one.found}": one.lines for one in found.remarks}


def test_sound_rows_have_lengths_and_answers_and_no_remark(workspace_folder: Path) -> None:
    rows = [RED, BLUE, {**RED, "prompt": "A : " * 3 + "A"}, {**BLUE, "prompt": "A : is the big star blue or not ? A :"}]
    found = checked(workspace_folder, written(workspace_folder, *rows))
    assert remarks(found) == {}
    assert not found.is_refused
    assert found.rows == 4
    assert found.answers == {" red": 2, " blue": 2}
    # words are tokens
    assert found.lengths == Lengths(12, 13, 13, limit=64, half_answer=1, longest_answer=1)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("", "an empty line"),
        ('{"prompt": "x"}', "no completion"),
        ('{"prompt": "x", "completion": ""}', "completion is not text, or is empty"),
        ("[1]", "a list"),
        ('{"prompt": "x", "prompt": "y", "completion": "z"}', "the key 'prompt' appears twice"),
    ],
)
def test_every_bad_line_is_told_at_once(workspace_folder: Path, bad: str, said: str) -> None:
    found = checked(workspace_folder, written(workspace_folder, bad, RED, bad, "[oops", BLUE))
    told = remarks(found)
    assert told[f"FAIL {said}"] == [1, 3]
    assert any(text.startswith("FAIL not JSON") and lines == [4] for text, lines in told.items())
    assert found.is_refused
    assert found.rows == 2


def test_a_file_that_is_no_text_is_told_beside_the_others(workspace_folder: Path) -> None:
    (workspace_folder / "private/client-2/train.jsonl").write_bytes(b"\x1f\x8b\x08")
    found = {one.path.parent.name: one for one in check_rows(Workspace(workspace_folder))}
    assert found.keys() == {"client-1", "client-2", "client-3", "server"}
    assert found["client-2"].is_refused
    assert "gzip" in found["client-2"].remarks[0].found
    assert not found["client-1"].is_refused


@pytest.mark.parametrize(("too_long", "level"), [("refuse", "FAIL"), ("skip", "WARN")])
def test_rows_that_are_too_long_are_told_with_the_figure(workspace_folder: Path, too_long: str, level: str) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[evaluation]", f'[data]\ntoo_long = "{too_long}"\n\n[evaluation]')
    edit(toml, "steps = 6", "steps = 6\nmax_length = 12")
    long = {"prompt": "A : " * 7 + "A", "completion": " red"}
    found = checked(workspace_folder, written(workspace_folder, RED, long, BLUE, {**long, "prompt": "A : " * 6 + "A"}))
    [(said, lines)] = remarks(found).items()
    assert said.startswith(f"{level} more than 12 tokens, 16 at most")
    assert lines == [2, 4]
    assert found.is_refused == (level == "FAIL")


def test_where_no_row_fits_leaving_them_out_is_no_way(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[evaluation]", '[data]\ntoo_long = "skip"\n\n[evaluation]')
    edit(toml, "steps = 6", "steps = 6\nmax_length = 5")
    assert checked(workspace_folder, written(workspace_folder, RED, BLUE)).is_refused


def test_repeats_contradictions_and_spaces(workspace_folder: Path) -> None:
    unspaced, doubled = {**BLUE, "completion": "blue"}, {"prompt": "is the star red ? ", "completion": "  red"}
    found = checked(workspace_folder, written(workspace_folder, RED, BLUE, RED, unspaced, doubled, RED))
    told = remarks(found)
    assert told["WARN the same row as on an earlier line"] == [3, 6]
    assert told["WARN one prompt with different completions"] == [2, 4]
    assert told["WARN no space between prompt and completion"] == [4]
    assert told["WARN two spaces or more between prompt and completion"] == [5]
    assert not found.is_refused


def test_rows_of_other_parties_and_of_the_test_are_told(workspace_folder: Path) -> None:
    asked = json.loads((workspace_folder / "data/test.jsonl").read_text().splitlines()[0])["question"]
    write_rows(workspace_folder / "private/client-1/train.jsonl", [RED, {"prompt": asked, "completion": " red"}, BLUE])
    write_rows(workspace_folder / "private/client-2/train.jsonl", [GREEN, BLUE])
    found = {one.path.parent.name: remarks(one) for one in check_rows(Workspace(workspace_folder))}
    assert found["client-1"]["WARN the prompt is also a question that is scored"] == [2]
    assert found["client-1"]["WARN rows of private/client-2/train.jsonl, too"] == [3]
    assert found["client-2"]["WARN rows of private/client-1/train.jsonl, too"] == [2]
    only = check_rows(Workspace(workspace_folder), client=2)
    assert [one.path.parent.name for one in only] == ["client-2"]


def test_a_mended_copy_has_what_can_be_mended_and_the_file_stays(workspace_folder: Path) -> None:
    unspaced = {**BLUE, "completion": "blue", "label": "2"}
    doubled = {"prompt": "is the star red ? ", "completion": "  red é"}
    path = written(workspace_folder, RED, "", unspaced, RED, "[oops", doubled, ends="\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    before = path.read_bytes()
    found = checked(workspace_folder, path, fix=True)
    assert path.read_bytes() == before
    assert found.mended is not None
    assert found.mends == [
        "byte order mark taken out (1)",
        "line ends made Unix's (6)",
        "empty lines taken out (1)",
        "spaces put before completions (1)",
        "repeated rows taken out (1)",
        "spaces before completions made one (1)",
    ]
    lines = found.mended.read_bytes().decode().split("\n")
    assert lines[2:] == [
        "[oops",
        json.dumps({"prompt": "is the star red ?", "completion": " red é"}, ensure_ascii=False),
        "",
    ]
    assert json.loads(lines[1]) == {**unspaced, "completion": " blue"}
    assert lines[0] == json.dumps(RED)
    again = checked(workspace_folder, found.mended, fix=True)
    assert again.mended is None
    assert list(remarks(again).values()) == [[3]]
    found.mended.write_text("something else\n")
    with pytest.raises(Refused, match=r"own\.mended\.jsonl is there already"):
        checked(workspace_folder, path, fix=True)


def test_what_can_be_trained_on_is_what_read_rows_reads(workspace_folder: Path) -> None:
    path = written(workspace_folder, RED, BLUE, GREEN, ends="\r\n")
    found = checked(workspace_folder, path)
    assert (found.rows, found.is_refused) == (len(read_rows(path)[0]), False)


def test_the_command_prints_lines_not_texts(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    secret = {"prompt": "the patient is small ?", "completion": " " + "green " * 20 + "red"}
    path = written(workspace_folder, secret, secret, '{"prompt": "the patient"}')
    outcome = fedcollm("check-rows", str(path), "-w", str(workspace_folder))
    assert outcome.code == 4
    assert "WARN the same row as on an earlier line: line 2" in outcome.out
    assert "FAIL no completion: line 3" in outcome.out
    assert "1 would be refused" in outcome.out
    assert "patient" not in outcome.out + outcome.err
    assert "green" not in outcome.out + outcome.err
    told = json.loads(fedcollm("check-rows", str(path), "--json", "-w", str(workspace_folder)).out)
    assert told[0]["is_refused"] is True
    assert {tuple(one["lines"]) for one in told[0]["remarks"]} == {(2,), (3,)}


def test_without_a_tokenizer_or_questions_the_rest_is_told(workspace_folder: Path) -> None:
    (workspace_folder / "models").unlink()
    (workspace_folder / "data/test.jsonl").unlink()
    notes: list[str] = []
    found = check_rows(
        Workspace(workspace_folder),
        files=[written(workspace_folder, RED, RED)],
        report=lambda event: notes.append(event.text),
    )
    assert found[0].lengths is None
    assert remarks(found[0]) == {"WARN the same row as on an earlier line": [2]}
    assert any("not compared with the questions" in note for note in notes)
    assert any("are not counted in tokens" in note for note in notes)


def test_nothing_to_check(workspace_folder: Path) -> None:
    with pytest.raises(UsageProblem, match="there is no client 7"):
        check_rows(Workspace(workspace_folder), client=7)
    with pytest.raises(NotReady, match="is not there"):
        check_rows(Workspace(workspace_folder), files=[workspace_folder / "nowhere.jsonl"])
    (workspace_folder / "private/client-1/train.jsonl").unlink()
    with pytest.raises(NotReady, match="there are no rows here"):
        check_rows(Workspace(workspace_folder), client=1)


def test_texts_that_differ_in_most_rows_are_no_labels(workspace_folder: Path) -> None:
    assert checked(workspace_folder, written(workspace_folder, RED, BLUE, GREEN)).answers is None


def test_of_a_key_that_is_not_ours_nothing_is_told(workspace_folder: Path) -> None:
    found = checked(workspace_folder, written(workspace_folder, RED, '{"Mr Smith": 1, "Mr Smith": 2}'))
    assert remarks(found) == {"FAIL a key appears twice": [2]}


def test_lines_that_are_no_json_in_one_way_are_told_together(workspace_folder: Path) -> None:
    found = checked(workspace_folder, written(workspace_folder, '{"prompt": x', RED, '{"completion":   x'))
    assert remarks(found) == {"FAIL not JSON (Expecting value)": [1, 3]}


def test_the_rest_of_a_row_stays_to_the_letter_in_a_mended_copy(workspace_folder: Path) -> None:
    rest = r'"n": 0.10000000000000000001, "\ud800": {"prompt" : ["\ud800", 1e999]}, "m":-0'
    line = '{"completion": "red",  "prompt":"is \u2028 it \\"red\\" ?" , ' + rest + "}"
    found = checked(workspace_folder, written(workspace_folder, line), fix=True)
    assert found.mended is not None
    assert found.mended.read_text() == line.replace('"red",', '" red",', 1) + "\n"


def test_rows_that_are_one_once_their_spaces_are_mended_are_in_the_copy_once(workspace_folder: Path) -> None:
    doubled = {"prompt": RED["prompt"] + " ", "completion": RED["completion"]}
    found = checked(workspace_folder, written(workspace_folder, RED, doubled), fix=True)
    assert found.mended is not None
    assert found.mended.read_text() == json.dumps(RED) + "\n"
    assert found.mends == ["repeated rows taken out (1)"]


def test_an_indented_line_is_no_answer_with_too_many_spaces(workspace_folder: Path) -> None:
    code = {"prompt": "what colour is the star ?\n", "completion": "    red"}
    found = checked(workspace_folder, written(workspace_folder, code), fix=True)
    assert (remarks(found), found.mended) == ({}, None)


def test_no_copy_is_written_of_nothing(workspace_folder: Path) -> None:
    found = checked(workspace_folder, written(workspace_folder, "", " "), fix=True)
    assert (remarks(found), found.mended) == ({"FAIL an empty line": [1, 2]}, None)


def test_copies_are_written_all_or_none_and_each_has_a_name_of_its_own(workspace_folder: Path) -> None:
    text = json.dumps({**RED, "completion": "red"}) + "\n"
    files = [workspace_folder / name for name in ("a.jsonl", "a.txt", "b.jsonl")]
    for path in files:
        path.write_text(text)
    (workspace_folder / "b.mended.jsonl").write_text("other\n")
    with pytest.raises(Refused, match=r"b\.mended\.jsonl is there already"):
        check_rows(Workspace(workspace_folder), files=files, fix=True)
    assert not (workspace_folder / "a.mended.jsonl").exists()
    (workspace_folder / "b.mended.jsonl").unlink()
    found = check_rows(Workspace(workspace_folder), files=files, fix=True)
    assert [one.mended.name for one in found if one.mended] == [
        "a.mended.jsonl",
        "a.txt.mended.jsonl",
        "b.mended.jsonl",
    ]


def test_a_file_that_may_not_be_read_is_told_beside_the_others(
    workspace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut, whole = workspace_folder / "private/client-2/train.jsonl", reading.read_own

    def read(path: Path) -> bytes:
        if path == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(reading, "read_own", read)
    found = {one.path.parent.name: one for one in check_rows(Workspace(workspace_folder))}
    assert remarks(found["client-2"]) == {"FAIL it cannot be read: Permission denied": []}
    assert not found["client-1"].is_refused


def test_a_file_that_is_named_is_checked_for_what_it_is(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "steps = 5", "steps = 5\nmax_length = 12")
    long = {"prompt": "A : " * 7 + "A", "completion": " red"}
    auxiliary = write_rows(workspace_folder / "private/server/auxiliary.jsonl", [RED, {"prompt": "A : " * 7 + "A"}])
    held_out = write_rows(workspace_folder / "private/server/held-out.jsonl", [RED, long])
    found = check_rows(
        Workspace(workspace_folder), files=[auxiliary, held_out, auxiliary.parent / "../server" / auxiliary.name]
    )
    assert [one.path for one in found] == [auxiliary, held_out]
    assert remarks(found[0]) == {
        "FAIL more than 12 tokens, 15 at most": [2],
        "WARN rows of private/server/held-out.jsonl, too": [1],
    }
    # The gate reads them as clients read theirs.
    assert remarks(found[1]) == {"WARN rows of private/server/auxiliary.jsonl, too": [1]}


def test_rows_without_completion_where_they_teach_nothing(workspace_folder: Path) -> None:
    auxiliary = write_rows(workspace_folder / "private/server/auxiliary.jsonl", [RED, {"prompt": RED["prompt"]}])
    assert remarks(check_rows(Workspace(workspace_folder), files=[auxiliary])[0]) == {}
    edit(workspace_folder / "fedcollm.toml", "steps = 5", 'steps = 5\nselect = "min-ce"')
    told = remarks(check_rows(Workspace(workspace_folder), files=[auxiliary])[0])
    assert told == {"WARN no completion, and so teaches nothing": [2]}
    write_rows(auxiliary, [{"prompt": "A : x"}])
    told = remarks(check_rows(Workspace(workspace_folder), files=[auxiliary])[0])
    assert told == {"FAIL no row has a completion": []}


def test_public_rows_are_read_by_each_party_s_own_model(tmp_path: Path, unlike_models: Path) -> None:
    folder = make_unlike_workspace(tmp_path / "unlike", unlike_models)
    edit(folder / "fedcollm.toml", "steps = 5", "steps = 5\nmax_length = 40")
    public = {one.path.parent.name: one for one in check_rows(Workspace(folder)) if one.path.name != "train.jsonl"}
    assert public["client-1"].is_refused  # it reads letters
    assert not public["server"].is_refused  # the LLM has a token for most words
    longest = {name: one.lengths.longest for name, one in public.items() if one.lengths}
    assert longest["client-2"] < longest["server"] < longest["client-1"]


def test_the_move_that_is_advised_can_be_given(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    write_rows(workspace_folder / "private/client-1/train.jsonl", [RED, RED])
    outcome = fedcollm("check-rows", "--client", "1", "--fix", "-w", str(workspace_folder))
    assert outcome.code == 0
    assert "mv private/client-1/train.mended.jsonl private/client-1/train.jsonl" in outcome.out
