"""prepare with the task files that `init` ships: rows are exactly the requests that lm-eval scores as right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builders import ROOT, SHARED_DATA
from stages.data.prepare import prepare
from stages.workspace.paths import Workspace

ARC = SHARED_DATA / "datasets"


@pytest.fixture
def empty(workspace_folder: Path) -> Path:
    """A workspace without any party's data."""
    for path in [*workspace_folder.glob("private/*/train.jsonl"), workspace_folder / "private/server/auxiliary.jsonl"]:
        path.unlink()
    return workspace_folder


def ship(folder: Path, task: str, questions: list[dict[str, Any]]) -> Workspace:
    """The shipped task file, pointed at local files as its own first lines say; these questions train and test it."""
    for part in ("train", "validation", "test"):
        (folder / f"data/{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    shipped = (ROOT / "workspace_template/tasks" / f"{task}.yaml").read_text().splitlines()
    kept = [line for line in shipped if not line.startswith(("dataset_path:", "dataset_name:", "#"))]
    names = ", ".join(f"{part}: data/{part}.jsonl" for part in ("train", "validation", "test"))
    local = ["dataset_path: json", f"dataset_kwargs: {{data_files: {{{names}}}}}"]
    (folder / "tasks" / f"{task}.yaml").write_text("\n".join([*kept, *local]) + "\n")
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text().replace('["colours"]', f'["{task}"]') + f'\n[data]\ntasks = ["{task}"]\n')
    return Workspace(folder)


def prepared(workspace: Workspace) -> set[tuple[str, str]]:
    prepare(workspace)
    files = workspace.private.glob("*/*.jsonl")
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows)
    return {(row["prompt"], row["completion"]) for row in rows}


def lm_evals_own(task: str, folder: Path) -> set[tuple[str, str]]:
    """The request of the right choice for every training document, by the task as lm-eval itself ships it."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    arc = Path(lm_eval.tasks.__file__).parent / "arc"
    config = load_yaml(arc / "arc_easy.yaml") | load_yaml(arc / f"{task}.yaml") | {"dataset_path": "json"}
    files = {part: str(folder / f"data/{part}.jsonl") for part in ("train", "validation", "test")}
    config |= {"dataset_kwargs": {"data_files": files}}
    own = ConfigurableTask(config={k: v for k, v in config.items() if k not in ("dataset_name", "tag", "include")})
    requests = [own.construct_requests(doc, own.doc_to_text(doc)) for doc in own.training_docs()]
    return {choices[own.doc_to_target(doc)].args for doc, choices in zip(own.training_docs(), requests, strict=True)}


@pytest.mark.real
@pytest.mark.skipif(not ARC.exists(), reason=f"no real data at {ARC}")
@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge"])
def test_arc_rows_are_lm_evals_own_requests_whatever_the_labels(task: str, empty: Path) -> None:
    questions = [json.loads(line) for line in (ARC / task / "train.jsonl").read_text().splitlines()]
    odd = [one for one in questions if one["choices"]["label"] != list("ABCD")]
    assert {tuple(one["choices"]["label"]) for one in odd} >= {tuple("1234"), tuple("ABC")}
    chosen = list({one["question"]: one for one in [*odd, *questions[:100]]}.values())
    found = prepared(ship(empty, task, chosen))
    assert found == {
        (
            f"Question: {one['question']}\nAnswer:",
            f" {one['choices']['text'][one['choices']['label'].index(one['answerKey'])]}",
        )
        for one in chosen
    }
    assert found == lm_evals_own(task, empty)


def test_commonsense_qa_asks_the_question_alone_and_answers_with_the_text(empty: Path) -> None:
    labels = list("ABCDE")
    questions = [
        {
            "id": str(number),
            "question": f" What is {number}? ",
            "question_concept": "number",
            "choices": {"label": labels, "text": [f"{number} {label}" for label in labels]},
            "answerKey": labels[number % 5],
        }
        for number in range(8)
    ]
    assert prepared(ship(empty, "commonsense_qa", questions)) == {
        (f"Question: What is {number}?\nAnswer:", f" {number} {labels[number % 5]}") for number in range(8)
    }


def test_openbookqa_goes_on_from_the_stem(empty: Path) -> None:
    labels = list("ABCD")
    questions = [
        {
            "id": str(number),
            "question_stem": f"The sun of {number} is",
            "choices": {"text": [f"{number} {label}" for label in labels], "label": labels},
            "answerKey": f" {labels[number % 4]}" if number == 3 else labels[number % 4],
        }
        for number in range(8)
    ]
    assert prepared(ship(empty, "openbookqa", questions)) == {
        (f"The sun of {number} is", f" {number} {labels[number % 4]}") for number in range(8)
    }
