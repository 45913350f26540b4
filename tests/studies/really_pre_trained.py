"""The study of docs/explanation/really-pre-trained-models.md, by the commands that a user types.

    python tests/studies/really_pre_trained.py DATA LLM SLM FOLDER PART...

DATA holds datasets/arc_easy/*.jsonl, arc_challenge and commonsense_qa. LLM: a model; SLM: made from it by `fedcollm
shear`. FOLDER gets a workspace for each question, and tables/, Markdown as the commands print it. A part that was
stopped goes on when the same command is given again; what is done is not done again. Parts are below, in the order in
which they should be taken.
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
from stages.federation.sweep import point_name
from stages.study.statistics import difference, estimate

FIVE = (1, 2, 3, 4, 5)
THREE = FIVE[:3]
SWEEP = ("sweep", "--no-client-scores")  # what D^a is worth shows at the server
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


MODELS = {"llm": "llm", "server's SLM": "slm"}


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
            self._local_data(place / "tasks/arc_challenge.yaml", ("train", "validation", "test"))
            base = {"slm.model": self.slm, "llm.model": self.llm} | {
                f"{role}.lora.{key}": value for role in ("slm", "llm") for key, value in LORA.items()
            }
            self._set(place / "fedcollm.toml", base | BUDGET | dict(settings))
            self.fedcollm("prepare", "-w", str(place))
        return place

    def compare(self, name: str, workspace: Path, seeds: Sequence[int], *words: str) -> None:
        """The table of `compare --seeds`."""
        self.table(name, workspace, "compare", "--seeds", _listed(seeds), *words)

    def sweep(self, name: str, workspace: Path, seeds: Sequence[int], settings: Mapping[str, str]) -> list[Path]:
        """The table of a sweep over seeds alone, and where it has each of them."""
        chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        self.table(name, workspace, *SWEEP, *chosen, "--set", f"federation.seed={_listed(seeds)}")
        points = ({**settings, "federation.seed": seed} for seed in seeds)
        return [workspace / "sweeps" / point_name(point) for point in points]

    def table(self, name: str, workspace: Path, *words: str) -> None:
        """What compare or sweep prints, kept as a file."""
        command = [*words, "--last-round", "--markdown", "-w", str(workspace)]
        target = self.folder / "tables" / f"{name}.md"
        target.write_text(self.fedcollm(*command))
        sys.stdout.write(f"{target}\n")

    def seeds(self, place: Path, seeds: Sequence[int]) -> list[Path]:
        """Where `compare --seeds` has each seed."""
        return [place, *(place / f"seeds/seed-{seed}" for seed in seeds[1:])]

    def beside(
        self, name: str, found: Mapping[str, Sequence[Path]], *, minus: str, models: Mapping[str, str] = MODELS
    ) -> None:
        """Workspaces of several commands in one table, with paired differences as compare and sweep make them.

        found: by label, a workspace for each seed. models: by label, how scores call them.
        """
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


def _listed(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds))


def _right(place: Path, subject: str) -> np.ndarray:
    """Of each question, whether a model's answer was right after the last round: 0 or 1."""
    last = max((place / "results").glob("round-*"))
    result = read_result(last / f"{subject}.json")
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
    study.compare("iid", study.workspace("iid", {}), FIVE)


def dirichlet(study: Study) -> None:
    """Question 1, clients of unlike labels."""
    place = study.workspace("dirichlet", {"data.split": "dirichlet", "data.dirichlet_alpha": 0.3})
    study.compare("dirichlet", place, THREE, "--methods", "fedavg,fedavg-aux,fedcollm")


def other_questions(study: Study) -> None:
    """Question 1, CommonsenseQA in the place of ARC-Easy."""
    tasks = {f"{table}.tasks": ["commonsense_qa"] for table in ("data", "evaluation")}
    place = study.workspace("commonsense-qa", tasks)
    study.compare("commonsense-qa", place, THREE, "--methods", "fedavg-aux,fedcollm")


def pair(study: Study) -> None:
    """Question 2, with another SLM and so another FOLDER: what distillation brings to that pair."""
    study.compare("pair", study.workspace("iid", {}), THREE, "--methods", "fedavg-aux,fedcollm")


def other_task(study: Study) -> None:
    """Question 3: clients know a task that D^a has nothing of. Does the LLM learn it from their SLM?"""
    data = {"data.tasks": ["arc_easy", "commonsense_qa"], "data.auxiliary_sources": ["commonsense_qa"]}
    study.compare("other-task", study.workspace("other-task", data), THREE, "--methods", "fedavg-aux,fedcollm")


def harder_questions(study: Study) -> None:
    """Question 3, milder: D^a is ARC-Challenge, of the clients' kind and harder."""
    data = {"data.tasks": ["arc_easy", "arc_challenge"], "data.auxiliary_sources": ["arc_challenge"]}
    place = study.workspace("harder-questions", data)
    study.compare("harder-questions", place, THREE, "--methods", "fedavg-aux,fedcollm")


