"""demo: whole federations on a closed world of questions and two tiny models, both made here; nothing is downloaded.

Writes FOLDER/models/{slm,llm}, built once, and FOLDER/seed-s, a workspace for each seed, by the same stages as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from stages.evaluate import evaluate
from stages.init import init
from stages.parts import quiet
from stages.parts.events import Event, Report, ignore
from stages.parts.workspace import AGREEMENT, Workspace
from stages.parts.world import World, build_world, write_world
from stages.prepare import prepare
from stages.run import run

WORLD_SEED = 11
SEEDS = (1, 2, 3)

Accuracies = dict[tuple[str, str], float]


def demo(folder: Path, *, seeds: Sequence[int] = SEEDS, report: Report = ignore) -> dict[str, Any]:
    """Run a federation for each seed and measure what each step bought. Returns the table, in % of questions.

    What is there already is used again: base models, and every step that is done.
    """
    world = build_world(WORLD_SEED)
    _build_models(folder / "models", world, report)
    folders = [folder / f"seed-{seed}" for seed in seeds]
    measured = [_federation(place, seed, world, report) for place, seed in zip(folders, seeds, strict=True)]
    return {
        "rows": [
            {"model": model, "after": step, "accuracies": [accuracies[model, step] for accuracies in measured]}
            for model, step in measured[0]
        ],
        "questions": sum(len(rows) for (_, split), rows in world.questions.items() if split == "test"),
        "seeds": list(seeds),
        "rule_accuracy": world.rule_accuracy["test"],
        "workspaces": [str(place) for place in folders],
        "models": str(folder / "models"),
    }


def _build_models(folder: Path, world: World, report: Report) -> None:
    if all((folder / role / "config.json").exists() for role in ("slm", "llm")):
        return
    from stages.parts import tiny_models
    from stages.parts.world import lexicon

    tokenizer = tiny_models.train_tokenizer(lexicon())
    plans = {"slm": (world.slm_corpus, tiny_models.SLM), "llm": (world.llm_corpus, tiny_models.LLM)}
    for role, (corpus, shape) in plans.items():
        report(Event("stage", f"build the {role.upper()} from scratch"))
        with quiet.libraries():
            tiny_models.build_model(folder / role, corpus, tokenizer, shape, seed=WORLD_SEED, report=_steps(report))


def _steps(report: Report) -> Callable[[int, int, float], None]:
    return lambda step, total, loss: report(Event("step", step=step, total=total, values={"loss": loss}))


def _federation(folder: Path, seed: int, world: World, report: Report) -> Accuracies:
    """One seed's federation: its accuracies by model and step."""
    from stages.parts.models import Models

    if not (folder / AGREEMENT).exists():
        write_world(folder / "data", world)
        init(folder, template="demo", seed=seed)
    workspace = Workspace(folder)
    models = Models(workspace)
    report(Event("round", f"federation with seed {seed}"))
    prepare(workspace, report=report)
    run(workspace, scores=False, models=models, report=report)

    score = partial(evaluate, workspace, models=models, report=report)
    last = workspace.agreement.federation.rounds
    own = [_accuracy(score(round=last, client=client)) for client in workspace.clients]
    return {
        ("SLM", "base, zero-shot"): _accuracy(score(model="slm")),
        ("SLM", f"client-train, round {last}, mean of the clients' own"): mean(own),
        ("SLM", f"aggregate, round {last}"): _accuracy(score(model="aggregate", round=last)),
        ("SLM", f"co-distill, round {last}"): _accuracy(score(model="slm", round=last)),
        ("LLM", "base, zero-shot"): _accuracy(score(model="llm")),
        ("LLM", f"co-distill, round {last}"): _accuracy(score(model="llm", round=last)),
    }


def _accuracy(result: dict[str, Any]) -> float:
    """In %, over the questions of all tasks."""
    tasks = result["tasks"].values()
    right = sum(task["metrics"]["acc"] * task["questions"] for task in tasks)
    return float(100 * right / sum(task["questions"] for task in tasks))
