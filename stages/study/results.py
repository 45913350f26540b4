"""What has been measured: the scores of every method and seed of a study, read back from results/.

A study is a workspace with its baselines/ and seeds/. Only results that belong to what lies there are taken: of the
last round, of the agreement as it is now, of the adapter that is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import read_manifest
from stages.artefacts.records import Result, is_current, is_of_base, read_result
from stages.artefacts.subjects import folder_of, scored_by
from stages.files import reading
from stages.parties import names
from stages.runtime.errors import NotReady, Problem, Refused
from stages.study.table_rows import METHODS, base_of
from stages.study.variants import Changes, baseline, check_data, open_variant, replica
from stages.workspace import edits, listing
from stages.workspace.commands import Command
from stages.workspace.methods import Compared
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

Scores = dict[str, np.ndarray]
"""By task: [seeds, questions], the share of right answers to each question: 0 or 1, or a mean over clients."""


class Derived(NamedTuple):
    """A workspace derived from another, and the command that makes it."""

    parent: Workspace
    folder: Path
    changes: Changes
    made_by: Command


@dataclass(frozen=True)
class Study:
    """One workspace for each seed and method. attacks: those under which what was read of ROBUST was measured."""

    root: Workspace
    runs: dict[int, dict[Compared, Workspace]]
    derived: list[Derived] = field(default_factory=list)
    attacks: list[str] = field(default_factory=list)

    def open(self, one: Derived) -> Workspace:
        """One of its derived workspaces. Raises NotReady or Refused, with the command that mends it."""
        self.derived.append(one)
        return open_variant(one.parent, one.folder, one.changes, made_by=one.made_by)

    def inside(self, workspace: Workspace, command: Command) -> Command:
        """The command as it is given at the root to work in one of the study's workspaces."""
        return command if workspace.root == self.root.root else command.also(workspace=self.root.shown(workspace.root))

    def run_again(self, workspace: Workspace) -> Command:
        """The command that makes one of its federations again."""
        return self.inside(workspace, Command("run")).also(overwrite=True)

    @property
    def workspaces(self) -> list[Workspace]:
        """All of them."""
        return [workspace for of_seed in self.runs.values() for workspace in of_seed.values()]

    @property
    def seeds(self) -> list[int]:
        """In ascending order."""
        return sorted(self.runs)

    @property
    def methods(self) -> list[Compared]:
        """Those of every seed, in the order of METHODS."""
        return [method for method in METHODS if all(method in runs for runs in self.runs.values())]


def begun(workspace: Workspace) -> tuple[list[int], list[Compared]]:
    """The seeds and methods that there is anything of."""
    own = workspace.agreement.federation
    seeds = [own.seed, *listing.seeds(workspace)]
    homes = [workspace, *(Workspace(workspace.replica(seed)) for seed in seeds)]
    methods = {own.method}.union(*map(listing.methods, homes))
    return sorted(set(seeds)), [method for method in METHODS if method in methods]


def open_study(workspace: Workspace, seeds: Sequence[int], methods: Sequence[Compared]) -> Study:
    """The workspaces of these seeds and methods. Raises NotReady or Refused, with the command that mends it."""
    study = Study(workspace, {})
    for seed in seeds:
        own = workspace
        if seed != workspace.agreement.federation.seed:
            made_by = Command("compare", seeds=",".join(map(str, seeds)))
            own = study.open(Derived(workspace, *replica(workspace, seed), made_by))
        study.runs[seed] = {method: _of_method(study, own, method) for method in methods}
    return study


def _of_method(study: Study, own: Workspace, method: Compared) -> Workspace:
    if method == own.agreement.federation.method:
        return own
    made_by = study.inside(own, Command("run", method=method))
    return study.open(Derived(own, *baseline(own, method), made_by))