def who_teaches(study: Study) -> None:
    """Question 2, after `iid`: one way, a weak way back, or only where the teacher knows a row better."""
    ways = {
        "the LLM the SLM alone": "lambda_llm=0.0",
        "whichever knows a row better": "select=min-ce",
        "the SLM the LLM a little": "lambda_llm=0.1",
    }
    _ways(study, "who-teaches", ways, FIVE)


def how(study: Study) -> None:
    """Question 2, after `iid`: the other settings of distillation, both teaching each other."""
    ways = {
        "where the teacher is sure": "min_confidence=0.5",
        "temperature 4": "temperature=4.0",
        "reverse KL": "divergence=reverse",
        "the SLM first": "order=alternating",
    }
    _ways(study, "how", ways, THREE)


def _ways(study: Study, name: str, ways: Mapping[str, str], seeds: Sequence[int]) -> None:
    """Settings of distillation, each beside none and beside the default."""
    place = study.workspace("iid", {})
    found = {
        "nobody: FedAvg + D^a": [home / "baselines/fedavg-aux" for home in study.seeds(place, seeds)],
        "each the other: FedCoLLM": study.seeds(place, seeds),
    }
    for label, way in ways.items():
        key, value = way.split("=")
        found[label] = study.sweep(f"{name}-{way}", place, seeds, {f"distillation.{key}": value})
        study.beside(name, found, minus="nobody: FedAvg + D^a")
        study.beside(f"{name}-minus-both", found, minus="each the other: FedCoLLM")


def shares(study: Study) -> None:
    """Question 2: how much distillation is worth when answers of D^a are few."""
    _with_and_without(study, "shares", {"data.unlabelled_share": "0.9"})


def more_shares(study: Study) -> None:
    """Question 2: and when they are not as few, or hardly any."""
    for share in ("0.5", "0.98"):
        _with_and_without(study, f"shares-{share}", {"data.unlabelled_share": share})


def auxiliary_rows(study: Study) -> None:
    """Question 2: and when its rows are few."""
    _with_and_without(study, "auxiliary-rows", {"data.auxiliary_share": "0.03"})


def _with_and_without(study: Study, name: str, settings: Mapping[str, str]) -> None:
    """Distillation from the LLM to the SLM, beside none."""
    place = study.workspace("iid", {})
    one_way = {**settings, "distillation.lambda_llm": "0.0"}
    found = {
        word: study.sweep(f"{name}-{word}", place, THREE, {**one_way, "distillation.lambda_slm": weight})
        for word, weight in {"alone": "0.0", "taught": "1.0"}.items()
    }
    study.beside(name, found, minus="alone")


def rounds(study: Study) -> None:
    """Question 4, after `who-teaches`: as many steps in one round, two or four."""
    ways = {
        "1": {"federation.rounds": "1", "client_training.steps": "12", "distillation.steps": "24"},
        "4": {"federation.rounds": "4", "client_training.steps": "3", "distillation.steps": "6"},
    }
    _beside_one_way(study, "rounds", ways)


PROMISES = {
    "secure": {"aggregation.mode": "secure"},
    "epsilon 8": {"privacy.epsilon": "8.0"},
    "epsilon 3": {"privacy.epsilon": "3.0"},
}


def promises(study: Study) -> None:
    """Question 4, after `who-teaches`: what secure aggregation and differential privacy cost."""
    _beside_one_way(study, "promises", PROMISES)


def averages(study: Study) -> None:
    """Question 4: and what they cost the clients' average, which the server trains no further."""
    _of_averages(study, "averages", {}, PROMISES)


def combining(study: Study) -> None:
    """Question 5: ways to combine what clients of unlike labels have learned."""
    ways = {way: {"aggregation.combine": way} for way in ("product", "residual", "freeze-a", "alternate")}
    _of_averages(study, "combining", {"data.split": "dirichlet", "data.dirichlet_alpha": 0.3}, ways)


def _of_averages(study: Study, name: str, data: Mapping[str, Any], ways: Mapping[str, Mapping[str, str]]) -> None:
    """Settings of FedAvg's average."""
    place = study.workspace(f"fedavg-{name}", {"federation.method": "fedavg", **data})
    found = {"default": study.sweep(f"{name}-default", place, THREE, {"aggregation.weighting": "uniform"})}
    for label, way in ways.items():
        found[label] = study.sweep(f"{name}-{label}", place, THREE, way)
        study.beside(name, found, minus="default", models={"the average": "aggregate"})


def _beside_one_way(study: Study, name: str, ways: Mapping[str, Mapping[str, str]]) -> None:
    """Settings of the federation, where the LLM teaches the SLM alone."""
    place = study.workspace("iid", {})
    one_way = {"distillation.lambda_llm": "0.0"}
    found = {"default": study.sweep(f"{name}-default", place, THREE, one_way)}
    for label, way in ways.items():
        found[label] = study.sweep(f"{name}-{label}", place, THREE, {**one_way, **way})
        study.beside(name, found, minus="default")


IN_ORDER = (
    rates_of_slm,
    rates_of_llm,
    iid,
    who_teaches,
    other_task,
    dirichlet,
    other_questions,
    pair,
    shares,
    more_shares,
    harder_questions,
    auxiliary_rows,
    how,
    rounds,
    promises,
    averages,
    combining,
)
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
