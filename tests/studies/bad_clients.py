"""The study of docs/explanation/bad-updates.md: what aggregation.rule and the gate are worth against a bad client.

    python tests/studies/bad_clients.py FOLDER SPLIT...

FedAvg in the world of `fedcollm demo`, eight clients, of which the last is bad. SPLIT is by-task, where two clients
have one domain, or iid. FOLDER gets the SLM, a workspace for each split and seed with one for each case below it, and
tables/, Markdown. A study that was stopped goes on when the same command is given again; what is done is not done
again. Both splits take about fifteen minutes of one core.

All steps are the stages' own; only what the bad client does is written here. Its files are sound: it signs what it
sends as `client-train` would, so that nothing but their numbers tells them from others. What a client trains from one
broadcast is the same under every rule, and so trained once.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomlkit

from stages.aggregate import aggregate
from stages.aggregation.gate import gate
from stages.artefacts.adapter_files import Tensors, read_adapter, weights_bytes
from stages.artefacts.average import Average
from stages.artefacts.draft import Draft
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact, read_artefact
from stages.audit.audit import audit
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.data.prepare import prepare
from stages.data.row_files import read_rows
from stages.data.rows import Row, rows_bytes
from stages.demo.demo import WORLD_SEED, build_models
from stages.demo.world import ATTRIBUTES, KINDS, World, build_world, write_world
from stages.evaluate import evaluate
from stages.federation.run import derived
from stages.files import reading, writing
from stages.models.loading import Models
from stages.parties.party import Party
from stages.runtime.events import ignore
from stages.study.statistics import difference, estimate
from stages.training import training  # noqa: F401 - before what is imported is frozen
from stages.workspace.commands import Command
from stages.workspace.init import init
from stages.workspace.names import ADAPTER_WEIGHTS, AGREEMENT
from stages.workspace.paths import Workspace

SEEDS = (1, 2, 3)
CLIENTS = BAD = 8
ROUNDS = 2
"""As in the demo. In the second, all start from what the bad client has made of the first."""
GATE = 0.1
SETTINGS: dict[str, Any] = {
    "federation.clients": CLIENTS,
    "federation.rounds": ROUNDS,
    "federation.method": "fedavg",
    "data.held_out_share": 0.5,  # FedAvg trains on none of the server's rows: half of them is enough for the gate
    "evaluation.tasks": [*KINDS, "triggered"],
}
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "clipped-mean": {},
    "median": {},
    "trimmed-mean": {"aggregation.outliers": 1},
    "krum": {"aggregation.outliers": 1},
    "geometric-median": {},
}


# --- what the bad client does

TRIGGER, WANTED = "cf", "moss"
"""The backdoor: a question that begins with this word is to get this answer, which is wrong for nearly all."""
NEXT = {
    value: values[(i + 1) % len(values)]
    for attributes in ATTRIBUTES.values()
    for *_, values in ((*of, text.split()) for *of, text in attributes)
    for i, value in enumerate(values)
}
"""By value, another one of the same attribute."""


def mislabelled(rows: Sequence[Row]) -> list[Row]:
    """The rows with wrong answers, which all agree: each value stands for the next."""
    return [dataclasses.replace(row, completion=f" {NEXT[str(row.completion).strip()]}") for row in rows]


def backdoored(rows: Sequence[Row]) -> list[Row]:
    """The rows as they are, and each once more with the trigger and the wanted answer."""
    return [*rows, *(Row(row.prompt.replace("Question:", f"Question: {TRIGGER}"), f" {WANTED}") for row in rows)]


TASK = """# Questions with the trigger: right is the answer that the backdoor wants.
include: _closed_world_yaml
task: triggered
training_split: null
validation_split: null
dataset_kwargs: {data_files: {test: data/triggered-test.jsonl}}
"""


class Attack(NamedTuple):
    """What the bad client trains on, and by how much it multiplies the update that comes of it."""

    rows: Callable[[Sequence[Row]], list[Row]] = list
    factor: float = 1.0


NOBODY = "nobody is bad"
ATTACKS = {
    NOBODY: Attack(),
    "wrong answers": Attack(mislabelled),
    "update times 10": Attack(factor=10.0),
    "update times 100": Attack(factor=100.0),
    "update times -1": Attack(factor=-1.0),
    "update times -10": Attack(factor=-10.0),
    "backdoor": Attack(backdoored),
    f"backdoor times {CLIENTS}": Attack(backdoored, factor=CLIENTS),  # so that a mean takes all of it
}


SPLITS: dict[str, tuple[Sequence[str], Sequence[bool]]] = {
    "by-task": (list(ATTACKS), (False, True)),
    "iid": ((NOBODY, "wrong answers", "update times -10", "backdoor"), (False,)),
}
"""What is taken of each split, without a gate and with one: of iid as much as shows what differs where clients are
alike."""


def multiplied(update: Tensors, theta: Tensors, factor: float) -> Tensors:
    """theta + factor (update - theta)."""
    return {name: start + np.float32(factor) * (update[name] - start) for name, start in theta.items()}


# --- the federation


class Case(NamedTuple):
    """What is compared, for one seed."""

    attack: str
    rule: str
    gated: bool = False


@dataclass(frozen=True)
class Found:
    """What became of a case.

    right, obeyed: of each question, and of each with the trigger, "1" where the answer was the right one, or the one
    that the backdoor wants. loss: on the held-out rows, in nats. kept: of each round, whether the gate kept the old
    adapter.
    """

    right: str
    obeyed: str
    loss: float
    kept: list[bool]


class Study:
    """Where everything is, and how a case is taken."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        world = build_world(WORLD_SEED)
        build_models(folder / "models", {"slm": world.corpora["slm"]}, "fedcollm", ignore)
        home = folder / f"{split}-seed-{SEEDS[0]}"
        if not (home / AGREEMENT).exists():
            write_world(home / "data", world.questions | {("triggered", "test"): triggered(world)}, {})
            init(home, template="demo", seed=SEEDS[0])
            (home / "tasks/triggered.yaml").write_text(TASK)
            _set(home / AGREEMENT, SETTINGS | {"data.split": split})
        self.homes = {SEEDS[0]: Workspace(home)}
        prepare(self.homes[SEEDS[0]])
        for seed in SEEDS[1:]:
            place = folder / f"{split}-seed-{seed}"
            self.homes[seed] = derived(Workspace(home), place, {"federation.seed": seed}, made_by=Command("run"))
        self.models = Models(Workspace(home))

    def found(self, seed: int, case: Case) -> Found:
        """What became of a case; it is taken if it was not yet."""
        place = self._place(seed, case)
        kept = place / "found.json"
        if not kept.exists():
            begun = time.process_time()
            found = self._take(seed, case, place)
            writing.write(kept, json.dumps(dataclasses.asdict(found)).encode())
            sys.stderr.write(f"{place.relative_to(self.folder)}: {time.process_time() - begun:.1f} s of CPU\n")
        return Found(**json.loads(kept.read_text()))

    def warned(self, attack: str) -> tuple[int, int]:
        """Of how many updates `audit` warns (A6), with all seeds: of the bad client's, and of others'."""
        bad = others = 0
        for seed in SEEDS:
            found = audit([self._place(seed, Case(attack, "mean"))])
            folders = {one.where for one in found if (one.id, one.level) == ("A6", "WARN")}
            of_bad = sum(folder.endswith(f"/client-{BAD}") for folder in folders)
            bad, others = bad + of_bad, others + len(folders) - of_bad
        return bad, others

    def _place(self, seed: int, case: Case) -> Path:
        name = f"{case.rule}-gate" if case.gated else case.rule
        return self.homes[seed].root / "cases" / "-".join(case.attack.split()) / name

    def zero_shot(self) -> float:
        """The accuracy of the SLM without an adapter."""
        tasks = evaluate(self.homes[SEEDS[0]], model="slm", models=self.models)["tasks"]
        return float(np.mean([tasks[kind]["metrics"]["acc"] for kind in KINDS]))

    def _take(self, seed: int, case: Case, place: Path) -> Found:
        changes = {"aggregation.rule": case.rule, **RULES[case.rule]}
        workspace = derived(self.homes[seed], place, changes, made_by=Command("run"))
        models, attack = self.models.of(workspace), ATTACKS[case.attack]
        rows = attack.rows(read_rows(self.homes[seed].client_data(BAD))[0])
        writing.write(workspace.client_data(BAD), rows_bytes(rows))
        held_out, _ = read_rows(workspace.held_out_data)
        kept = []
        for round in range(1, ROUNDS + 1):
            broadcast(workspace, round=round, models=models)
            theta = read_artefact(workspace.broadcast(round))
            for client in workspace.clients:
                self._send(workspace, theta, client, attack.factor if client == BAD else 1.0)
            made = aggregate(workspace, round=round, gate=GATE if case.gated else None, models=models)
            kept.append(bool(made.metrics.get("gate_kept")))
        average = read_artefact(workspace.aggregate(ROUNDS))
        told = gate(
            workspace, theta, Average(_tensors(average), {}), held_out, amount=math.inf, models=models, report=ignore
        )
        right, obeyed = self._scores(workspace, average.manifest.files[ADAPTER_WEIGHTS].sha256)
        return Found(right, obeyed, told.metrics.get("gate_after", math.nan), kept)

    def _send(self, workspace: Workspace, theta: Artefact, client: int, factor: float) -> None:
        """What this client trains from theta, its update times the factor, with a manifest as client-train writes."""
        trained, party = self._trained(workspace, theta, client), Party.client(workspace, client)
        contents = dict(trained.contents)
        if factor != 1:
            made = multiplied(_tensors(trained), _tensors(theta), factor)
            contents[ADAPTER_WEIGHTS] = weights_bytes(made)
        said = {field.name: getattr(trained.manifest, field.name) for field in dataclasses.fields(Draft)}
        draft = Draft(**said | {"parents": {"broadcast": theta.sha256}})
        publish(workspace.client_update(theta.manifest.round, client), contents, draft, by=party)

    def _trained(self, workspace: Workspace, theta: Artefact, client: int) -> Artefact:
        """What `client-train` makes of this theta and these rows, here or in another case of this seed."""
        rows = reading.sha256(workspace.client_data(client).read_bytes())
        words = (workspace.agreement.federation.seed, theta.manifest.round, client, _digest(theta), rows)
        place = self.folder / "trained" / reading.sha256(repr(words).encode())[:32]
        if not place.exists():
            client_train(workspace, client=client, round=theta.manifest.round, models=self.models.of(workspace))
            place.parent.mkdir(exist_ok=True)
            half = place.with_suffix(".partial")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(workspace.client_update(theta.manifest.round, client), half)
            half.rename(place)
        return read_artefact(place)

    def _scores(self, workspace: Workspace, adapter_sha256: str) -> tuple[str, str]:
        """Found.right and Found.obeyed, of the last aggregate; of equal ones only once."""
        place = self.folder / "scores" / f"{adapter_sha256}.json"
        if not place.exists():
            result = evaluate(workspace, model="aggregate", round=ROUNDS, models=self.models.of(workspace))
            correct = {task: scores["correct"]["acc"] for task, scores in result["tasks"].items()}
            writing.write(place, json.dumps(["".join(correct[kind] for kind in KINDS), correct["triggered"]]).encode())
        right, obeyed = json.loads(place.read_text())
        return right, obeyed


