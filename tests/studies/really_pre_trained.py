"""The study of docs/explanation/really-pre-trained-models.md, by the commands that a user types.

    python tests/studies/really_pre_trained.py DATA LLM SLM FOLDER PART...

DATA holds datasets/arc_easy/*.jsonl, and commonsense_qa. LLM: a model; SLM: made from it by `fedcollm shear`. FOLDER
gets a workspace for each question, and tables/, Markdown as the commands print it. A part that was stopped goes on when
the same command is given again; what is done is not done again. Parts are below, in the order in which they should be
taken.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit

from stages.artefacts.records import read_result
from stages.study.statistics import difference, estimate

SEEDS = (1, 2, 3)
ALL_SEEDS = "federation.seed=" + ",".join(map(str, SEEDS))
SWEEP = ("sweep", "--no-client-scores")  # what D^a is worth shows at the server
COMPARE = ("compare", "--seeds", ",".join(map(str, SEEDS)))
QUESTIONS = 600
LORA = {"r": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
BUDGET: dict[str, Any] = {
    "federation.rounds": 2,
    "client_training.epochs": None,
    "client_training.steps": 6,
    "client_training.batch_size": 8,
    "client_training.learning_rate": 1e-3,
    "distillation.epochs": None,
    "distillation.steps": 12,
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
        self.datasets = Path(data).resolve() / "datasets"
        self.llm, self.slm = str(Path(llm).resolve()), str(Path(slm).resolve())
        self.folder = Path(folder).resolve()
        (self.folder / "tables").mkdir(parents=True, exist_ok=True)

    def workspace(self, name: str, settings: Mapping[str, Any], *, scored: str = "test") -> Path:
        """A workspace of these settings, with its rows dealt. scored: validation, to choose settings on."""
        place = self.folder / name
        if not (place / "private/split.json").exists():
            self.fedcollm("init", str(place), "--template", "blank", "--clients", "4")
            self._local_data(place / "tasks/arc_easy.yaml", ("train", "validation", "test"), test=scored)
            self._local_data(place / "tasks/commonsense_qa.yaml", ("train", "validation"))
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

    def seeds(self, place: Path) -> list[Path]:
        """Where `compare --seeds` has each seed."""
        return [place, *(place / f"seeds/seed-{seed}" for seed in SEEDS[1:])]

    def beside(self, name: str, found: Mapping[str, Sequence[Path]], *, minus: str) -> None:
        """Workspaces of several commands in one table, with paired differences as compare and sweep make them.

        found: by label, a workspace for each seed.
        """
        models = {"llm": "llm", "server's SLM": "slm"}
        lines = [f"| | {' | '.join(models)} |", "| --- |" + " ---: |" * len(models)]
        for label, places in found.items():
            cells = []
            for subject in models.values():
                own, other = (np.stack([_right(one, subject) for one in each]) for each in (places, found[minus]))
                score, apart = estimate(own), difference(own, other)
                cell = f"{100 * score.mean:.1f} ± {100 * (score.deviation or 0):.1f}"
                if label != minus and apart.half_width is not None:
                    low, high = (100 * (apart.mean + sign * apart.half_width) for sign in (-1, 1))
                    cell += f"; {100 * apart.mean:+.1f} [{low:.1f}, {high:.1f}]{'*' * apart.is_supported}"
                cells.append(cell)
            lines.append(f"| {label} | {' | '.join(cells)} |")
        (self.folder / "tables" / f"{name}.md").write_text("\n".join([*lines, ""]))

    def fedcollm(self, *words: str) -> str:
        """The command's stdout; its progress goes to stderr."""
        program = [sys.executable, "-m", "fedcollm_cli"]
        return subprocess.run([*program, *words], check=True, stdout=subprocess.PIPE, text=True).stdout

    def _local_data(self, task: Path, parts: Sequence[str], **instead: str) -> None:
        files = {part: str(self.datasets / task.stem / f"{instead.get(part, part)}.jsonl") for part in parts}
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


def _right(place: Path, subject: str) -> np.ndarray:
    """Of each question, whether a model's answer was right after the last round: 0 or 1."""
    result = read_result(place / f"results/round-{BUDGET['federation.rounds']:04d}/{subject}.json")
    return np.array([int(one) for one in result["tasks"]["arc_easy"]["correct"]["acc"]])


