"""Co-distillation with one model in memory at a time: each is captured, then each trains against the other's capture.

A capture is what a model says of the auxiliary data before the round changes it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import already_made
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import received
from stages.artefacts.steps import Over
from stages.distillation import captures, side, top_k_logits
from stages.distillation.inputs import OTHER, Inputs
from stages.distillation.phases import Distilling
from stages.distillation.top_k_logits import Captured, Source
from stages.files import reading
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.parties.party import Party
from stages.runtime.errors import NotReady, Refused
from stages.runtime.events import Event
from stages.training.recipes import Outcome
from stages.workspace.commands import Command
from stages.workspace.names import CAPTURE
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


class Opened(NamedTuple):
    """What both models start from, the other one's capture, the digests that the adapter is made from, and the LLM.

    taught_by: None where it was cleared away after it had served. llm: as it was just trained, if it is the SLM's turn.
    """

    inputs: Inputs
    taught_by: Artefact | None
    parents: dict[str, str]
    llm: Artefact | None


class Trained(NamedTuple):
    """The model with the adapter that was trained, how that went, and what its manifest and its log tell beyond it."""

    student: Tuned
    outcome: Outcome
    metrics: dict[str, float]
    left_out: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainAgainst(Distilling[Opened, Trained]):
    """Train one model against the other's capture and publish it; the SLM comes last, as the commit record."""

    role: Role
    read: Callable[[], Inputs]

    @classmethod
    def of(cls, server: Party, round: int, role: Role, **said: Any) -> TrainAgainst:
        """One model of a round."""
        workspace = server.workspace
        folder = workspace.slm(round) if role == "slm" else workspace.llm(round)
        log = workspace.log("co-distill" if role == "slm" else "co-distill-llm", round)
        return cls(party=server, round=round, role=role, publishes=[folder], log=log, **said)

    @property
    def name(self) -> str:
        """Of its checkpoints: each model has its own."""
        return f"co-distill-{self.role}"

    @property
    def lock(self) -> Path:
        """One for the round, in one phase or in two."""
        return self.workspace.log("co-distill", self.round).with_suffix(".lock")

    def open(self) -> Opened:
        """Receive the other model's capture, and, for the SLM, the LLM that was trained before it."""
        workspace, round, teacher, [target] = self.workspace, self.round, OTHER[self.role], self.publishes
        inputs, place = self.read(), workspace.captured(round, teacher)
        taught_by, parents = None, inputs.parents
        if not target.exists() or place.exists():  # what served a finished model may have been cleared away
            missing = f"the {teacher.upper()} of round {round} is not captured", _capture(round, teacher)
            taught_by = received(place, by=self.party, stage="capture", round=round, missing=missing)
            parents |= {place.name: taught_by.sha256}
        elif before := read_manifest(target)[0].parents.get(place.name):
            parents |= {place.name: before}
        llm = _llm_after(self.party, round, taught_by) if self.role == "slm" else None
        parents |= {"llm-after": llm.sha256} if llm else {}
        self.report(Event("stage", f"co-distill, round {round}, train {self.role.upper()}"))
        return Opened(inputs, taught_by, parents, llm)

    def decide(self, opened: Opened, again: bool) -> tuple[Opened, bool]:
        """What a run in one phase has left behind half is made again."""
        return opened, again or (self.role == "llm" and _is_half_of_one_phase(self.workspace, self.round))

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """An adapter that was trained against this capture. Raises NotReady where there is neither."""
        [target], data = self.publishes, opened.inputs.data_sha256
        done = already_made(target, opened.parents, by=self.party, overwrite=again, log=self.log, data=data)
        if done is None and opened.taught_by is None:
            teacher = OTHER[self.role]
            message = f"the {teacher.upper()} of round {self.round} is not captured any more"
            place = self.workspace.captured(self.round, teacher)
            raise NotReady(message, where=place, mend=_capture(self.round, teacher))
        return done

    def compute(self, opened: Opened, again: bool) -> Trained:
        """Load one model, and train it against what the other said."""
        assert opened.taught_by
        gc.collect()  # modules refer to each other in circles: an earlier one is to be gone before this is loaded
        workspace, inputs, role = self.workspace, opened.inputs, self.role
        content = opened.taught_by.contents.pop(CAPTURE)  # not kept beside what is made of it: it may be large
        captured = top_k_logits.parse_capture(content, opened.taught_by.path / CAPTURE)
        del content
        models = side.loaded_to_train(self, role)
        examples, shared, left_out = side.encoded(self, inputs.rows, {one: models.outline(one) for one in OTHER})
        source = top_k_logits.Source(
            data_sha256=inputs.data_sha256,
            rows_sha256=top_k_logits.rows_sha256(examples),
            temperature=workspace.agreement.distillation.temperature,
            vocabulary=shared,
            top_k=captured.source.top_k,
        )
        _check_capture(workspace, opened.taught_by, captured, source, inputs)
        student = side.ready(self, models, role, inputs.theta if role == "slm" else inputs.omega)
        before, settings = adapters.take(student.model), workspace.agreement.distillation
        outcome = side.train(
            self,
            captures.TaughtObjective(student, captured, settings, side.weights(workspace, role)),
            [student],
            captures.taught(examples, captured),
            inputs={"data": inputs.data_sha256, **opened.parents},
            again=again,
        )
        return Trained(student, outcome, adapters.check_trained(before, adapters.take(student.model)), left_out)

    def publish(self, opened: Opened, computed: Trained, over: Over) -> Manifest:
        """Publish the adapter, and write the log; the SLM's manifest and log tell both models' losses."""
        student, outcome, norms, left_out = computed
        told = opened.llm.manifest.metrics if opened.llm else {}
        earlier = {name: value for name, value in told.items() if name.startswith("llm_")}
        metrics = outcome.metrics | left_out | earlier | norms
        manifest = side.publish_model(self, student, outcome, parents=opened.parents, metrics=metrics, over=over)
        log = [outcome.log[0] | left_out, *outcome.log[1:]]
        log = _both_logs(self.workspace, self.round, log) if self.role == "slm" else log
        side.finish(self, log)
        return manifest


