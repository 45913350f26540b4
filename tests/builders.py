"""What tests build on disk: a workspace with tiny real models and data that has a rule to learn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

WORDS = ["red", "blue", "green", "square", "circle", "star", "big", "small", "left", "right", "of", "the", "a", "is", "what", "colour", "shape", "size", "Q", "A", ":", "?", ".", "0", "1", "2", "3"]
COLOURS, SHAPES = ("red", "blue", "green"), ("square", "circle", "star")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def rows(count: int, *, start: int = 0) -> list[dict[str, str]]:
    """Rows with a rule to learn: what follows a shape is its colour."""
    made = []
    for i in range(start, start + count):
        shape, size = SHAPES[i % 3], ("big", "small")[i // 3 % 2]
        made.append(
            {"prompt": f"Q : what colour is the {size} {shape} {i % 4} ? A :", "completion": f" {COLOURS[i % 3]}"}
        )
    return made


def write_rows(path: Path, items: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


AGREEMENT = """
[federation]
name = "tiny"
clients = 3
rounds = 2
seed = 7

[slm]
model = "models/slm"
dtype = "float32"
[slm.lora]
r = 4
alpha = 8

[llm]
model = "models/llm"
dtype = "float32"
[llm.lora]
r = 4
alpha = 8

[client_training]
steps = 6
batch_size = 4
learning_rate = 1e-2

[distillation]
steps = 5
batch_size = 4
slm_learning_rate = 1e-2
llm_learning_rate = 1e-2

[evaluation]
tasks = ["colours"]
batch_size = 8
"""

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {train: data/train.jsonl, test: data/test.jsonl}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def questions(count: int) -> list[dict[str, object]]:
    """The rows as multiple-choice questions, for lm-eval."""
    return [
        {"question": row["prompt"], "choices": list(COLOURS), "answer": COLOURS.index(row["completion"].strip())}
        for row in rows(count)
    ]


def make_workspace(folder: Path, base_models: Path) -> Path:
    folder.mkdir()
    (folder / "fedcollm.toml").write_text(AGREEMENT)
    (folder / "models").symlink_to(base_models)
    for client in (1, 2, 3):
        write_rows(folder / "private" / f"client-{client}" / "train.jsonl", rows(12, start=12 * client))
    write_rows(folder / "private" / "server" / "auxiliary.jsonl", rows(12))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "colours.yaml").write_text(TASK)
    (folder / "data").mkdir()
    for part in ("train", "test"):
        (folder / "data" / f"{part}.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(12)))
    return folder
