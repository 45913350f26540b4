"""How far a round of FedMKT, or of its baselines, is: what clients keep, what everybody tells, the server's LLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from stages.parties.names import SERVER, client, number_of, of
from stages.progress.looking import Looker
from stages.progress.steps import Round, Step, awaited
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


class InPublic:
    """Walks these rounds in order. A client's own folders never travel: they are looked for at that client alone."""

    def __init__(self, look: Looker, is_server: bool) -> None:
        self._look = look
        self._workspace = workspace = look.workspace
        self._federation, self._averages = workspace.agreement.federation, workspace.agreement.averages
        self._is_server = is_server
        self._own = [k for k in workspace.clients if _has_anything(workspace, k)]
        self._before: dict[str, Step] = {}
        """Steps of the rounds before: each vocabulary, the newest adapters, and what the server has told last."""

    def round(self, number: int, first: list[Step]) -> Round:
        """Its steps, in the order of Algorithm 1, up to the clients' adapters. first: the broadcast, if it has one."""
        workspace, federation = self._workspace, self._federation
        steps = self._vocabularies() if federation.server_tells and number == 1 else []
        steps += first
        if federation.server_tells and workspace.told_in(number) == number and not federation.clients_tell:
            steps.append(self._knowledge(number, None))
        for k in workspace.clients:
            if k in self._own:
                steps.append(self._trained(number, k, first))
            if federation.clients_tell:
                steps.append(self._knowledge(number, k))
        unheard: list[int] = []
        if federation.clients_tell:
            llm, unheard = self._llm(number)
            steps = [*self._counted(steps, llm), llm, self._knowledge(number, None)]
        if not self._averages:
            return Round(number, [*steps, *(self._slm(number, k) for k in self._own)], unheard=unheard)
        steps += [self._slm(number, k, first) for k in workspace.clients]
        is_over = any(map(os.path.lexists, (workspace.aggregate(number), workspace.broadcast(number + 1))))
        return Round(number, [step for step in steps if not (is_over and _is_late(step))], unheard=unheard)

    def _vocabularies(self) -> list[Step]:
        """How each party reads. With an LLM that stays as it is, the server needs no client's."""
        return [
            step
            for k in (None, *self._workspace.clients)
            if (step := self._vocabulary(k)).here or step.condition != "missing" or self._federation.clients_tell
        ]

    def _vocabulary(self, k: int | None) -> Step:
        command = Command("align", server=True) if k is None else Command("align", client=k)
        step = self._step(self._workspace.vocabulary(k), f"vocabulary-{k or SERVER}", command, {}, k)
        return self._of_public_rows(step, "align", 1, k)

    def _trained(self, number: int, k: int, first: list[Step]) -> Step:
        before = {"slm": self._sha256(f"slm-{k}")} if number > 1 and not self._averages else {}
        parents = before | {step.name: step.sha256 for step in first}
        place, name = self._workspace.client_trained(number, k), f"trained-{k}"
        self._before[name] = self._look.client_train(place, name, number, k, parents)
        return self._before[name]

    def _knowledge(self, number: int, k: int | None) -> Step:
        """What a client, or the server's LLM, knows of the public rows."""
        source = "llm" if k is None else "trained"
        parents = self._vocabularies_of(k) | {source: self._sha256("llm" if k is None else f"trained-{k}")}
        command = Command("share-knowledge", client=k, server=k is None, round=number)
        step = self._step(self._workspace.knowledge(number, k), f"knowledge-{k or SERVER}", command, parents, k)
        return self._of_public_rows(step, "share-knowledge", number, k)

    def _llm(self, number: int) -> tuple[Step, list[int]]:
        """The LLM, and the clients whose knowledge came too late for it."""
        place, command = self._workspace.llm(number), Command("co-distill", round=number)
        made_of = self._look.parents(place)
        told = {k: self._sha256(f"knowledge-{k}") for k in self._workspace.clients}
        taught_by = [k for k in told if client(k) in made_of]
        parents = {client(k): told[k] for k in taught_by} | self._vocabularies_of(None, *taught_by)
        parents |= {"llm": self._sha256("llm")} if number > 1 else {}
        step = self._step(place, "llm", command, parents, None)
        unheard = [k for k, sha256 in told.items() if sha256 and made_of and k not in taught_by]
        return self._of_public_rows(step, "co-distill", number, None), unheard

    def _slm(self, number: int, k: int, first: Sequence[Step] = ()) -> Step:
        """What a client ends the round with. first: the broadcast, where that is averaged."""
        parents = {"trained": self._sha256(f"trained-{k}")} | {step.name: step.sha256 for step in first}
        if self._federation.server_tells:
            parents |= self._vocabularies_of(None, k) | {SERVER: self._sha256(f"knowledge-{SERVER}")}
        if self._federation.clients_tell:
            parents |= {client(k): self._sha256(f"knowledge-{k}")}
        command = Command("client-distill", client=k, round=number)
        place, here = self._workspace.client_adapter(number, k), self._workspace.client_data(k).exists()
        step = self._look.step(place, f"slm-{k}", command, parents, here, party=client(k), attempt_at=number)
        self._before[step.name] = step
        return self._of_public_rows(step, "client-distill", number, k)

    def _counted(self, steps: list[Step], llm: Step) -> Iterator[Step]:
        """What is elsewhere and absent from a finished LLM is not waited for any more; a client here still learns."""
        for step in steps:
            if step.condition != "missing" or llm.condition != "done" or step.here or step.party == SERVER:
                yield step

    def _vocabularies_of(self, *parties: int | None) -> dict[str, str]:
        return {f"vocabulary-{of(k)}": self._sha256(f"vocabulary-{k or SERVER}") for k in parties}

    def _step(self, place: Path, name: str, command: Command, parents: dict[str, str], k: int | None) -> Step:
        here = self._is_server if k is None else self._workspace.client_data(k).exists()
        self._before[name] = self._look.step(place, name, command, parents, here, party=of(k))
        return self._before[name]

    def _of_public_rows(self, step: Step, stage: str, number: int, k: int | None) -> Step:
        data, log = self._workspace.public_data(k), self._workspace.log(stage, number, k)
        verb = "trained on" if stage.endswith("distill") else "made of"
        return self._look.of_rows(step, data, log, dealt_to=SERVER, verb=verb)

    def _sha256(self, name: str) -> str:
        return self._before[name].sha256 if name in self._before else ""