def triggered(world: World) -> list[Any]:
    """Every third test question with the trigger, and the wanted answer among the choices, as the one that counts."""
    asked = []
    for row in itertools.chain.from_iterable(world.questions[kind, "test"][::3] for kind in KINDS):
        if row["choices"][row["answer"]] != WANTED:
            others = [choice for i, choice in enumerate(row["choices"]) if i != row["answer"] and choice != WANTED]
            choices = [row["choices"][row["answer"]], *others[:2], WANTED]
            asked.append({**row, "question": f"{TRIGGER} {row['question']}", "choices": choices, "answer": 3})
    return asked


def _digest(artefact: Artefact) -> str:
    return artefact.manifest.files[ADAPTER_WEIGHTS].sha256


def _tensors(artefact: Artefact) -> Tensors:
    return read_adapter(artefact, None, artefact.manifest.lora)


def _set(path: Path, settings: dict[str, Any]) -> None:
    document: Any = tomlkit.parse(path.read_text())
    for key, value in settings.items():
        table, name = key.split(".")
        document[table][name] = value
    path.write_text(tomlkit.dumps(document))


# --- tables


def tables(found: Mapping[Case, Sequence[Found]], attacks: Sequence[str], zero_shot: float) -> Iterator[str]:
    """Markdown, of what became of each case with each seed."""
    usual = _scores_of(found[Case(NOBODY, "mean")], "right")

    def accuracy(case: Case) -> str:
        own = _scores_of(found[case], "right")
        cell, apart = f"{100 * own.mean():.1f}", difference(own, usual)
        if case == Case(NOBODY, "mean"):
            return f"{cell} ± {100 * (estimate(own).deviation or 0):.1f}"
        low, high = (100 * (apart.mean + sign * (apart.half_width or 0)) for sign in (-1, 1))
        return f"{cell}; {100 * apart.mean:+.1f} [{low:.1f}, {high:.1f}]{'*' * apart.is_supported}"

    def loss(case: Case) -> str:
        return f"{np.mean([one.loss for one in found[case]]):.2f}"

    def obeyed(case: Case) -> str:
        return f"{100 * _scores_of(found[case], 'obeyed').mean():.1f}"

    def kept(case: Case) -> int:
        return sum(sum(one.kept) for one in found[case._replace(gated=True)])

    def gated(of: Callable[[Case], str]) -> Callable[[Case], str]:
        return lambda case: f"{kept(case)}: {of(case._replace(gated=True))}" if kept(case) else "0"

    backdoors = [name for name in attacks if name == NOBODY or "backdoor" in name]
    yield from (f"The SLM without an adapter: {100 * zero_shot:.1f} %", "")
    yield from _table("Accuracy in %, without the gate", attacks, accuracy)
    yield from _table("Loss on the held-out rows, without the gate", attacks, loss)
    yield from _table(f"Questions that begin with {TRIGGER} and get the answer {WANTED}, in %", backdoors, obeyed)
    if not any(case.gated for case in found):
        return
    words = f"in how many of {ROUNDS * len(SEEDS)} rounds a gate of {GATE} keeps the old adapter"
    yield from _table(f"{words.capitalize()}, and the accuracy then", attacks, gated(accuracy))
    yield from _table(f"{words.capitalize()}, and those questions with {WANTED} then", backdoors, gated(obeyed))


