"""status: what is done, missing, damaged or stale, from the files alone, and the next command on this machine.

Reads manifests and file sizes; with verify, every byte. Loads no model and writes nothing.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stages.parts.errors import Damaged, NotReady
from stages.parts.manifest import Manifest, check_names, read_artefact, read_manifest
from stages.parts.workspace import Workspace

Condition = Literal["done", "missing", "damaged", "stale"]


@dataclass(frozen=True)
class Step:
    """One adapter folder of one round: its condition, why it is not "done", and the command that makes it."""

    name: str
    condition: Condition
    reason: str
    command: str
    here: bool
    sha256: str = ""


@dataclass(frozen=True)
class Round:
    """The steps of one round, in the order of Algorithm 1, and updates that came too late for its aggregate."""

    number: int
    steps: list[Step]
    late: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left to do."""
        return all(step.condition == "done" for step in self.steps)


@dataclass(frozen=True)
class Status:
    """All rounds, and what to do next: a literal command, or what this machine waits for."""

    rounds: list[Round]
    next_command: str
    waiting_for: str


def status(workspace: Workspace, *, verify: bool = False) -> Status:
    """The state of a workspace, as this machine sees it."""
    reader = _Reader(workspace, verify)
    rounds = [reader.round(number) for number in range(1, workspace.agreement.federation.rounds + 1)]
    command, waiting_for = _next(workspace, rounds)
    return Status(rounds, command, waiting_for)


class _Reader:
    """Walks the rounds in order, remembering the digests of what it has seen to find what is stale."""

    def __init__(self, workspace: Workspace, verify: bool) -> None:
        self._workspace = workspace
        self._verify = verify
        self._federation = workspace.agreement.federation
        # Where nothing is averaged there is no server: whoever has the clients' data makes their first adapter too.
        self._is_server = workspace.auxiliary_data.exists() or not self._federation.averages
        self._before: dict[str, Step] = {}

    def round(self, number: int) -> Round:
        """Its steps, as far as the method goes."""
        if not self._federation.averages:
            return self._alone(number)
        broadcast = self._broadcast(number)
        clients = {k: self._client(number, k, broadcast) for k in self._workspace.clients}
        aggregate, late = self._aggregate(number, broadcast, clients)
        server = [aggregate, *(self._co_distill(number, aggregate) if self._federation.distils else [])]
        self._before = {step.name: step for step in server}
        return Round(number, [broadcast, *self._counted(clients, aggregate), *server], late)

    def _alone(self, number: int) -> Round:
        """A round without the server: each client goes on with its own adapter, at first with the one broadcast."""
        first = [self._broadcast(number)] if number == 1 else []
        steps = {
            f"client-{k}": self._client(number, k, first[0] if first else self._before[f"client-{k}"])
            for k in self._workspace.clients
        }
        self._before = steps
        return Round(number, [*first, *steps.values()])

    def _broadcast(self, number: int) -> Step:
        source = self._workspace.round_result(number).name
        parents = {source: self._before[source].sha256} if number > 1 else {}
        place, command = self._workspace.broadcast(number), f"broadcast --round {number}"
        return self._step(place, "broadcast", command, parents, self._is_server)

    def _client(self, number: int, client: int, start: Step) -> Step:
        return self._step(
            self._workspace.client_update(number, client),
            f"client-{client}",
            f"client-train --client {client} --round {number}",
            {start.name: start.sha256},
            self._workspace.client_data(client).exists(),
        )

    def _aggregate(self, number: int, broadcast: Step, clients: dict[int, Step]) -> tuple[Step, list[int]]:
        """The average, and the clients whose updates came too late for it."""
        workspace = self._workspace
        given = {"broadcast": broadcast.sha256} | {step.name: step.sha256 for step in clients.values() if step.sha256}
        made_of = self._parents(workspace.aggregate(number))
        late = [k for k, step in clients.items() if step.sha256 and made_of and step.name not in made_of]
        command = f"aggregate --round {number}"
        parents = {party: given.get(party, "") for party in made_of}
        return self._step(workspace.aggregate(number), "aggregate", command, parents, self._is_server), late

    def _co_distill(self, number: int, aggregate: Step) -> list[Step]:
        workspace, command = self._workspace, f"co-distill --round {number}"
        before = {"aggregate": aggregate.sha256} | ({"llm": self._before["llm"].sha256} if number > 1 else {})
        llm = self._step(workspace.llm(number), "llm", command, before, self._is_server)
        slm = self._step(workspace.slm(number), "slm", command, before | {"llm-after": llm.sha256}, self._is_server)
        return [llm, slm]

    def _counted(self, clients: dict[int, Step], aggregate: Step) -> Iterator[Step]:
        """The clients' steps; those absent from a finished aggregate are not waited for any more."""
        for step in clients.values():
            if step.condition != "missing" or aggregate.condition != "done":
                yield step

    def _parents(self, folder: Path) -> dict[str, str]:
        try:
            return read_manifest(folder)[0].parents
        except (NotReady, Damaged):
            return {}

    def _step(self, folder: Path, name: str, command: str, parents: dict[str, str], here: bool) -> Step:
        """What is there. Parents that this machine does not have are not compared."""
        command = f"fedcollm {command}"
        if not os.path.lexists(folder):
            return Step(name, "missing", "", command, here)
        try:
            manifest, digest = self._read(folder)
        except (Damaged, NotReady) as problem:
            return Step(name, "damaged", problem.message, f"{command} --overwrite", here)
        claims, place = _claims(manifest), f"{folder.parent.name}/{folder.name}"
        if claims != place:
            return Step(
                name, "damaged", f"is {claims}, here it should be {place}", f"{command} --overwrite", here, digest
            )
        changed = [key for key, digest in parents.items() if digest and manifest.parents.get(key) != digest]
        if manifest.agreement_sha256 != self._workspace.agreement_sha256:
            changed.append("fedcollm.toml")
        if changed:
            return Step(
                name, "stale", f"made from another {', '.join(changed)}", f"{command} --overwrite", here, digest
            )
        return Step(name, "done", "", command, here, digest)

    def _read(self, folder: Path) -> tuple[Manifest, str]:
        if self._verify:
            artefact = read_artefact(folder)
            return artefact.manifest, artefact.sha256
        manifest, digest = read_manifest(folder)
        check_names(folder, manifest)
        for name, entry in manifest.files.items():
            found = (folder / name).lstat().st_size
            if found != entry.size_bytes:
                raise Damaged(f"{name} has {found} bytes, its manifest says {entry.size_bytes}", where=folder / name)
        return manifest, digest


