"""What a workspace has to show, as plain rows, one function for each chart: read from results, manifests and logs.

A row is a dict of numbers and short words; no path, no training row. What is not there gives no rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from math import ceil, isfinite
from pathlib import Path
from typing import Literal

import numpy as np

from stages.artefacts.reading import Manifests, read_manifest
from stages.data.split_file import read_split
from stages.exchange.transfers import SERVER, transfers
from stages.files.reading import read_own
from stages.report.charts import Row
from stages.runtime.errors import Damaged, Problem
from stages.study.results import Study, begun, open_study
from stages.study.scores import answers
from stages.study.statistics import estimate
from stages.study.table_rows import METHODS, OWN, base_of
from stages.workspace.methods import OF_FEDAVG, Compared
from stages.workspace.paths import Workspace

MOST_POINTS = 150
"""A line of losses has no more points than this: a page on a phone shows no more."""
MOST_ROWS = 4000
"""All clients' lines of losses together."""

AVERAGES: dict[Compared, str] = dict.fromkeys(("fedavg", *OF_FEDAVG), "aggregate")
SUBJECTS: dict[str, dict[Compared, str]] = {
    # Which model of each method is scored as what; "clients" stands for the mean of client-1, client-2, ...
    "llm": {"centralized": "client-1", "fedavg-aux": "llm", "fedcollm": "llm", "fedmkt": "llm"},
    "slm": AVERAGES | {"fedavg-aux": "slm", "fedcollm": "slm"},
    "aggregate": AVERAGES | {"fedmkt": "aggregate"},
    "clients": dict.fromkeys([method for method in METHODS if method != "centralized"], "clients"),
}


def accuracies(workspace: Workspace, model: str, metric: str) -> list[Row]:
    """In %, by method and round, mean over the seeds that are there; round 0 is the base alone.

    model: llm, slm, clients, or client-2. error_points: the standard deviation over seeds, or, of one seed, the
    binomial standard error of the questions; error_of says which.
    """
    studies = list(_studies(workspace))
    base = answers(Study(workspace, {}), workspace, None, base_of(workspace, model), metric)
    rows = [] if base is None else [_accuracy("zero-shot", 0, [base])]
    for method, subject in SUBJECTS.get(model, {one: model for one in METHODS if one in OWN}).items():
        of_method = [study for study in studies if method in study.methods]
        for round in range(1, workspace.agreement.federation.rounds + 1):
            found = [scored_by_method(study, method, round, subject, metric) for study in of_method]
            if scored := [one for one in found if one is not None]:
                rows.append(_accuracy(method, round, scored))
    return rows


def _studies(workspace: Workspace) -> Iterator[Study]:
    """One study for each seed and method of which there is anything sound."""
    seeds, methods = begun(workspace)
    for seed in seeds:
        for method in methods:
            try:
                yield open_study(workspace, [seed], [method])
            except Problem:  # compare's tables say what is missing
                continue


def scored_by_method(study: Study, method: Compared, round: int, subject: str, metric: str) -> np.ndarray | None:
    """Of one model, or of all clients, as SUBJECTS names it: the share of right answers to each question, if known."""
    workspace = study.runs[study.seeds[0]][method]
    names = [f"client-{k}" for k in workspace.clients] if subject == "clients" else [subject]
    found = [answers(study, workspace, round, name, metric) for name in names]
    scored = [one for one in found if one is not None]
    return np.mean(scored, axis=0) if len(scored) == len(names) else None


def _accuracy(method: str, round: int, scored: list[np.ndarray]) -> Row:
    found = estimate(np.stack(scored))
    error = found.binomial if found.deviation is None else found.deviation
    return {
        "method": method,
        "round": round,
        "accuracy_percent": 100 * found.mean,
        "error_points": 100 * error,
        "error_of": "questions" if found.deviation is None else "seeds",
        "seeds": len(scored),
        "questions": len(scored[0]),
    }


def client_losses(workspace: Workspace) -> list[Row]:
    """L_FT of every client's local training, by step counted over all rounds, thinned.

    None where training is private: losses are outside the guarantee, and reports are for showing.
    """
    if workspace.agreement.privacy.is_on:
        return []
    logs = {
        (round, f"client {k}"): losses(workspace.log("client-train", round, k), "slm_ft")
        for round in rounds(workspace)
        for k in workspace.clients
    }
    return [
        {"client": party, "round": round, "step": step, "steps": group, "loss": values["slm_ft"]}
        for (round, party), step, group, values in thinned(logs, most_points(workspace))
    ]


def distillation_losses(workspace: Workspace, model: str) -> list[Row]:
    """L_FT and L_KD of one model, slm or llm, in co-distill, by step counted over all rounds, thinned."""
    logs = {
        (round, ""): losses(workspace.log("co-distill", round), f"{model}_ft", f"{model}_kd")
        for round in rounds(workspace)
    }
    return [
        {"term": f"L_{term.upper()}", "round": round, "step": step, "steps": group, "loss": values[f"{model}_{term}"]}
        for (round, _), step, group, values in thinned(logs, MOST_POINTS)
        for term in ("ft", "kd")
    ]


