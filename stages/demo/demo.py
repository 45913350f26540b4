"""demo: every method on a closed world of questions and tiny models, both made here; nothing is downloaded.

Writes FOLDER/models, built once: slm and llm for FedCoLLM, slm-1, slm-2, slm-3 and llm for FedMKT; and FOLDER/study, a
workspace with its baselines and seeds, by the same stages as always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.data.prepare import prepare
from stages.demo.world import build_world, write_world
from stages.federation.compare import compare
from stages.report.report import InWords, write_report
from stages.runtime import quiet
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.study.comparison import Comparison
from stages.workspace.commands import Command
from stages.workspace.init import init
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

WORLD_SEED = 11
SEEDS = (1,)

Shows = Literal["fedcollm", "fedmkt"]
TEMPLATES: dict[Shows, str] = {"fedcollm": "demo", "fedmkt": "demo-fedmkt"}
"""By the method that a demo shows, with its baselines."""


@dataclass(frozen=True)
class Shown:
    """What the demo found, and where: rule_accuracy, in percent, has whoever knows every rule of its world."""

    comparison: Comparison
    rule_accuracy: float
    workspace: str
    report: str
    models: str


def demo(
    folder: Path,
    *,
    method: Shows = "fedcollm",
    in_words: InWords,
    seeds: Sequence[int] = SEEDS,
    report: Report = ignore,
) -> Shown:
    """Run the method and its baselines from each seed, compare them and write the report.

    What is there already is used again: base models, and every step that is done. Raises UsageProblem if the folder
    holds the demo of another method.
    """
    study = folder / "study"
    is_new = not (study / AGREEMENT).exists()
    if not is_new:
        _check_method(Workspace(study), method)
    world = build_world(WORLD_SEED)
    is_unlike = method == "fedmkt"
    corpora = world.unlike_corpora if is_unlike else world.corpora
    build_models(folder / "models", corpora, method, report)
    if is_new:
        write_world(study / "data", world.unlike_questions if is_unlike else world.questions, corpora)
        init(study, template=TEMPLATES[method], seed=seeds[0])
    workspace = Workspace(study)
    prepare(workspace, report=report)
    compared = compare(workspace, seeds=seeds, report=report)
    return Shown(
        comparison=compared,
        rule_accuracy=world.rule_accuracy["test"],
        workspace=str(study),
        report=str(study / write_report(workspace, in_words=in_words, report=report).path),
        models=str(folder / "models"),
    )


def _check_method(workspace: Workspace, method: Shows) -> None:
    found = workspace.agreement.federation.method
    if found != method:
        message = f"this folder holds the demo of {found}, not of {method}"
        that = Command("demo", workspace.root.parent, method=found)
        mend = f"choose another folder, or go on with that one: {that}"
        raise UsageProblem(message, where=workspace.root / AGREEMENT, mend=mend)


def build_models(folder: Path, corpora: Mapping[str, Sequence[str]], method: Shows, report: Report) -> None:
    """Train the base models of a method's demo, each on its own of the corpora, unless they are there."""
    if all((folder / name / "config.json").exists() for name in corpora):
        return
    from stages.demo import tiny_models, unlike_models
    from stages.demo.world import lexicon

    if method == "fedmkt":
        tokenizers, shapes = unlike_models.tokenizers(), unlike_models.SHAPES
    else:
        tokenizers = dict.fromkeys(corpora, tiny_models.train_tokenizer(lexicon()))
        shapes = {"slm": tiny_models.SLM, "llm": tiny_models.LLM}
    for name, corpus in corpora.items():
        report(Event("stage", f"build the {name.upper()} from scratch"))
        with quiet.libraries():
            tiny_models.build_model(
                folder / name, corpus, tokenizers[name], shapes[name], seed=WORLD_SEED, report=_steps(report)
            )


def _steps(report: Report) -> Callable[[int, int, float], None]:
    return lambda step, total, loss: report(Event("step", step=step, total=total, values={"loss": loss}))