ALONE: dict[str, Any] = {
    "federation.method": "standalone",
    "federation.clients": 1,
    "federation.rounds": 1,
    "client_training.steps": 16,
    "evaluation.limit": 200,
}
"""Learning rates are chosen on so many validation questions and one seed, by one client that trains alone."""


def rates_of_slm(study: Study) -> None:
    """The learning rate of the SLM, at clients and at the server."""
    place = study.workspace("rates-of-slm", ALONE, scored="validation")
    study.table("rates-of-slm", place, "sweep", "--set", "client_training.learning_rate=3e-4,1e-3,3e-3")


def rates_of_llm(study: Study) -> None:
    """That of the LLM, which is here in the place of the SLM."""
    place = study.workspace("rates-of-llm", ALONE | {"slm.model": study.llm}, scored="validation")
    study.table("rates-of-llm", place, "sweep", "--set", "client_training.learning_rate=3e-4,1e-3,3e-3")


def iid(study: Study) -> None:
    """Question 1: every method, IID clients."""
    study.table("iid", study.workspace("iid", {}), *COMPARE)


def dirichlet(study: Study) -> None:
    """Question 1, clients of unlike labels."""
    place = study.workspace("dirichlet", {"data.split": "dirichlet", "data.dirichlet_alpha": 0.3})
    study.table("dirichlet", place, *COMPARE, "--methods", "fedavg,fedavg-aux,fedcollm")


def pair(study: Study) -> None:
    """Question 2, with another SLM and so another FOLDER: what distillation brings to that pair."""
    study.table("pair", study.workspace("iid", {}), *COMPARE, "--methods", "fedavg-aux,fedcollm")


def other_task(study: Study) -> None:
    """Question 3: clients know a task that D^a has nothing of. Does the LLM learn it from their SLM?"""
    data = {"data.tasks": ["arc_easy", "commonsense_qa"], "data.auxiliary_sources": ["commonsense_qa"]}
    place = study.workspace("other-task", data)
    study.table("other-task", place, *COMPARE, "--methods", "fedavg-aux,fedcollm")


def who_teaches(study: Study) -> None:
    """Question 2, after `iid`: one way, a weak way back, or only where the teacher knows a row better."""
    place = study.workspace("iid", {})
    found = {
        "nobody: FedAvg + D^a": [home / "baselines/fedavg-aux" for home in study.seeds(place)],
        "each the other: FedCoLLM": study.seeds(place),
    }
    ways = {
        "the LLM the SLM alone": "lambda_llm=0.0",
        "whichever knows a row better": "select=min-ce",
        "the SLM the LLM a little": "lambda_llm=0.1",
    }
    for label, way in ways.items():
        study.table(f"who-teaches-{way}", place, *SWEEP, "--set", f"distillation.{way}", "--set", ALL_SEEDS)
        found[label] = [place / f"sweeps/{way},seed={seed}" for seed in SEEDS]
        study.beside("who-teaches", found, minus="nobody: FedAvg + D^a")
        study.beside("who-teaches-minus-both", found, minus="each the other: FedCoLLM")


def shares(study: Study) -> None:
    """Question 2: how much distillation is worth when answers of D^a are few."""
    place = study.workspace("iid", {})
    words = ["--set", "data.unlabelled_share=0.9", "--set", "distillation.lambda_llm=0.0"]
    study.table("shares", place, *SWEEP, *words, "--set", "distillation.lambda_slm=0.0,1.0", "--set", ALL_SEEDS)


IN_ORDER = (rates_of_slm, rates_of_llm, iid, who_teaches, other_task, dirichlet, pair, shares)
PARTS = {part.__name__.replace("_", "-"): part for part in IN_ORDER}


def main() -> None:
    """Take the parts that are named."""
    told = "\n".join(f"  {name}: {part.__doc__}" for name, part in PARTS.items())
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=told, formatter_class=as_written)
    for name in ("data", "llm", "slm"):
        parser.add_argument(name, metavar=name.upper(), type=folder)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("parts", metavar="PART", nargs="+", choices=PARTS)
    given = parser.parse_args()
    for name in given.parts:
        PARTS[name](Study(given.data, given.llm, given.slm, given.folder))


def folder(name: str) -> str:
    """The name of a folder that is there. Raises ArgumentTypeError for another."""
    if not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name} is no folder here")
    return name


if __name__ == "__main__":
    main()
