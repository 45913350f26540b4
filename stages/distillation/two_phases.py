"""Co-distillation with one model in memory at a time: each is captured, then each trains against the other's capture.

A capture is what a model says of the auxiliary data before the round changes it.
"""

from __future__ import annotations

import gc
import os
import shutil
from typing import Any

from stages.artefacts import turns
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import already_made
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import received
from stages.distillation import captures, top_k_logits
from stages.distillation.inputs import OTHER, Inputs, lock_of
from stages.distillation.side import encoded, publish_model, ready, recipe, weights
from stages.distillation.top_k_logits import Captured, Source
from stages.files import reading, writing
from stages.models import adapters
from stages.models.loading import Models
from stages.parties.party import Party
from stages.runtime.errors import NotReady, Refused
from stages.runtime.events import Event, Report
from stages.runtime.processes import Processes
from stages.training import trackers, training
from stages.workspace.names import CAPTURE
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


def train(
    server: Party,
    round: int,
    role: Role,
    inputs: Inputs,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    report: Report,
) -> Manifest:
    """Train one model against the other's capture and publish it; the SLM comes last, as the commit record."""
    workspace, teacher = server.workspace, OTHER[role]
    place = workspace.captured(round, teacher)
    capture = f"fedcollm co-distill --round {round} --phase capture --model {teacher}"
    target = workspace.slm(round) if role == "slm" else workspace.llm(round)
    taught_by, parents = None, inputs.parents
    if not target.exists() or place.exists():  # what served a finished model may have been cleared away
        missing = f"the {teacher.upper()} of round {round} is not captured", capture
        taught_by = received(place, by=server, stage="capture", round=round, missing=missing)
        parents |= {place.name: taught_by.sha256}
    elif before := read_manifest(target)[0].parents.get(place.name):
        parents |= {place.name: before}
    llm = _llm_after(server, round, taught_by) if role == "slm" else None
    parents |= {"llm-after": llm.sha256} if llm else {}
    name = "co-distill" if role == "slm" else "co-distill-llm"
    log = workspace.log(name, round)
    report(Event("stage", f"co-distill, round {round}, train {role.upper()}"))
    again = overwrite

    def look(asked: bool) -> Manifest | None:
        nonlocal again
        again = asked or (role == "llm" and _is_half_of_one_phase(workspace, round))
        return already_made(target, parents, by=server, overwrite=again, log=log, data=inputs.data_sha256)

    def make(places: turns.Places) -> Manifest:
        if taught_by is None:
            message = f"the {teacher.upper()} of round {round} is not captured any more"
            raise NotReady(message, where=place, mend=capture)
        processes.agree((role, inputs, taught_by, parents, llm, again))
        return train_against(
            server, round, role, inputs, taught_by, parents, llm, again, models, processes, places, report
        )

    lock = lock_of(workspace, round)
    return turns.take([target], lock, look=look, make=make, overwrite=overwrite, report=report)


def _llm_after(server: Party, round: int, captured: Artefact | None) -> Artefact:
    """The LLM as it was trained in two phases in this round; by the base that was captured."""
    workspace, mend = server.workspace, f"fedcollm co-distill --round {round} --phase train --model llm"
    place, missing = workspace.llm(round), (f"the LLM of round {round} is not trained: the SLM comes last", mend)
    llm = received(place, by=server, stage="co-distill", round=round, missing=missing)
    if "captured-slm" not in llm.manifest.parents:
        raise Refused(f"round {round}'s LLM was trained in one phase", where=place, mend=f"{mend} --overwrite")
    if captured and not llm.manifest.base.is_of(captured.manifest.base):
        message = f"{workspace.shown(captured.path)} is of another LLM than {workspace.shown(place)}"
        raise Refused(message, where=captured.path, mend="capture again with --overwrite, with the same base")
    return llm


def _is_half_of_one_phase(workspace: Workspace, round: int) -> bool:
    """Whether an LLM's adapter is there that a run in one phase left behind when it was stopped."""
    llm = workspace.llm(round)
    is_half = llm.exists() and not os.path.lexists(workspace.slm(round))
    return is_half and "captured-slm" not in read_manifest(llm)[0].parents


def train_against(
    server: Party,
    round: int,
    role: Role,
    inputs: Inputs,
    taught_by: Artefact,
    parents: dict[str, str],
    llm: Artefact | None,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    places: turns.Places,
    report: Report,
) -> Manifest:
    """Load one model, train it against what the other said, and publish it.

    llm: as it was just trained, if it is the SLM's turn. processes: the first publishes over places, and tells the
    others what it published.
    """
    workspace = server.workspace
    gc.collect()  # modules refer to each other in circles: before this model is loaded, an earlier one is to be gone
    content = taught_by.contents.pop(CAPTURE)  # not kept beside what is made of it: it may be large
    captured = top_k_logits.parse_capture(content, taught_by.path / CAPTURE)
    del content
    models = models or Models(workspace, processes)
    models.use(role)
    outlines = {one: models.outline(one) for one in OTHER}
    examples, shared, left_out = encoded(workspace, inputs.rows, outlines["slm"], outlines["llm"], report)
    source = top_k_logits.Source(
        data_sha256=inputs.data_sha256,
        rows_sha256=top_k_logits.rows_sha256(examples),
        temperature=workspace.agreement.distillation.temperature,
        vocabulary=shared,
        top_k=captured.source.top_k,
    )
    _check_capture(workspace, round, taught_by, captured, source, inputs)
    student = ready(workspace, round, models, role, inputs.theta if role == "slm" else inputs.omega)
    before = adapters.take(student.model)
    name = f"co-distill-{role}"
    unfinished = workspace.unfinished(name, round)
    started_from: dict[str, Any] = {
        "agreement": workspace.agreement_sha256,
        "data": inputs.data_sha256,
        **parents,
        f"{role}_base": student.identity.weights_sha256,
        "dtype": student.dtype,
    }
    outcome = training.train(
        captures.TaughtObjective(student, captured, workspace.agreement.distillation, weights(workspace, role)),
        captures.taught(examples, captured),
        recipe(workspace, round, role),
        machine=workspace.machine,
        folder=unfinished,
        inputs=started_from,
        overwrite=overwrite,
        tracking=trackers.tracking(workspace, name, round),
        processes=processes,
        report=report,
    )
    report(Event("note", outcome.change))
    norms = adapters.check_trained(before, adapters.take(student.model))
    if not processes.is_first:
        return Manifest.model_validate(processes.agree())
    # The SLM's manifest tells both models' losses, as in one phase.
    earlier = {name: value for name, value in llm.manifest.metrics.items() if name.startswith("llm_")} if llm else {}
    metrics = outcome.metrics | left_out | earlier | norms
    manifest = publish_model(server, round, student, parents, outcome, metrics, places)
    log = [outcome.log[0] | left_out, *outcome.log[1:]]
    if role == "slm":
        writing.write_log(workspace.log("co-distill", round), _both_logs(workspace, round, log))
    else:
        writing.write_log(workspace.log(name, round), log)
    shutil.rmtree(unfinished, ignore_errors=True)
    processes.agree(manifest)
    return manifest


def _check_capture(
    workspace: Workspace, round: int, artefact: Artefact, captured: Captured, source: Source, inputs: Inputs
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
            mend = f"fedcollm co-distill --round {round} --phase capture --model {role} --overwrite"
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