def most_points(workspace: Workspace) -> int:
    """To a client's line, where each has one."""
    return min(MOST_POINTS, max(12, MOST_ROWS // len(workspace.clients)))


def rounds(workspace: Workspace) -> range:
    """All of the agreement's."""
    return range(1, workspace.agreement.federation.rounds + 1)


def _lines(log: Path) -> list[Row]:
    """A private log; empty where there is none on this machine. A last line that a crash cut short is left out.

    Raises Damaged, naming the log and the line, for anything else than objects whose numbers are numbers.
    """
    if not log.exists():
        return []
    found: list[Row] = []
    try:
        *texts, last = read_own(log).decode().split("\n")
    except UnicodeDecodeError:
        raise _damaged(log, "it is not text") from None
    for number, text in enumerate([*texts, last] if last.endswith("}") else texts, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            raise _damaged(log, f"line {number} is not JSON") from None
        if not isinstance(line, dict) or not all(
            isinstance(value, int | float) and isfinite(value)
            for key, value in line.items()
            if key == "wall_s" or "step" in line
        ):
            raise _damaged(log, f"line {number} is not what a stage writes")
        found.append(line)
    return found


def _damaged(log: Path, found: str) -> Damaged:
    name = "/".join(log.parts[-3:])
    mend = "give the command that wrote it again with --overwrite, or put the log back from a copy"
    return Damaged(f"the log {name} is damaged: {found}", where=log, mend=mend)


def losses(log: Path, *names: str) -> list[dict[str, float]]:
    """The steps of a private log. Raises Damaged unless all have the same losses, and these among them."""
    found = [line for line in _lines(log) if "step" in line]
    if any(line.keys() != found[0].keys() or not line.keys() >= set(names) for line in found):
        raise _damaged(log, "its steps do not name the same losses")
    return found


def thinned(
    logs: dict[tuple[int, str], list[dict[str, float]]], most: int
) -> Iterator[tuple[tuple[int, str], int, int, dict[str, float]]]:
    """By (round, party): the last step of each group of steps, counted over rounds, the group's size and its means.

    All groups but a round's last are equally large, as small as `most` points to a party's line allow.
    """
    longest: Counter[int] = Counter()
    for (round, _), log in logs.items():
        longest[round] = max(longest[round], len(log))
    size = max(1, ceil(longest.total() / most))
    earlier = dict(zip(sorted(longest), accumulate((longest[one] for one in sorted(longest)), initial=0), strict=False))
    for (round, party), log in logs.items():
        before = earlier[round]
        for first in range(0, len(log), size):
            group = log[first : first + size]
            means = {key: sum(line[key] for line in group) / len(group) for key in group[0] if key != "step"}
            yield (round, party), before + first + len(group), len(group), means


def traffic(workspace: Workspace, manifests: Manifests | None = None) -> list[Row]:
    """Bytes by round and direction, and the parameters of one adapter; a broadcast counts once for each client."""
    rows: dict[tuple[int, str], Row] = {}
    for one in transfers(workspace, manifests):
        direction = "to the clients" if one.sender == SERVER else "to the server"
        row = rows.setdefault(
            (one.round, direction),
            {"round": one.round, "direction": direction, "bytes": 0, "adapters": 0, "parameters": one.parameters},
        )
        row["parameters"] = max(row["parameters"], one.parameters)  # what models know has none
        row["bytes"] += one.size_bytes
        row["adapters"] += 1
    return list(rows.values())


def lost_by_averaging(workspace: Workspace) -> list[Row]:
    """What averaging loses of each layer, in % of ||mean(BA)||, by layer and round, from the aggregates' manifests.

    what: cross_term, by averaging A and B apart; residual, the same, but kept beneath the adapter; remainder, by
    cutting mean(BA) back to a rank.
    """
    found = {
        (key.partition("/")[2], round): (key.partition("/")[0], value)
        for round in rounds(workspace)
        if workspace.aggregate(round).exists()
        for key, value in read_manifest(workspace.aggregate(round))[0].metrics.items()
        if key.startswith(("cross_term/", "residual/", "remainder/"))
    }
    layers = list(dict.fromkeys(layer for layer, _ in found))
    shared = _shared_prefix(layers)
    return [
        {"layer": layer[shared:], "round": round, "what": what, "lost_percent": 100 * value}
        for (layer, round), (what, value) in sorted(
            found.items(), key=lambda item: (layers.index(item[0][0]), item[0][1])
        )
    ]


def _shared_prefix(names: list[str]) -> int:
    """The length of what all dotted names begin with, whole words only; two words are left of each."""
    words = [name.split(".")[:-2] for name in names]
    same = 0
    while words and all(len(one) > same and one[same] == words[0][same] for one in words):
        same += 1
    return sum(len(word) + 1 for word in words[0][:same]) if words else 0


def data_split(workspace: Workspace, by: Literal["labels", "sources"]) -> list[Row]:
    """Rows of each party by answer label or by source, from what `prepare` wrote."""
    if not workspace.split.exists():
        return []
    parties = read_split(workspace)["parties"]
    names = sorted({name for found in parties.values() for name in found[by]}, key=_counted)
    return [
        {"party": party, by.removesuffix("s"): shortened(name) or "-", "rows": found[by].get(name, 0)}
        for party, found in sorted(parties.items(), key=lambda item: _counted(item[0]))
        for name in names
    ]


def _counted(name: str) -> list[str | int]:
    """A key that puts client-2 before client-10."""
    return [int(word) if word.isdecimal() else word for word in re.split(r"([0-9]+)", name)]


def shortened(name: str) -> str:
    """A data file's or model's name without the folders of the machine that it lies on."""
    return f".../{Path(name).name}" if name.startswith(("/", "~")) else name


def wall_times(workspace: Workspace) -> list[Row]:
    """Seconds of each run of each stage that keeps a log on this machine."""
    by_clients = ("client-train", "share-knowledge", "client-distill")
    places: list[tuple[str, int | None]] = [(stage, k) for stage in by_clients for k in workspace.clients]
    places += [("aggregate", None), ("co-distill", None), ("share-knowledge", None)]
    return [
        {"stage": stage, "round": round, "party": f"client-{k}" if k else SERVER, "seconds": line["wall_s"]}
        for stage, k in places
        for round in rounds(workspace)
        for line in _lines(workspace.log(stage, round, k))
        if "wall_s" in line
    ]
