"""task_files: tasks are data, and every local file that they name counts."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest

from builders import edit
from stages.data import tasks
from stages.planning.missing import missing
from stages.progress.status import status
from stages.runtime.errors import Problem, Refused, UsageProblem
from stages.workspace import task_files
from stages.workspace.paths import Workspace

PROGRAM = "from pathlib import Path\nPath({!r}).touch()\ndef f(doc):\n    return doc['question']\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('doc_to_text: "{{question}}"', "doc_to_text: !function program.f"),
        ("task: colours", "task: colours\nprocess_docs: !function program.f"),
        ("task: colours", "task: colours\ninclude: ../outside/more"),
        ("metric: acc,", "metric: ./tasks/program.py,"),
        ("metric: acc,", "metric: acc, hf_evaluate: true,"),
        ("metric: acc,", "metric: 7,"),
        ("dataset_path: json", "dataset_path: pandas"),
        ("dataset_path: json", "dataset_path: tasks/program.py"),
        ("task: colours", "task: colours\ngeneration_kwargs: {custom_generate: ./tasks}"),
        ("task: colours", "task: colours\nunsafe_code: true"),
        ('"{{choices}}"', "[[!function program.f]]"),
        (
            "task: colours",
            "task: colours\nfilter_list: [{name: x, filter: [{function: map, a: [[!function program.f]]}]}]",
        ),
        ("task: colours", "task: colours\nmore: {!function program.f : 1}"),
        ("task: colours", "task: colours\nprocess_docs: !function program.f\nprocess_docs: null"),
        ("task: colours", "task: colours\nmore: &x {a: !function program.f}\nmore: 1"),
        ("task: colours", "task: colours\nmore: !function {a: program.f}"),
        ("task: colours", "%TAG !e! !func\n---\ntask: colours\nprocess_docs: !e!tion program.f"),
        ("task: colours", "task: colours\nclass: tasks.program.Task"),
        ("task: colours", "task: colours\ncustom_dataset: tasks.program.f"),
        ("task: colours", "group: many\ntask: [{task: inner, process_docs: !function program.f}]"),
    ],
)
def test_a_task_file_runs_no_code(workspace_folder: Path, tmp_path: Path, old: str, new: str) -> None:
    mark = tmp_path / "ran"
    for folder in ("tasks", "outside"):
        (workspace_folder / folder).mkdir(exist_ok=True)
        (workspace_folder / folder / "program.py").write_text(PROGRAM.format(str(mark)))
    (workspace_folder / "outside/more").write_text("process_docs: !function program.f\n")
    edit(workspace_folder / "tasks/colours.yaml", old, new)
    with pytest.raises(Refused, match="would run code") as caught:
        tasks.load(Workspace(workspace_folder), ["colours"])
    assert "run_task_code" in str(caught.value.mend)
    assert not mark.exists()


def test_a_users_own_code_runs_where_machine_toml_says_so(workspace_folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (workspace_folder / "tasks/program.py").write_text(PROGRAM.format(str(mark)))
    edit(workspace_folder / "tasks/colours.yaml", 'doc_to_text: "{{question}}"', "doc_to_text: !function program.f")
    machine = workspace_folder / "machine.toml"
    machine.write_text("run_task_code = true\n" + (machine.read_text() if machine.exists() else ""))
    assert tasks.load(Workspace(workspace_folder), ["colours"])
    assert mark.exists()


@pytest.mark.parametrize(
    "way",
    [
        "cycler.__init__.__globals__.os.system('touch MARK')",
        "''.__class__.__mro__[1].__subclasses__()",
        "self._TemplateReference__context",
        "lipsum.__globals__['os'].system('touch MARK')",
        "namespace.__init__.__globals__",
    ],
)
def test_a_template_has_no_way_out(workspace_folder: Path, tmp_path: Path, way: str) -> None:
    mark = tmp_path / "ran"
    text = way.replace("MARK", str(mark))
    edit(workspace_folder / "tasks/colours.yaml", '"{{question}}"', f'"{{{{ {text} }}}}{{{{question}}}}"')
    with pytest.raises(UsageProblem):
        tasks.load(Workspace(workspace_folder), ["colours"])
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("q.jsonl", "{test: data/other/q.jsonl}"),
        ("my q.jsonl", '{test: "data/other/my q.jsonl"}'),
        ("fräge", '{test: ["data/other/fräge"]}'),
        ("q.jsonl.gz", "data/other/q.jsonl.gz"),
        ("q7.jsonl", '"data/other/q*.jsonl"'),
        ("deep.jsonl", "data/**/deep.jsonl"),
        (".hidden", "data/other/.hidden"),
    ],
)
def test_the_digest_sees_every_data_file(workspace_folder: Path, name: str, named: str) -> None:
    place = workspace_folder / "data/other" / name
    place.parent.mkdir()
    place.write_bytes(gzip.compress(b"{}"))
    (workspace_folder / "tasks/mine.yaml").write_text(f"task: mine\ndataset_kwargs: {{data_files: {named}}}\n")
    before = Workspace(workspace_folder).tasks_sha256()
    assert Workspace(workspace_folder).tasks_sha256() == before
    place.write_bytes(gzip.compress(b"[]"))
    assert Workspace(workspace_folder).tasks_sha256() != before


def test_the_digest_is_the_same_however_the_workspace_is_named(
    workspace_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workspace_folder / "tasks/_shared_yaml").write_text("num_fewshot: 0\n")
    edit(workspace_folder / "tasks/colours.yaml", "task: colours", "include: _shared_yaml\ntask: colours")
    (tmp_path / "link").symlink_to(workspace_folder)
    monkeypatch.chdir(workspace_folder.parent)
    named = [workspace_folder, Path(workspace_folder.name), tmp_path / "link"]
    assert {path.name for path in named} == {workspace_folder.name, "link"}
    for digests in (
        {task_files.digest(root / "tasks", root) for root in named},
        {task_files.own_digest(root / "tasks") for root in named},
    ):
        assert len(digests) == 1
    for root in named:
        names = [name for name, _ in task_files.own_files(root / "tasks")]
        assert names.count("_shared_yaml") == 1


@pytest.mark.parametrize("key", ["dataset_path: data/other", "dataset_kwargs: {data_dir: data/other}"])
def test_the_digest_sees_a_folder_of_data(workspace_folder: Path, key: str) -> None:
    (workspace_folder / "data/other").mkdir()
    (workspace_folder / "tasks/mine.yaml").write_text(f"task: mine\n{key}\n")
    before = Workspace(workspace_folder).tasks_sha256()
    (workspace_folder / "data/other/test.jsonl").write_text("{}\n")
    assert Workspace(workspace_folder).tasks_sha256() != before


def test_an_edit_is_loaded_though_path_and_time_are_those_of_before(workspace_folder: Path) -> None:
    path = workspace_folder / "data/test.jsonl"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    (before,) = tasks.load(Workspace(workspace_folder), ["colours"])
    path.write_text(path.read_text().replace('"answer": 0', '"answer": 1'))
    os.utime(path, ns=times)  # as cp -p and rsync -t leave it
    (after,) = tasks.load(Workspace(workspace_folder), ["colours"])
    answers = [[doc["answer"] for doc in task.eval_docs] for task in (before, after)]
    assert answers == [[0, 1, 2] * 4, [1, 1, 2] * 4]


def test_a_card_of_data_that_leads_out_of_its_folder_is_refused(workspace_folder: Path) -> None:
    folder = workspace_folder / "data/deep"
    folder.mkdir()
    head = "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: {}\n"
    edit(workspace_folder / "tasks/colours.yaml", "dataset_path: json\n", "dataset_path: data/deep\n")
    edit(
        workspace_folder / "tasks/colours.yaml",
        "dataset_kwargs: {data_files: {train: data/train.jsonl, test: data/test.jsonl}}\n",
        "",
    )
    edit(workspace_folder / "tasks/colours.yaml", "training_split: train\n", "")
    shutil.copy(workspace_folder / "data/test.jsonl", folder / "inside.jsonl")
    (folder / "README.md").write_text(f"---\n{head.format('inside.jsonl')}---\n")
    assert len(tasks.load(Workspace(workspace_folder), ["colours"])[0].eval_docs) == 12
    (folder / "README.md").write_text(f"---\n{head.format('../test.jsonl')}---\n")
    with pytest.raises(Refused, match=r"README\.md names \.\./test\.jsonl, outside"):
        tasks.load(Workspace(workspace_folder), ["colours"])


@pytest.mark.parametrize("name", ["file://{}/data/test.jsonl", "local://{}/data/test.jsonl", "zip://x::{}/data/x.zip"])
def test_data_by_another_name_than_its_path_is_refused(workspace_folder: Path, name: str) -> None:
    edit(workspace_folder / "tasks/colours.yaml", "test: data/test.jsonl", f"test: '{name.format(workspace_folder)}'")
    with pytest.raises(UsageProblem, match="whose contents are not seen here"):
        tasks.load(Workspace(workspace_folder), ["colours"])


def test_a_file_that_is_not_yaml_is_named(workspace_folder: Path) -> None:
    (workspace_folder / "tasks/broken.yaml").write_text("task: [\n")
    with pytest.raises(Problem, match=r"broken\.yaml is not YAML"):
        tasks.load(Workspace(workspace_folder), ["colours"])


@pytest.mark.parametrize(
    "text",
    [
        "task: mine\ndataset_kwargs: {data_files: &a [*a]}\n",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True))
        + "task: mine\ndataset_kwargs: {data_files: *g}\n",
        "[" * 5000,
        "task: mine\nwhen: 2001-99-99\n",
        "? [a, b]\n: c\n? {d: e}\n: f\n",
        "task: !!python/name:os.system\n",
    ],
)
def test_a_file_that_is_no_task_ends_in_words_and_stops_nothing_else(workspace_folder: Path, text: str) -> None:
    (workspace_folder / "tasks/mine.yaml").write_text(text)
    with pytest.raises(UsageProblem, match=r"mine\.yaml (refers to itself|is not YAML)"):
        tasks.load(Workspace(workspace_folder), ["colours"])
    (workspace_folder / "machine.toml").write_text("run_task_code = true\n")
    with pytest.raises(UsageProblem, match=r"mine\.yaml (refers to itself|is not YAML)"):
        tasks.load(Workspace(workspace_folder), ["colours"])
    assert len(Workspace(workspace_folder).tasks_sha256()) == 64
    (found,) = missing(Workspace(workspace_folder))
    assert "mine.yaml" in found.what
    status(Workspace(workspace_folder))
    shutil.rmtree(workspace_folder / "private/server")
    assert missing(Workspace(workspace_folder)) == []  # a client scores nothing


@pytest.mark.parametrize("named", ["3", "/dev/zero", "[/dev/zero]", "{test: /dev/zero}", "{test: [1]}", "data/pipe"])
def test_data_that_is_no_file_is_refused_at_once(workspace_folder: Path, named: str) -> None:
    os.mkfifo(workspace_folder / "data/pipe")
    edit(workspace_folder / "tasks/colours.yaml", "{train: data/train.jsonl, test: data/test.jsonl}", named)
    with pytest.raises(Problem):
        tasks.load(Workspace(workspace_folder), ["colours"])
    Workspace(workspace_folder).tasks_sha256()


def test_spare_files_are_those_that_no_asked_task_includes_groups_tags_or_calls(tmp_path: Path) -> None:
    texts = {
        "many.yaml": "group: many\ntask: [one, {task: two}]\n",
        "one.yaml": "include: base/common\ntask: one\nprocess_docs: !function utils.deal\n",
        "base/common": "output_type: multiple_choice\n",
        "utils.py": "",
        "two.yaml": "task: two\n",
        "tagged.yaml": "task: three\ntag: some\n",
        "copy/two.yaml": "task: two\n",
        "broken.yaml": "task: [",
        "README.md": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    always = ["README.md", "broken.yaml", "copy/two.yaml"]
    assert task_files.spare_files(tmp_path, ["many", "some"]) == always
    one = {"one.yaml", "base/common", "utils.py"}
    assert task_files.spare_files(tmp_path, ["one"]) == sorted(texts.keys() - one)


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{b: " * 5_000, "- " * 20_000])
def test_lists_in_lists_without_end_are_refused_and_end_no_process(text: str, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(UsageProblem, match=r"deep\.yaml is not YAML"):
        task_files.check_are_data(tmp_path, tmp_path)


def test_a_hundred_levels_are_read(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 99 + "]" * 99)
    task_files.check_are_data(tmp_path, tmp_path)
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 100 + "]" * 100)
    with pytest.raises(UsageProblem, match="more than 100 levels"):
        task_files.check_are_data(tmp_path, tmp_path)


def test_what_no_file_defines_and_which_data_are_absent(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "one.yaml").write_text("task: one\ntag: all\ndataset_kwargs: {data_files: {test: data/a.jsonl}}\n")
    (tasks / "two.yaml").write_text("group: two\ntask: [one]\ndata_files: [data/b.jsonl, 'https://x/y.jsonl']\n")
    assert task_files.undefined(tasks, ["one", "two", "all", "three", "three"]) == ["three"]
    assert task_files.absent_data(tasks, tmp_path) == ["data/a.jsonl", "data/b.jsonl"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("{}\n")
    assert task_files.absent_data(tasks, tmp_path) == ["data/b.jsonl"]
