"""The study of docs/explanation/attacks-on-prompts.md: what training under attack does in the demo's world.

    python tests/studies/attacks.py FOLDER

FOLDER gets the demo's base models and a workspace for each setting and seed. What is done is not done again. Prints a
table in Markdown: accuracy with and without the attack, in %, of clients' own SLMs and of the server's SLM, after the
last round; and paired differences from plain training, with 95 % intervals.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from stages.artefacts.records import ROBUST, Result
from stages.data.prepare import prepare
from stages.demo.demo import WORLD_SEED, build_models
from stages.demo.world import build_world, write_world
from stages.evaluate import evaluate
from stages.federation.run import run
from stages.models.loading import Models
from stages.runtime.events import ignore
from stages.study.statistics import difference, estimate
from stages.workspace.attacks import Attack
from stages.workspace.init import init
from stages.workspace.paths import Workspace

SEEDS = (1, 2, 3)
SCORED = 0.03
SETTINGS = {
    "plain": "",
    "radius 0.03": "radius = 0.03",
    "radius 0.1": "radius = 0.1",
    "radius 0.03, steps 3": "radius = 0.03\nsteps = 3",
}
"""By the name in the table, the lines of [client_training.adversarial]."""


def scored(folder: Path, name: str, seed: int) -> dict[str, list[Result]]:
    """The results of clients and server, once a federation of this setting and seed has run."""
    study = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    if not (study / "private/split.json").exists():
        world = build_world(WORLD_SEED)
        write_world(study / "data", world.questions, world.corpora)
        init(study, template="demo", seed=seed)
        path = study / "fedcollm.toml"
        lines = (
            f"[client_training.adversarial]\n{SETTINGS[name]}\n\n[distillation]" if SETTINGS[name] else "[distillation]"
        )
        path.write_text(path.read_text().replace("[distillation]", lines))
        prepare(Workspace(study))
    workspace = Workspace(study)
    models, last = Models(workspace), workspace.agreement.federation.rounds
    run(workspace, scores=False, models=models)
    score = partial(evaluate, workspace, round=last, attack=Attack(radius=SCORED), models=models)
    return {"clients' own SLMs": [score(client=k) for k in workspace.clients], "the server's SLM": [score()]}


def right(results: list[Result], metric: str) -> np.ndarray:
    """The share of right answers to each question of all tasks, the mean over these results: [questions]."""
    each = ["".join(one["correct"][metric] for one in result["tasks"].values()) for result in results]
    return np.mean([np.frombuffer(signs.encode(), dtype=np.uint8) - ord("0") for signs in each], axis=0)


def table(folder: Path) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"| trained under | scored | no attack | attack | minus plain: no attack | minus plain: attack {SCORED:g} |"
    yield "|---|---|---:|---:|---:|---:|"
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for name in SETTINGS:
        by_seed = [scored(folder, name, seed) for seed in SEEDS]
        for subject in by_seed[0]:
            cells, apart = [], []
            for metric in ("acc", ROBUST):
                own = found[name, subject, metric] = np.stack([right(one[subject], metric) for one in by_seed])
                score, beyond = estimate(own), difference(own, found["plain", subject, metric])
                cells.append(f"{100 * score.mean:.1f} ± {100 * (score.deviation or 0):.1f}")
                low, high = (100 * (beyond.mean + sign * (beyond.half_width or 0)) for sign in (-1, 1))
                star = "*" * beyond.is_supported
                apart.append(f"{100 * beyond.mean:+.1f} [{low:.1f}, {high:.1f}]{star}" if name != "plain" else "")
            yield f"| {' | '.join([name, subject, *cells, *apart])} |"


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    build_models(target / "models", build_world(WORLD_SEED).corpora, "fedcollm", ignore)
    for line in table(target):
        print(line, flush=True)