def check_finished(study: Study) -> None:
    """Raise NotReady for a federation that has not come to its end, Refused for one of other data than lies there."""
    for workspace in study.workspaces:
        for round in range(1, workspace.agreement.federation.rounds + 1):
            absent = [place for place in _made_in(workspace, round) if not place.exists()]
            if absent:
                message = f"a federation is not finished: {study.root.shown(absent[0])} is not there"
                mend = alone(study.root) or study.inside(workspace, Command("run"))
                raise NotReady(message, where=absent[0], mend=mend)
    check_rows(study)
    _check_alike(study)


def check_rows(study: Study) -> None:
    """Raise Refused for a federation that was trained on other rows than lie there, or than the first one has now."""
    for workspace in study.workspaces:
        for round in range(1, workspace.agreement.federation.rounds + 1):
            _check_data(study, workspace, round)
    for one in study.derived:
        check_data(one.parent, Workspace(one.folder), one.changes, made_by=one.made_by)


def alone(workspace: Workspace) -> str:
    """What a party alone does instead, where other parties are on other machines; empty where all are here."""
    here = [k for k in workspace.clients if workspace.client_data(k).exists()]
    if workspace.is_simulation or len(here) == len(workspace.clients):
        return ""
    own = Command("evaluate", client=here[0] if here else None, round=workspace.agreement.federation.rounds)
    return f"compare needs the models of all parties in one workspace; a party alone: `{own}`"


def _check_alike(study: Study) -> None:
    """Raise Refused unless all SLMs, and all LLMs, were tuned from one base in one precision, and that base scored.

    Of a client with a model of its own: all that this client has tuned.
    """
    first: dict[str, Manifest] = {}
    for workspace in study.workspaces:
        for base, place in _tuned(workspace):
            manifest, _ = read_manifest(place)
            other = first.setdefault(base, manifest)
            if not manifest.base.is_of(other.base) or manifest.dtype != other.dtype:
                message = f"{study.root.shown(place)} was tuned from another base or in another precision than the rest"
                raise Refused(message, where=place, mend=study.run_again(workspace))
    for base, manifest in first.items():
        path = study.root.result(None, base)
        if path.exists() and not is_of_base(read_result(path), manifest.base):
            message = f"{study.root.shown(path)} is of another base model than was tuned"
            raise Refused(message, where=path, mend=scored_by(None, base).also(overwrite=True))


def _tuned(workspace: Workspace) -> Iterator[tuple[str, Path]]:
    """Each adapter that the last round trained, and of which base."""
    federation = workspace.agreement.federation
    for client, place in workspace.client_adapters(federation.rounds).items():
        yield _base(workspace, names.client(client)), place
    if federation.distils or federation.clients_tell:
        yield "llm", workspace.llm(federation.rounds)


def _base(workspace: Workspace, subject: str) -> str:
    """As base_of names it; with centralized, client 1 tunes the LLM."""
    return "llm" if workspace.agreement.federation.method == "centralized" else base_of(workspace, subject)


def _check_data(study: Study, workspace: Workspace, round: int) -> None:
    """Raise Refused where the private logs say that a party was trained on other rows than lie there."""
    logs = {workspace.client_data(k): workspace.log("client-train", round, k) for k in workspace.clients}
    logs |= {workspace.public_data(k): workspace.log("client-distill", round, k) for k in workspace.clients}
    logs[workspace.auxiliary_data] = workspace.log("co-distill", round)
    for data, log in logs.items():
        if (
            data.exists()
            and log.exists()
            and reading.logged_inputs(log).get("data") != reading.sha256(reading.read_own(data))
        ):
            message = f"{study.root.shown(data)} is not what was trained on in round {round}"
            raise Refused(message, where=data, mend=f"put those rows back, or {study.run_again(workspace)}")


def _made_in(workspace: Workspace, round: int) -> list[Path]:
    """What a round ends with."""
    federation = workspace.agreement.federation
    llm = [workspace.llm(round)] if federation.distils or federation.clients_tell else []
    if not workspace.agreement.averages:
        return [*(workspace.client_adapter(round, client) for client in workspace.clients), *llm]
    return [workspace.round_result(round), *llm]


