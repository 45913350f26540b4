"""demo: every method on a closed world of questions and two tiny models, both made here; nothing is downloaded.

Writes FOLDER/models/{slm,llm}, built once, and FOLDER/study, a workspace with its baselines and seeds, by the same
stages as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.data.prepare import prepare
from stages.demo.world import World, build_world, write_world
from stages.federation.compare import compare
from stages.report.report import InWords, write_report
from stages.runtime import quiet
from stages.runtime.events import Event, Report, ignore
from stages.study.comparison import Comparison
from stages.workspace.init import init
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

WORLD_SEED = 11
SEEDS = (1,)


@dataclass(frozen=True)
class Shown:
    """What the demo found, and where: rule_accuracy, in percent, has whoever knows every rule of its world."""

    comparison: Comparison
    rule_accuracy: float
    workspace: str
    report: str
    models: str


def demo(folder: Path, *, in_words: InWords, seeds: Sequence[int] = SEEDS, report: Report = ignore) -> Shown:
    """Run every method from each seed, compare them and write the report.

    What is there already is used again: base models, and every step that is done.
    """
    world = build_world(WORLD_SEED)
    _build_models(folder / "models", world, report)
    study = folder / "study"
    if not (study / AGREEMENT).exists():
        write_world(study / "data", world, world.corpora)
        init(study, template="demo", seed=seeds[0])
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


def _build_models(folder: Path, world: World, report: Report) -> None:
    if all((folder / role / "config.json").exists() for role in ("slm", "llm")):
        return
    from stages.demo import tiny_models
    from stages.demo.world import lexicon

    tokenizer = tiny_models.train_tokenizer(lexicon())
    shapes = {"slm": tiny_models.SLM, "llm": tiny_models.LLM}
    for role, corpus in world.corpora.items():
        report(Event("stage", f"build the {role.upper()} from scratch"))
        with quiet.libraries():
            tiny_models.build_model(
                folder / role, corpus, tokenizer, shapes[role], seed=WORLD_SEED, report=_steps(report)
            )


def _steps(report: Report) -> Callable[[int, int, float], None]:
    return lambda step, total, loss: report(Event("step", step=step, total=total, values={"loss": loss}))
