"""tasks: training prompts are the very requests that lm-eval will score."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from lm_eval import utils
from lm_eval.tasks import TaskManager

from builders import COLOURS, ROOT, edit, questions
from stages.data import tasks
from stages.data.rows import Row
from stages.runtime.errors import Damaged, NotReady, Problem, StorageProblem, UsageProblem
from stages.runtime.events import Event
from stages.workspace.paths import Workspace


def rows_of(folder: Path, *names: str) -> list[Row]:
    return [row for task in tasks.load(Workspace(folder), list(names)) for row in tasks.training_rows(task)]


def define(folder: Path, name: str, text: str, data: list[dict[str, object]] | None = None) -> None:
    (folder / "tasks" / f"{name}.yaml").write_text(text)
    if data is not None:
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))


def test_rows_are_the_tasks_prompt_and_its_right_answer(workspace_folder: Path) -> None:
    found = rows_of(workspace_folder, "colours")
    assert found == [
        Row(str(q["question"]), f" {COLOURS[int(str(q['answer']))]}", label=str(q["answer"]), source="colours")
        for q in questions(12)
    ]


def test_rows_are_the_requests_that_lm_eval_itself_makes(
    workspace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace_folder)  # where lm-eval alone looks for relative data
    manager = TaskManager(include_path=str(workspace_folder / "tasks"), include_defaults=False)
    task = manager.load(["colours"])["tasks"]["colours"]
    task.build_all_requests(rank=0, world_size=1)  # of the test split, which holds the same questions here
    scored = [instance.args for instance in task.instances if instance.idx == instance.doc["answer"]]
    assert [(row.prompt, row.completion) for row in rows_of(workspace_folder, "colours")] == scored
    assert list(tasks.test_prompts(tasks.load(Workspace(workspace_folder), ["colours"])[0])) == [p for p, _ in scored]


@pytest.mark.parametrize("kind", ["task", "group", "group of groups", "tag"])
def test_data_is_found_from_the_workspace_wherever_the_command_is_given(
    workspace_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = rows_of(workspace_folder, "colours")
    monkeypatch.chdir(tmp_path)
    define(workspace_folder, "a", "group: group\ntask: [colours]\n")
    define(workspace_folder, "b", "group: group of groups\ntask: [group]\n")
    edit(workspace_folder / "tasks" / "colours.yaml", "task: colours", "task: colours\ntag: tag")
    assert rows_of(workspace_folder, "colours" if kind == "task" else kind) == expected


def test_a_right_answer_may_be_given_by_its_text(workspace_folder: Path) -> None:
    expected = rows_of(workspace_folder, "colours")
    edit(workspace_folder / "tasks" / "colours.yaml", '"{{answer}}"', '"{{choices[answer]}}"')
    assert rows_of(workspace_folder, "colours") == expected


def test_an_answer_to_be_generated_follows_the_tasks_delimiter(workspace_folder: Path) -> None:
    path = workspace_folder / "tasks" / "colours.yaml"
    edit(path, "output_type: multiple_choice", 'output_type: generate_until\ntarget_delimiter: " = "')
    edit(path, 'doc_to_choice: "{{choices}}"\n', "")
    edit(path, '"{{answer}}"', '"{{choices[answer]}}"')
    edit(path, "metric: acc,", "metric: exact_match,")
    first = rows_of(workspace_folder, "colours")[0]
    assert (first.completion, first.label, first.source) == (f" = {COLOURS[0]}", "", "colours")


@pytest.mark.parametrize(
    ("old", "new", "message", "mend"),
    [
        ("training_split: train\n", "", "has no training split", "training_split"),
        ("output_type: multiple_choice", "output_type: loglikelihood", "is of type loglikelihood", "JSONL"),
    ],
)
def test_a_task_that_rows_cannot_be_made_from_is_refused(
    workspace_folder: Path, old: str, new: str, message: str, mend: str
) -> None:
    edit(workspace_folder / "tasks" / "colours.yaml", old, new)
    with pytest.raises(UsageProblem, match=f"task colours {message}") as caught:
        rows_of(workspace_folder, "colours")
    assert mend in str(caught.value.mend)


def test_data_that_is_not_there_is_not_ready(workspace_folder: Path) -> None:
    (workspace_folder / "data" / "train.jsonl").unlink()
    with pytest.raises(NotReady, match="the data of task colours is not there") as caught:
        rows_of(workspace_folder, "colours")
    assert "data_files" in str(caught.value.mend)


def test_a_dataset_that_needs_a_network_is_not_ready_without_one(workspace_folder: Path) -> None:
    template = (ROOT / "workspace_template" / "tasks" / "openbookqa.yaml").read_text()
    define(workspace_folder, "openbookqa", template.replace("allenai/openbookqa", "nobody/no-such-dataset"))
    with pytest.raises((NotReady, Problem), match="openbookqa"):
        rows_of(workspace_folder, "openbookqa")


ARC = {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"}
OPEN_BOOK = {"question_stem": "The sun is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.mark.parametrize(
    ("name", "document", "prompt"),
    [
        ("arc_easy", ARC, "Question: Why?\nAnswer:"),
        ("arc_challenge", ARC, "Question: Why?\nAnswer:"),
        ("commonsense_qa", ARC, "Question: Why?\nAnswer:"),
        ("openbookqa", OPEN_BOOK, "The sun is"),
    ],
)
def test_the_templates_tasks_score_each_choices_text_and_go_before_lm_evals_own(
    workspace_folder: Path, name: str, document: dict[str, object], prompt: str
) -> None:
    lines = (ROOT / "workspace_template" / "tasks" / f"{name}.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("dataset_path", "dataset_name"))]
    places = ", ".join(f"{split}: data/{name}.jsonl" for split in ("train", "validation", "test"))
    local = ["dataset_path: json", f"dataset_kwargs: {{data_files: {{{places}}}}}"]  # as the file's comment says
    define(workspace_folder, name, "\n".join([*kept, *local]), [document])
    assert rows_of(workspace_folder, name) == [Row(prompt, " b", label="1", source=name)]


def test_a_name_that_nothing_defines_is_answered_with_those_of_the_workspace(workspace_folder: Path) -> None:
    with pytest.raises(UsageProblem, match="no task named 'colors', here or in lm-eval") as caught:
        tasks.load(Workspace(workspace_folder), ["colors"])
    assert "known in this workspace: colours" in str(caught.value.mend)
    assert "tasks/" in str(caught.value.mend)


@pytest.mark.parametrize("answer", ["A", "0", 3, -1, [0, "red"], ["red"], [], None])
def test_a_right_answer_that_is_none_of_the_choices_is_refused(workspace_folder: Path, answer: object) -> None:
    path = workspace_folder / "data/test.jsonl"
    rows = [json.loads(line) | {"key": answer} for line in path.read_text().splitlines()]
    for part in ("train", "test"):
        (workspace_folder / f"data/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(workspace_folder / "tasks" / "colours.yaml", '"{{answer}}"', "key")
    with pytest.raises(UsageProblem, match=r"question 1 of task colours: ") as caught:
        tasks.check_answers(tasks.load(Workspace(workspace_folder), ["colours"])[0])
    assert "data" in str(caught.value.mend)


def test_a_number_that_is_the_text_of_another_choice_is_refused(workspace_folder: Path) -> None:
    rows = [{"question": "how many ?", "choices": ["1", "2", "0"], "answer": 2}] * 2
    for part in ("train", "test"):
        (workspace_folder / f"data/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageProblem, match="may be an index or the text of another choice"):
        rows_of(workspace_folder, "colours")
    edit(workspace_folder / "tasks" / "colours.yaml", '"{{answer}}"', "answer")
    assert rows_of(workspace_folder, "colours")[0].completion == " 0"


@pytest.mark.parametrize("target", ['"{{names}}"', "names"])
def test_of_a_list_of_answers_to_be_generated_the_first_is_the_row(workspace_folder: Path, target: str) -> None:
    path = workspace_folder / "tasks" / "colours.yaml"
    rows = [{"question": "who ?", "names": ["the whale", "whale"]}] * 2
    for part in ("train", "test"):
        (workspace_folder / f"data/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit(path, "output_type: multiple_choice", "output_type: generate_until")
    edit(path, 'doc_to_choice: "{{choices}}"\n', "")
    edit(path, '"{{answer}}"', target)
    edit(path, "metric: acc,", "metric: exact_match,")
    assert rows_of(workspace_folder, "colours")[0].completion == " the whale"


@pytest.mark.parametrize(
    ("key", "right"),
    [(1, 1), ("blue", 1), (True, 1), (False, 0), ([1], 1), ([2, 0], 2), ("2", 2)],
)
def test_a_right_answer_is_the_same_in_training_and_in_scoring(workspace_folder: Path, key: object, right: int) -> None:
    question = {"question": "which ?", "choices": ["red", "blue", "2"], "key": key}
    for part in ("train", "test"):
        (workspace_folder / f"data/{part}.jsonl").write_text(2 * (json.dumps(question) + "\n"))
    edit(workspace_folder / "tasks" / "colours.yaml", '"{{answer}}"', "key")
    (task,) = tasks.load(Workspace(workspace_folder), ["colours"])
    tasks.check_answers(task)
    (row, _) = tasks.training_rows(task)
    assert (row.completion, row.label) == (f" {question['choices'][right]}", str(right))  # type: ignore[index]
    doc = next(iter(task.eval_docs))
    likeliest = [(0.0 if choice == right else -9.0, False) for choice in range(3)]
    assert task.process_results(doc, likeliest)["acc"] == 1.0


@pytest.mark.parametrize("names", [None, "", " ", [], [None], ["", "whale"]])
def test_an_answer_to_be_generated_that_is_no_text_is_refused(workspace_folder: Path, names: object) -> None:
    path = workspace_folder / "tasks" / "colours.yaml"
    asked = [{"question": "who ?", "names": names}, {"question": "who ?", "names": names}]
    for part in ("train", "test"):
        (workspace_folder / f"data/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    edit(path, "output_type: multiple_choice", "output_type: generate_until")
    edit(path, 'doc_to_choice: "{{choices}}"\n', "")
    edit(path, '"{{answer}}"', "names")
    edit(path, "metric: acc,", "metric: exact_match,")
    (task,) = tasks.load(Workspace(workspace_folder), ["colours"])
    for use in (tasks.training_rows, tasks.check_answers):
        with pytest.raises(UsageProblem, match="question 1 of task colours"):
            use(task)


def test_what_changes_a_score_is_told(workspace_folder: Path) -> None:
    path, events = workspace_folder / "tasks" / "colours.yaml", list[Event]()
    edit(path, "task: colours", "task: colours\nnum_fewshot: 3")
    (workspace_folder / "tasks" / "other.yaml").write_text(path.read_text())
    question = {"question": "which ?", "choices": ["red", "blue", "red"], "answer": 2}
    (workspace_folder / "data/test.jsonl").write_text(2 * (json.dumps(question) + "\n"))
    (task,) = tasks.load(Workspace(workspace_folder), ["colours"], events.append)
    tasks.check_answers(task, events.append)
    told = [event.text for event in events if event.kind == "warning"]
    assert [words for words in told if "Duplicate task name 'colours' found" in words]
    assert "2 questions of colours have a choice that reads like the right one and counts as wrong" in told
    assert "colours asks for 3 examples before each question; it is scored without" in told
    assert len(told) == 3


@pytest.mark.parametrize("text", ['"Q : {{question}} A :"', "question"])
def test_a_null_in_a_question_is_never_read_as_the_word_none(workspace_folder: Path, text: str) -> None:
    path = workspace_folder / "data/test.jsonl"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, json.dumps(json.loads(second) | {"question": None}), *rest]))
    (workspace_folder / "data/train.jsonl").write_text(path.read_text())
    edit(workspace_folder / "tasks" / "colours.yaml", '"{{question}}"', text)
    task = tasks.load(Workspace(workspace_folder), ["colours"])[0]
    for read in (tasks.check_answers, tasks.training_rows, lambda task: list(tasks.test_prompts(task))):
        with pytest.raises(UsageProblem, match="question 2"):
            read(task)  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["byte order mark", "ends of another system", "gzip", "empty lines"])
def test_questions_are_read_as_editors_and_programs_save_them(workspace_folder: Path, kind: str) -> None:
    path = workspace_folder / "data/train.jsonl"
    content = path.read_bytes()
    expected = rows_of(workspace_folder, "colours")
    path.write_bytes(
        {
            "byte order mark": b"\xef\xbb\xbf" + content,
            "ends of another system": content.replace(b"\n", b"\r\n"),
            "gzip": gzip.compress(content, mtime=0),
            "empty lines": content + b"\n\n",
        }[kind]
    )
    assert rows_of(workspace_folder, "colours") == expected


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("nonsense", "not JSON"),
        ('{"question": "Q", "question": "R", "choices": ["a", "b"], "answer": 0}', "the key 'question' appears twice"),
    ],
)
def test_all_bad_lines_of_questions_are_told_by_file_and_number(workspace_folder: Path, line: str, found: str) -> None:
    path = workspace_folder / "data/test.jsonl"
    path.write_text(f"{path.read_text()}{line}\n[\n")
    with pytest.raises(Damaged, match=rf"^line 13 of test\.jsonl: {found}(?s:.*)\n  - line 14: not JSON") as caught:
        rows_of(workspace_folder, "colours")
    assert caught.value.mend == "correct these 2 lines of test.jsonl"


@pytest.mark.parametrize("place", ["file/cache", "dangling/cache/datasets", "dangling", "loop/cache"])
def test_a_cache_that_cannot_be_written_is_a_fault_of_storage_and_nothing_to_wait_for(
    workspace_folder: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "scratch that is not mounted")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / place))
    with pytest.raises(StorageProblem, match="the cache of datasets not be written") as caught:
        rows_of(workspace_folder, "colours")
    assert caught.value.exit_code == 8
    assert "set HF_HOME" in str(caught.value.mend)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("task: colours", "group: colours\ntask: [colours]", "the group colours is a member of itself"),
        ("task: colours", "task: 5", "no task named 'colours'"),
        ("task: colours", "task: colours\ninclude: nothing.yaml", "includes nothing.yaml, which is not there"),
        ("task: colours", "task: colours\nnonsense: 1", "nonsense"),
    ],
)
def test_a_mistake_in_a_task_file_is_named(workspace_folder: Path, old: str, new: str, found: str) -> None:
    edit(workspace_folder / "tasks" / "colours.yaml", old, new)
    with pytest.raises(UsageProblem, match=found):
        tasks.load(Workspace(workspace_folder), ["colours"])


def test_a_template_is_compiled_once_and_each_question_has_its_own_text() -> None:
    template = "{{question}} and {{1 + 1}}"
    assert [utils.apply_template(template, {"question": one}) for one in "ab"] == ["a and 2", "b and 2"]
    assert utils.env.from_string(template) is utils.env.from_string(template)
