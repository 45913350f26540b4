"""Co-distillation in two phases against one: losses, accuracy and bytes, on ARC-Easy rows and in the demo's world.

ARC-Easy: two really trained models, which are at chance on its questions, so that losses tell and accuracy does not.
The demo's world: accuracy tells. Every federation is run whole, from several seeds, by the stages themselves.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from builders import SHARED_DATA, edit, write_rows
from stages.aggregate import aggregate
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.data.prepare import prepare
from stages.evaluate import evaluate
from stages.models.loading import Models
from stages.runtime.quiet import libraries
from stages.workspace.init import init
from stages.workspace.names import CAPTURE
from stages.workspace.paths import Workspace
from tests.benchmarks import gpt2_on_arc as arc

WHOLE = 1 << 20
WAYS: dict[str, int | None] = {"one phase": None, "two, k = 8": 8, "two, k = 64": 64, "two, k = all": WHOLE}
LOSSES = ("slm_ft", "slm_kd", "llm_ft", "llm_kd")


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal; so many seeds."""
    if not (SHARED_DATA / "models").is_dir():
        return [("skipped: the real data is not beside the checkout", "-", "-")]
    seeds = range(1, repeats + 1)
    table = []
    with tempfile.TemporaryDirectory() as folder, libraries():
        for name, make in (("ARC-Easy", on_arc_easy), ("demo's world", in_the_demos_world)):
            for way, top_k in WAYS.items():
                place = Path(folder) / name
                found = [whole(make(place, seed), place / way / f"seed-{seed}", top_k) for seed in seeds]
                table += [(f"{name}, {way}: {what}", shown([one[what] for one in found]), "") for what in found[0]]
    return table


def shown(values: list[float]) -> str:
    return f"{mean(values):.5g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 and len(set(values)) > 1 else "")


def whole(prepared: Workspace, folder: Path, top_k: int | None) -> dict[str, float]:
    """One federation in a copy of a workspace that has its data. Returns what its last round ended with."""
    workspace = Workspace(Path(shutil.copytree(prepared.root, folder, symlinks=True)))
    models, last = Models(workspace), workspace.agreement.federation.rounds
    for round in range(1, last + 1):
        broadcast(workspace, round=round, models=models)
        for client in workspace.clients:
            client_train(workspace, round=round, client=client, models=models)
        aggregate(workspace, round=round)
        distil = partial(co_distill, workspace, round=round, models=models)
        if top_k is not None:
            for model in ("llm", "slm"):
                distil(phase="capture", model=model, top_k=top_k)  # type: ignore[arg-type]
        made = distil(phase=None if top_k is None else "train")
    found = {name: made.metrics[f"{name}_after"] for name in LOSSES}
    for subject in ("slm", "llm") if workspace.agreement.evaluation.tasks else ():
        found[f"accuracy of the {subject.upper()}, %"] = accuracy(evaluate(workspace, model=subject, round=last))  # type: ignore[arg-type]
    if top_k is not None:
        captured = workspace.captured(last, "llm") / CAPTURE
        found["bytes of the LLM's capture"] = captured.stat().st_size
        found["of so many auxiliary rows"] = sum(1 for _ in workspace.auxiliary_data.open())
    return found


def accuracy(scores: dict[str, Any]) -> float:
    """In % of all questions of all tasks."""
    tasks = scores["tasks"].values()
    right = sum(task["metrics"]["acc"] * task["questions"] for task in tasks)
    return float(100 * right / sum(task["questions"] for task in tasks))


def on_arc_easy(top: Path, seed: int) -> Workspace:
    """ARC-Easy's training questions divided among four clients and a server."""
    folder = top / f"seed-{seed}"
    if folder.exists():
        return Workspace(folder)
    init(folder, template="blank", clients=4, rounds=2, seed=seed)
    toml = folder / "fedcollm.toml"
    for model, named in (("stories0.8M-sheared", '"gpt2"  '), ("stories3M", '"gpt2-large"')):
        edit(toml, f"model = {named}", f'model = "{SHARED_DATA / "models" / model}" ')
    text = toml.read_text().replace("3e-4", "1e-3").replace("epochs = 1.0", "epochs = 2.0")
    toml.write_text(text.replace('tasks = ["arc_easy"]', "tasks = []"))
    rows = [{"prompt": row.prompt, "completion": str(row.completion)} for row in arc.rows()]
    for party in range(5):
        place = f"client-{party}/train.jsonl" if party else "server/auxiliary.jsonl"
        write_rows(folder / "private" / place, rows[party::5])
    return Workspace(folder)


def in_the_demos_world(top: Path, seed: int) -> Workspace:
    """The demo's study from a seed, its models built once."""
    from stages.demo.demo import WORLD_SEED, build_models
    from stages.demo.world import build_world, write_world

    folder = top / f"seed-{seed}"
    if folder.exists():
        return Workspace(folder)
    world = build_world(WORLD_SEED)
    build_models(top / "models", world.corpora, "fedcollm", lambda event: None)
    write_world(folder / "data", world.questions, world.corpora)
    init(folder, template="demo", seed=seed)
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text().replace("../models", str(top / "models")))
    workspace = Workspace(folder)
    prepare(workspace)
    return workspace
