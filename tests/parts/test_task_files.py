"""task_files: tasks are data, and every local file that they name counts."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from builders import edit
from stages.parts import tasks
from stages.parts.errors import Problem, Refused, UsageProblem
from stages.parts.workspace import Workspace

PROGRAM = "from pathlib import Path\nPath({!r}).touch()\ndef f(doc):\n    return doc['question']\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('doc_to_text: "{{question}}"', "doc_to_text: !function program.f"),
        ("task: colours", "task: colours\nprocess_docs: !function program.f"),
        ("task: colours", "task: colours\ninclude: ../outside/more"),
        ("metric: acc,", "metric: ./tasks/program.py,"),
        ("metric: acc,", "metric: acc, hf_evaluate: true,"),
        ("dataset_path: json", "dataset_path: pandas"),
        ("dataset_path: json", "dataset_path: tasks/program.py"),
        ("task: colours", "task: colours\ngeneration_kwargs: {custom_generate: ./tasks}"),
        ("task: colours", "task: colours\nunsafe_code: true"),
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


@pytest.mark.parametrize("key", ["dataset_path: data/other", "dataset_kwargs: {data_dir: data/other}"])
def test_the_digest_sees_a_folder_of_data(workspace_folder: Path, key: str) -> None:
    (workspace_folder / "data/other").mkdir()
    (workspace_folder / "tasks/mine.yaml").write_text(f"task: mine\n{key}\n")
    before = Workspace(workspace_folder).tasks_sha256()
    (workspace_folder / "data/other/test.jsonl").write_text("{}\n")
    assert Workspace(workspace_folder).tasks_sha256() != before


def test_a_file_that_is_not_yaml_is_named(workspace_folder: Path) -> None:
    (workspace_folder / "tasks/broken.yaml").write_text("task: [\n")
    with pytest.raises(Problem, match=r"broken\.yaml is not YAML"):
        tasks.load(Workspace(workspace_folder), ["colours"])