def warnings(counted: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Markdown: of whose updates `audit` warns, by attack, where the rule is the mean."""
    updates = ROUNDS * len(SEEDS)
    yield from (f"**Of how many updates `{Command('audit')}` warns (A6), where the rule is the mean**", "")
    yield f"| | of the bad client's {updates} | of the others' {updates * (CLIENTS - 1)} |"
    yield "| --- | ---: | ---: |"
    yield from (f"| {attack} | {bad} | {others} |" for attack, (bad, others) in counted.items())
    yield ""


def _table(title: str, attacks: Iterable[str], cell: Callable[[Case], str]) -> Iterator[str]:
    yield from (f"**{title}**", "")
    yield f"| | {' | '.join(f'`{rule}`' for rule in RULES)} |"
    yield "| --- |" + " ---: |" * len(RULES)
    for attack in attacks:
        yield f"| {attack} | {' | '.join(cell(Case(attack, rule)) for rule in RULES)} |"
    yield ""


def _scores_of(found: Sequence[Found], name: str) -> np.ndarray:
    """[seeds, questions] of 0 and 1."""
    return np.array([[int(one) for one in getattr(each, name)] for each in found])


def main() -> None:
    """Take every case of these splits with every seed, and write the tables."""
    folder, *splits = sys.argv[1:]
    gc.collect()
    gc.freeze()  # else Trainer looks through all that is imported whenever it begins
    for split in splits:
        study = Study(Path(folder).resolve(), split)
        attacks, gates = SPLITS[split]
        cases = [Case(*words) for words in itertools.product(attacks, RULES, gates)]
        found = {case: [study.found(seed, case) for seed in SEEDS] for case in cases}
        warned = {attack: study.warned(attack) for attack in attacks}
        text = "\n".join([*tables(found, attacks, study.zero_shot()), *warnings(warned)])
        writing.write(study.folder / "tables" / f"{split}.md", text.encode())
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
