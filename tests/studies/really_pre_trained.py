"""The study of docs/explanation/really-pre-trained-models.md, by the commands that a user types.

    python tests/studies/really_pre_trained.py DATA LLM SLM FOLDER PART...

DATA holds datasets/arc_easy/*.jsonl. LLM: a model; SLM: made from it by `fedcollm shear`. FOLDER gets a workspace for
each question, and tables/, Markdown as the commands print it. A part that was stopped goes on when the same command is
given again; what is done is not done again. Parts are below, in the order in which they should be taken.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit

SEEDS = "1,2,3"
QUESTIONS = 600
LORA = {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
BUDGET: dict[str, Any] = {
    "federation.rounds": 2,
    "client_training.epochs": None,
    "client_training.steps": 12,
    "client_training.batch_size": 8,
    "client_training.learning_rate": 1e-3,
    "distillation.epochs": None,
    "distillation.steps": 16,
    "distillation.batch_size": 8,
    "distillation.slm_learning_rate": 1e-3,
    "distillation.llm_learning_rate": 1e-3,
    "evaluation.limit": QUESTIONS,
    "evaluation.batch_size": 32,
    "evaluation.precision": "training",
}


class Study:
    """Where everything is, and the commands."""

    def __init__(self, data: str, llm: str, slm: str, folder: str) -> None:
        self.arc = Path(data).resolve() / "datasets"
        self.llm, self.slm = str(Path(llm).resolve()), str(Path(slm).resolve())
        self.folder = Path(folder).resolve()
        (self.folder / "tables").mkdir(parents=True, exist_ok=True)

    def workspace(self, name: str, settings: Mapping[str, Any], *, scored: str = "test") -> Path:
        """A workspace of these settings, with its rows dealt. scored: validation, to choose settings on."""
        place = self.folder / name
        if not (place / "private/split.json").exists():
            self.fedcollm("init", str(place), "--template", "blank", "--clients", "4")
            self._local_data(place / "tasks/arc_easy.yaml", scored)
            base = {"slm.model": self.slm, "llm.model": self.llm} | {
                f"{role}.lora.{key}": value for role in ("slm", "llm") for key, value in LORA.items()
            }
            self._set(place / "fedcollm.toml", base | BUDGET | dict(settings))
            self.fedcollm("prepare", "-w", str(place))
        return place

    def table(self, name: str, workspace: Path, *words: str) -> None:
        """What compare or sweep prints, kept as a file."""
        command = [*words, "--last-round", "--markdown", "-w", str(workspace)]
        target = self.folder / "tables" / f"{name}.md"
        target.write_text(self.fedcollm(*command))
        sys.stdout.write(f"{target}\n")

    def fedcollm(self, *words: str) -> str:
        """The command's stdout; its progress goes to stderr."""
        program = [sys.executable, "-m", "fedcollm_cli"]
        return subprocess.run([*program, *words], check=True, stdout=subprocess.PIPE, text=True).stdout

    def _local_data(self, task: Path, scored: str) -> None:
        files = {part: str(self.arc / "arc_easy" / f"{part}.jsonl") for part in ("train", "validation", "test")}
        files["test"] = files[scored]
        kept = [line for line in task.read_text().splitlines() if not line.startswith("dataset_")]
        task.write_text("\n".join([*kept, "dataset_path: json", f"dataset_kwargs: {{data_files: {files}}}", ""]))

    @staticmethod
    def _set(path: Path, settings: Mapping[str, Any]) -> None:
        document = tomlkit.parse(path.read_text())
        for key, value in settings.items():
            table: Any = document
            for name in key.split(".")[:-1]:
                table = table[name]
            if value is None:
                table.pop(key.split(".")[-1], None)
            else:
                table[key.split(".")[-1]] = value
        path.write_text(tomlkit.dumps(document))


def settings(study: Study) -> None:
    """Learning rates, on 200 validation questions and one seed: of clients, then of the server without distillation."""
    few = {"evaluation.limit": 200}
    place = study.workspace("settings-clients", few | {"federation.method": "fedavg"}, scored="validation")
    rates = "client_training.learning_rate=3e-4,1e-3,3e-3"
    study.table("settings-clients", place, "sweep", "--set", rates)
    without = {"distillation.lambda_slm": 0.0, "distillation.lambda_llm": 0.0}
    place = study.workspace("settings-server", few | without, scored="validation")
    for rate in ("3e-4", "1e-3", "3e-3"):
        pair = [f"distillation.{role}_learning_rate={rate}" for role in ("slm", "llm")]
        study.table(f"settings-server-{rate}", place, "sweep", "--set", pair[0], "--set", pair[1])


def iid(study: Study) -> None:
    """Question 1: every method, IID clients."""
    study.table("iid", study.workspace("iid", {}), "compare", "--seeds", SEEDS)


def dirichlet(study: Study) -> None:
    """Question 1, clients of unlike labels."""
    place = study.workspace("dirichlet", {"data.split": "dirichlet", "data.dirichlet_alpha": 0.3})
    study.table("dirichlet", place, "compare", "--seeds", SEEDS)


def who_teaches(study: Study) -> None:
    """Question 2: both ways as the paper has it, one way, a weak back way, and only where the teacher knows more."""
    ways = ["lambda_llm=1.0,0.0,0.1", "select=min-ce", "min_confidence=0.5"]
    for way in ways:
        place = study.workspace("iid", {})
        words = ["sweep", "--set", f"distillation.{way}", "--set", f"federation.seed={SEEDS}"]
        study.table(f"who-teaches-{way.partition('=')[0]}", place, *words)


def shares(study: Study) -> None:
    """Question 2: how much distillation is worth when answers of D^a are few."""
    place = study.workspace("iid", {})
    words = ["--set", "data.unlabelled_share=0.5,0.9", "--set", "distillation.lambda_llm=0.0"]
    words += ["--set", "distillation.lambda_slm=0.0,1.0", "--set", f"federation.seed={SEEDS}"]
    study.table("shares", place, "sweep", *words)


PARTS = {part.__name__.replace("_", "-"): part for part in (settings, iid, who_teaches, dirichlet, shares)}


def main() -> None:
    """Take the parts that are named."""
    *places, folder = sys.argv[1:5]
    for name in sys.argv[5:]:
        PARTS[name](Study(*places, folder))


if __name__ == "__main__":
    main()