def remarks(workspaces: Iterable[Workspace]) -> list[str]:
    """What the scores of these workspaces lack, in sentences: questions left out by a limit, and questions cut.

    From the results of bases and of last rounds, under today's agreement.
    """
    in_all, asked, cut, limited_by = dict[str, int](), dict[str, int](), dict[str, int](), ""
    for workspace in workspaces:
        limited_by = workspace.limited_by
        last = workspace.result(workspace.agreement.federation.rounds, "slm").parent
        for path in [*workspace.result(None, "slm").parent.glob("*.json"), *last.glob("*.json")]:
            try:
                result = read_result(path)
            except (Problem, OSError):
                continue
            for task, found in result["tasks"].items() if is_current(result, workspace) else ():
                asked[task] = min(asked.get(task, found["questions"]), found["questions"])
                in_all[task] = max(in_all.get(task, 0), found.get("questions_in_all", found["questions"]))
                cut[task] = max(cut.get(task, 0), found.get("cut", 0))
    limited = [f"{count} of {in_all[task]} of {task}" for task, count in asked.items() if count < in_all[task]]
    shortened = [f"up to {count} of {task}" for task, count in cut.items() if count]
    lines = []
    if limited:
        lines.append(f"only the first questions count, by {limited_by}: {', '.join(limited)}; no score of a whole task")
    if shortened:
        lines.append(f"questions longer than a model's context, scored without their beginning: {', '.join(shortened)}")
    return lines


def result_of(study: Study, workspace: Workspace, round: int | None, subject: str) -> Result:
    """A result as it was written, of the agreement, the adapter and the questions that are there now."""
    path = workspace.result(round, subject)
    mend = _evaluate(study, workspace, round, subject)
    if not path.exists():
        raise NotReady(f"there is no {study.root.shown(path)}", where=path, mend=mend)
    result = read_result(path)
    if result.get("agreement_sha256") != workspace.agreed_in(round):
        message = f"{study.root.shown(path)} is a result of another agreement"
        if edited := edits.since(workspace, str(result.get("agreement_sha256"))):
            message += f"; edited since: {edited}"
        raise Refused(message, where=path, mend=f"undo the edit of {AGREEMENT}, or {study.run_again(workspace)}")
    if not is_current(result, workspace):
        message = f"{study.root.shown(path)} was scored by other settings of evaluation than those of now"
        raise Refused(message, where=path, mend=mend)
    if not workspace.has_tasks(result.get("tasks_sha256"), workspace.scored_tasks):
        message = f"{study.root.shown(path)} is of other questions: a task or its data has changed since"
        raise Refused(message, where=path, mend=mend)
    if any("correct" not in one for one in result["tasks"].values()):
        message = f"{study.root.shown(path)}, of an earlier version, does not say which questions were right"
        raise Refused(message, where=path, mend=mend.also(overwrite=True))
    if round is not None:
        _check_current(study, folder_of(workspace, round, subject), result, path, mend)
        base = study.root.result(None, _base(workspace, subject))
        if base.exists() and read_result(base).get("dtype") != result.get("dtype"):
            message = f"{study.root.shown(path)} was scored in another precision than {study.root.shown(base)}"
            raise Refused(message, where=path, mend=f"score both anew in one: {mend.also(overwrite=True)}")
    return result


def _check_current(study: Study, folder: Path, result: Result, path: Path, mend: Command) -> None:
    """Raise Refused unless the adapter that was scored is the one that lies there."""
    if folder.exists() and read_manifest(folder)[1] != result.get("manifest_sha256"):
        message = f"{study.root.shown(path)} is of another adapter than {study.root.shown(folder)} is now"
        raise Refused(message, where=path, mend=mend)


def _evaluate(study: Study, workspace: Workspace, round: int | None, subject: str) -> Command:
    """The command that makes a result; of a federation that is only half done, the one that goes on with it."""
    if round is not None and not folder_of(workspace, round, subject).exists():
        return study.inside(workspace, Command("run"))
    return study.inside(workspace, scored_by(round, subject).also(**workspace.flags.asked))