def _capture(round: int, role: Role) -> Command:
    """The command that captures a model."""
    return Command("co-distill", round=round, phase="capture", model=role)


def _llm_after(server: Party, round: int, captured: Artefact | None) -> Artefact:
    """The LLM as it was trained in two phases in this round; by the base that was captured."""
    workspace, train = server.workspace, Command("co-distill", round=round, phase="train", model="llm")
    place, missing = workspace.llm(round), (f"the LLM of round {round} is not trained: the SLM comes last", train)
    llm = received(place, by=server, stage="co-distill", round=round, missing=missing)
    if "captured-slm" not in llm.manifest.parents:
        raise Refused(f"round {round}'s LLM was trained in one phase", where=place, mend=train.also(overwrite=True))
    if captured and not llm.manifest.base.is_of(captured.manifest.base):
        message = f"{workspace.shown(captured.path)} is of another LLM than {workspace.shown(place)}"
        raise Refused(message, where=captured.path, mend="capture again with --overwrite, with the same base")
    return llm


def _is_half_of_one_phase(workspace: Workspace, round: int) -> bool:
    """Whether an LLM's adapter is there that a run in one phase left behind when it was stopped."""
    llm = workspace.llm(round)
    is_half = llm.exists() and not os.path.lexists(workspace.slm(round))
    return is_half and "captured-slm" not in read_manifest(llm)[0].parents


def _check_capture(
    workspace: Workspace, artefact: Artefact, captured: Captured, source: Source, inputs: Inputs
) -> None:
    """Raise Refused, naming the difference, for a capture of other data, or of a model with another adapter."""
    role, shown = artefact.manifest.role, workspace.shown(artefact.path)
    claims = [
        ("auxiliary data", captured.source.data_sha256, source.data_sha256),
        ("temperature", captured.source.temperature, source.temperature),
        ("shared vocabulary", captured.source.vocabulary, source.vocabulary),
        ("tokens of the auxiliary data: tokenizer or max_length", captured.source.rows_sha256, source.rows_sha256),
        ("adapter", artefact.manifest.parents, inputs.parents_of(role)),
    ]
    for name, found, expected in claims:
        if found != expected:
            mend = _capture(artefact.manifest.round, role).also(overwrite=True)
            message = f"{shown} is of another {name}: {_short(found)}, here it is {_short(expected)}"
            raise Refused(message, where=artefact.path, mend=mend)


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(digest)}" for name, digest in value.items()) or "none"
    return f"{value[:16]}..." if isinstance(value, str) else str(value)


def _both_logs(workspace: Workspace, round: int, slm: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log of the round, as in one phase: the LLM's and the SLM's losses of every step side by side."""
    log = reading.read(workspace.log("co-distill-llm", round), limit_bytes=reading.LARGEST_OWN_BYTES)
    begun, *steps, ended = slm
    other_begun, *others, other_ended = map(reading.parse_json, log.splitlines())
    both = [{**other, **step} for step, other in zip(steps, others, strict=True)]
    inputs = {**other_begun["inputs"], **begun["inputs"]}
    return [begun | {"inputs": inputs}, *both, {"wall_s": ended["wall_s"] + other_ended["wall_s"]}]
