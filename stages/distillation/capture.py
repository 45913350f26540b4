"""The first of two phases: what a model says at every distilled token, written down."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import already_made, publish
from stages.artefacts.reading import Artefact
from stages.artefacts.steps import Over
from stages.data.rows import Row
from stages.distillation import captures, side, top_k_logits
from stages.distillation.inputs import OTHER, omega_of, read_auxiliary, theta_of
from stages.distillation.phases import Distilling
from stages.distillation.top_k_logits import Captured
from stages.files import writing
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.parties.party import Party
from stages.runtime.errors import Refused
from stages.runtime.events import Event
from stages.workspace.names import CAPTURE
from stages.workspace.settings import Role

TOP_K = 64
"""How many tokens a capture keeps of each position, unless the command says otherwise."""


class Opened(NamedTuple):
    """The auxiliary rows, the digest of their file, and the adapter that is captured, None for a fresh one."""

    rows: list[Row]
    data_sha256: str
    start: Artefact | None

    @property
    def parents(self) -> dict[str, str]:
        """What the capture is made from."""
        return {self.start.path.name: self.start.sha256} if self.start else {}


class Taken(NamedTuple):
    """A capture, and what its manifest and its log say of it."""

    captured: Captured
    teacher: Tuned
    examples: int
    left_out: dict[str, float]
    inputs: dict[str, str]
    started: float


@dataclass(frozen=True, kw_only=True)
class Capture(Distilling[Opened, Taken]):
    """What one model says of the auxiliary data, which needs neither the other one nor its adapter."""

    role: Role
    top_k: int

    @classmethod
    def of(cls, server: Party, round: int, role: Role, *, top_k: int | None, **said: Any) -> Capture:
        """Of one model, in one round."""
        workspace = server.workspace
        folder, log = workspace.captured(round, role), workspace.log(f"capture-{role}", round)
        top_k = top_k or TOP_K
        return cls(party=server, round=round, role=role, top_k=top_k, publishes=[folder], log=log, **said)

    @property
    def unfinished(self) -> Path:
        """Where the part is that is captured already."""
        return self.workspace.unfinished(f"capture-{self.role}", self.round)

    def open(self) -> Opened:
        """Read the rows, and the one adapter."""
        self.report(Event("stage", f"co-distill, round {self.round}, capture {self.role.upper()}"))
        rows, data_sha256 = read_auxiliary(self.workspace, self.report)
        start = theta_of(self.party, self.round) if self.role == "slm" else omega_of(self.party, self.round)
        return Opened(rows, data_sha256, start)

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """A capture of this model and these rows. Raises Refused for one that keeps another number of tokens."""
        [folder], data = self.publishes, opened.data_sha256
        done = already_made(folder, opened.parents, by=self.party, overwrite=again, log=self.log, data=data)
        if done and done.metrics["top_k"] != self.top_k:
            change = f"changed since: --top-k, from {done.metrics['top_k']:g}"
            message = f"{self.workspace.shown(folder)} was made from other inputs; {change}"
            raise Refused(message, where=folder, mend="give the command again with --overwrite to replace it")
        return done

    def compute(self, opened: Opened, again: bool) -> Taken:
        """Ask it at every distilled position."""
        workspace, machine, settings = self.workspace, self.workspace.machine, self.workspace.agreement.distillation
        models = side.loaded(self, self.role)
        examples, shared, left_out = side.encoded(self, opened.rows, {one: models.outline(one) for one in OTHER})
        source = top_k_logits.Source(
            data_sha256=opened.data_sha256,
            rows_sha256=top_k_logits.rows_sha256(examples),
            temperature=settings.temperature,
            vocabulary=shared,
            top_k=self.top_k,
        )
        teacher = side.ready(self, models, self.role, opened.start)
        inputs = {
            "agreement": workspace.agreement_sha256,
            "data": opened.data_sha256,
            **opened.parents,
            f"{self.role}_base": teacher.identity.weights_sha256,
            "dtype": teacher.dtype,
            "top_k": str(self.top_k),
        }
        started = time.monotonic()
        captured = captures.capture(
            teacher,
            examples,
            source,
            rows=machine.rows_at_once(settings),
            finds_rows=machine.micro_batch == "auto",
            every=machine.checkpoint_steps,
            folder=self.unfinished,
            inputs=inputs,
            also=("losses",) if settings.select == "min-ce" else (),
            overwrite=again,
            report=self.report,
        )
        return Taken(captured, teacher, len(examples), left_out, inputs, started)

    def publish(self, opened: Opened, computed: Taken, over: Over) -> Manifest:
        """Publish the capture, and write the log."""
        captured, teacher, examples, left_out, inputs, started = computed
        kept, content, [folder] = captured.kept, top_k_logits.capture_bytes(captured), self.publishes
        words = f"{len(content)} bytes; the {captured.tokens.shape[1]} likeliest tokens of {len(kept)} positions have"
        least = f"{100 * float(kept.mean()):.4g} % of the probability, at least {kept.min():.3g}"
        self.report(Event("note", f"{words} {least}"))
        draft = Draft(
            stage="capture",
            role=self.role,
            round=self.round,
            parents=opened.parents,
            base=teacher.identity,
            parameters=adapters.count(teacher.model),
            seed=None if opened.start else self.workspace.seed_for("omega", 1),
            dtype=teacher.dtype,
            examples=examples,
            tokens=len(kept),
            metrics={"top_k": float(self.top_k), "kept": float(kept.mean()), "kept_least": float(kept.min())}
            | left_out,
        )
        manifest = publish(folder, {CAPTURE: content}, draft, by=self.party, over=over[folder])
        writing.write_log(self.log, [{"inputs": inputs, **left_out}, {"wall_s": time.monotonic() - started}])
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return manifest