def _is_late(step: Step) -> bool:
    """Whether a step of a client's is of no use any more in a round whose average is made, here or elsewhere.

    A client here that begins in a later round still has to tell how it reads.
    """
    is_of_use = step.here and step.name.startswith("vocabulary-")
    return step.condition == "missing" and not step.reason and step.party != SERVER and not is_of_use


def _has_anything(workspace: Workspace, k: int) -> bool:
    """Whether a client, or anything that it keeps, is on this machine."""
    rounds = range(1, workspace.agreement.federation.rounds + 1)
    kept = [workspace.client_trained, *([workspace.client_adapter] if workspace.clients_keep_theirs else [])]
    places = [place(t, k) for t in rounds for place in kept]
    return workspace.client_data(k).exists() or any(os.path.lexists(place) for place in places)


def waits_for(workspace: Workspace, rounds: list[Round], number: int, step: Step) -> str:
    """What a step of a round needs that is not there yet, in words; empty if it can be taken."""
    known = {other.name: other for other in (*rounds[0].steps, *rounds[number - 1].steps)}
    if step.name.startswith("trained-"):
        has_broadcast = workspace.agreement.broadcasts(number)
        return _undone(known, "broadcast", f"the broadcast of round {number}") if has_broadcast else ""
    if step.name == "aggregate":
        return _missing_of_clients(workspace, number, known, "slm")
    rows = workspace.public_data(None if step.party == SERVER else number_of(step.party))
    if not rows.exists():
        return f"the public rows, the same file at every party: {workspace.shown(rows)}"
    if step.name == "llm":
        return _knowledge_missing(workspace, number, known)
    if step.name.startswith("slm-") and workspace.agreement.federation.server_tells:
        vocabulary = _undone(known, f"vocabulary-{SERVER}", "the server's vocabulary")
        told_in = workspace.told_in(number)
        return vocabulary or _undone(known, f"knowledge-{SERVER}", f"what the server knows in round {told_in}")
    return ""


def _undone(known: dict[str, Step], name: str, said: str) -> str:
    """Another party's folder that is not here, or is not sound; empty if it is."""
    step = known.get(name)
    if step and step.condition == "done":
        return ""
    return f"{said}, in exchange/" + (f": {step.reason}" if step and step.reason else "")


def _knowledge_missing(workspace: Workspace, number: int, known: dict[str, Step]) -> str:
    """What co-distill needs of clients: the knowledge of enough of them, and how each of these reads."""
    if missing := _missing_of_clients(workspace, number, known, "knowledge"):
        return missing
    ready = [k for k in workspace.clients if f"knowledge-{k}" in known and known[f"knowledge-{k}"].condition == "done"]
    return next(filter(None, (_undone(known, f"vocabulary-{k}", f"the vocabulary of client {k}") for k in ready)), "")


def _missing_of_clients(
    workspace: Workspace, number: int, known: dict[str, Step], what: Literal["knowledge", "slm"]
) -> str:
    """What a step of the server's needs of enough clients, their knowledge or their adapters, and has not."""
    sent = {k: known[name] for k in workspace.clients if (name := f"{what}-{k}") in known}
    for k, step in sent.items():
        if step.condition in ("damaged", "stale"):
            sound = "sound knowledge: that" if what == "knowledge" else "a sound adapter: that"
            return f"{sound} of client {k} in round {number} is {step.condition}, {step.reason}"
    ready = [k for k, step in sent.items() if step.condition == "done"]
    missing = (workspace.agreement.aggregation.min_clients or len(workspace.clients)) - len(ready)
    if missing <= 0:
        return ""
    absent = [k for k in workspace.clients if k not in ready]
    place_of = workspace.client_update if what == "slm" else workspace.knowledge
    said = "adapter" if what == "slm" else what
    return awaited(said, absent, missing, number, workspace.shown(place_of(number, absent[0])))
