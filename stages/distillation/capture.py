"""The first of two phases: what a model says at every distilled token, written down."""

from __future__ import annotations

import shutil
import time
from typing import Any

from stages.artefacts import turns
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import already_made, publish
from stages.data.rows import Row
from stages.distillation import captures, top_k_logits
from stages.distillation.inputs import OTHER, omega_of, theta_of
from stages.distillation.side import encoded, ready
from stages.files import writing
from stages.models import adapters
from stages.models.loading import Models
from stages.parties.party import Party
from stages.runtime.errors import Refused
from stages.runtime.events import Event, Report
from stages.workspace.names import CAPTURE
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


def capture(
    server: Party,
    round: int,
    role: Role,
    top_k: int,
    rows: list[Row],
    data_sha256: str,
    overwrite: bool,
    models: Models | None,
    report: Report,
) -> Manifest:
    """Write what one model says of the auxiliary data, which needs neither the other one nor its adapter."""
    workspace = server.workspace
    start = theta_of(server, round) if role == "slm" else omega_of(server, round)
    parents = {start.path.name: start.sha256} if start else {}
    name, folder = f"capture-{role}", workspace.captured(round, role)
    log = workspace.log(name, round)
    again = overwrite

    def look(asked: bool) -> Manifest | None:
        nonlocal again
        again = asked
        done = already_made(folder, parents, by=server, overwrite=again, log=log, data=data_sha256)
        if done:
            _check_top_k(workspace, done, top_k)
        return done

    def make(places: turns.Places) -> Manifest:
        loaded = models or Models(workspace)
        loaded.use(role)
        outlines = {one: loaded.outline(one) for one in OTHER}
        examples, shared, left_out = encoded(workspace, rows, outlines["slm"], outlines["llm"], report)
        source = top_k_logits.Source(
            data_sha256=data_sha256,
            rows_sha256=top_k_logits.rows_sha256(examples),
            temperature=workspace.agreement.distillation.temperature,
            vocabulary=shared,
            top_k=top_k,
        )
        teacher = ready(workspace, round, loaded, role, start)
        settings, machine = workspace.agreement.distillation, workspace.machine
        inputs: dict[str, Any] = {
            "agreement": workspace.agreement_sha256,
            "data": data_sha256,
            **parents,
            f"{role}_base": teacher.identity.weights_sha256,
            "dtype": teacher.dtype,
            "top_k": str(top_k),
        }
        started = time.monotonic()
        captured = captures.capture(
            teacher,
            examples,
            source,
            rows=machine.rows_at_once(settings),
            finds_rows=machine.micro_batch == "auto",
            every=machine.checkpoint_steps,
            folder=workspace.unfinished(name, round),
            inputs=inputs,
            overwrite=again,
            report=report,
        )
        kept = captured.kept
        content = top_k_logits.capture_bytes(captured)
        words = f"{len(content)} bytes; the {captured.tokens.shape[1]} likeliest tokens of {len(kept)} positions have"
        report(Event("note", f"{words} {100 * float(kept.mean()):.4g} % of the probability, at least {kept.min():.3g}"))
        manifest = publish(
            folder,
            {CAPTURE: content},
            Draft(
                stage="capture",
                role=role,
                round=round,
                parents=parents,
                base=teacher.identity,
                parameters=adapters.count(teacher.model),
                seed=None if start else workspace.seed_for("omega", 1),
                dtype=teacher.dtype,
                examples=len(examples),
                tokens=len(kept),
                metrics={"top_k": float(top_k), "kept": float(kept.mean()), "kept_least": float(kept.min())} | left_out,
            ),
            by=server,
            over=places[folder],
        )
        writing.write_log(log, [{"inputs": inputs, **left_out}, {"wall_s": time.monotonic() - started}])
        shutil.rmtree(workspace.unfinished(name, round), ignore_errors=True)
        return manifest

    lock = log.with_suffix(".lock")
    return turns.take([folder], lock, look=look, make=make, overwrite=overwrite, report=report)


def _check_top_k(workspace: Workspace, done: Manifest, top_k: int) -> None:
    """Raise Refused for a capture that keeps another number of tokens."""
    before = done.metrics["top_k"]
    if before != top_k:
        folder = workspace.captured(done.round, done.role)
        message = f"{workspace.shown(folder)} was made from other inputs; changed since: --top-k, from {before:g}"
        raise Refused(message, where=folder, mend="give the command again with --overwrite to replace it")