def _claims(manifest: Manifest) -> str:
    """What a folder says it is, as a place in the workspace."""
    names = {"broadcast": "broadcast", "client-train": f"client-{manifest.client}", "aggregate": "aggregate"}
    return f"round-{manifest.round:04d}/{names.get(manifest.stage, manifest.role)}"


def _next(workspace: Workspace, rounds: list[Round]) -> tuple[str, str]:
    """The first command that this machine can give now; or, where it can give none, what it waits for."""
    parties = [workspace.client_data(k) for k in workspace.clients] + [workspace.auxiliary_data]
    if not any(path.exists() for path in parties):
        if workspace.agreement.data.tasks or workspace.agreement.data.files:
            return "fedcollm prepare", ""
        return (
            "",
            "data: private/client-k/train.jsonl at client k, private/server/auxiliary.jsonl at the server",
        )
    for round in rounds:
        if round.is_done:
            continue
        by_name = {step.name: step for step in round.steps}
        needed = workspace.agreement.aggregation.min_clients or len(workspace.clients)
        updates = [step for step in round.steps if step.name.startswith("client-")]
        arrived = sum(step.condition == "done" for step in updates)
        enough = arrived >= needed
        for step in round.steps:
            if step.condition == "done" or not step.here:
                continue
            if step in updates and "broadcast" in by_name and by_name["broadcast"].condition != "done":
                return "", f"the broadcast of round {round.number}, in exchange/"
            unsound = [update for update in updates if update.condition in ("damaged", "stale")]
            if step.name == "aggregate" and unsound:
                first = unsound[0]
                return "", f"a sound update: {first.name} of round {round.number} is {first.condition}, {first.reason}"
            if step.name == "aggregate" and not enough:
                absent = ", ".join(update.name for update in updates if update.condition != "done")
                return "", f"{needed - arrived} more updates of round {round.number} in exchange/, of {absent}"
            return step.command, ""
    return _score(workspace, rounds)


def _score(workspace: Workspace, rounds: list[Round]) -> tuple[str, str]:
    last = rounds[-1].number
    ended = workspace.round_result(last)
    if ended.exists() and not workspace.result(last, ended.name).exists():
        return f"fedcollm evaluate --round {last} --model {ended.name}", ""
    return "", ""


def with_workspace(command: str, folder: Path | None) -> str:
    """The command with the --workspace it was asked with, so that it can be pasted."""
    return f"{command} --workspace {shlex.quote(str(folder))}" if command and folder else command
