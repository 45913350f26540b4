"""co-distill, lines 15-18 of Algorithm 1: LLM and SLM teach each other on the auxiliary data (Eq. 4-6).

Reads private/server/round-t/aggregate, from round 2 private/server/round-(t-1)/llm, and private/server/auxiliary.jsonl.
Writes private/server/round-t/llm and, last, .../slm, and the log private/server/round-t/co-distill.jsonl.

In two phases, with one model in memory at a time: `capture` writes what a model says, before the round changes it, to
private/server/round-t/captured-llm (captured-slm); `train` trains each model against the other's capture.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.parts import files, turns
from stages.parts.config import Role
from stages.parts.errors import NotReady, Refused, UsageProblem
from stages.parts.events import Event, Report, ignore
from stages.parts.manifest import Artefact, Manifest, already_made, check_belongs, publish, read_artefact, read_manifest
from stages.parts.processes import ALONE, Processes
from stages.parts.rows import LARGEST_DATA_BYTES, Example, Row, encode, read_rows, warn_of_unspaced
from stages.parts.vault import SERVER
from stages.parts.workspace import AGREEMENT, CAPTURE, Workspace, require

if TYPE_CHECKING:
    from stages.parts.capture_files import Captured, Source
    from stages.parts.models import Models, Outline, Tuned
    from stages.parts.training import Outcome, Recipe

Phase = Literal["capture", "train"]
OTHER: dict[Role, Role] = {"slm": "llm", "llm": "slm"}
TOP_K = 64
"""How many tokens a capture keeps of each position, unless the command says otherwise."""


@dataclass(frozen=True)
class _Inputs:
    """What one run of the stage starts from. omega is None in round 1: the LLM's adapter is made fresh."""

    theta: Artefact
    omega: Artefact | None
    rows: list[Row]
    data_sha256: str

    @property
    def parents(self) -> dict[str, str]:
        return {"aggregate": self.theta.sha256} | self.parents_of("llm")

    def parents_of(self, role: Role) -> dict[str, str]:
        """The adapter that this model starts from."""
        if role == "slm":
            return {"aggregate": self.theta.sha256}
        return {"llm": self.omega.sha256} if self.omega else {}


def co_distill(
    workspace: Workspace,
    *,
    round: int,
    phase: Phase | None = None,
    model: Role | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> Manifest:
    """Train both adapters of one round and publish them. Returns the SLM's manifest.

    The SLM's folder is the commit record: written last, with the LLM's manifest among its parents.
    phase: one of two, each with one model in memory at a time; it returns the manifest of what it made last. capture
    needs a model, train takes the LLM and then the SLM without one. top_k: how many tokens of each position are kept.
    processes: all call this alike; the first decides and writes, and each trains its share.
    """
    if not processes.is_first:
        return _help(workspace, round, phase, models, processes, report)
    workspace.check_round(round)
    workspace.check_step("co-distill", round)
    _check_phase(workspace, round, phase, model, top_k, processes)
    words = f", capture {model.upper()}" if phase == "capture" and model else ""
    if phase != "train":
        report(Event("stage", f"co-distill, round {round}{words}"))
    rows, data_sha256 = _rows(workspace, report)
    if phase == "capture":
        assert model
        return _capture(workspace, round, model, top_k or TOP_K, rows, data_sha256, overwrite, models, report)
    inputs = _Inputs(_theta(workspace, round), _omega(workspace, round), rows, data_sha256)
    if phase == "train":
        roles: tuple[Role, ...] = (model,) if model else ("llm", "slm")
        made = [_train_one(workspace, round, one, inputs, overwrite, models, processes, report) for one in roles]
        processes.agree(None)
        return made[-1]
    again = overwrite

    def look(asked: bool) -> Manifest | None:
        nonlocal again
        again = asked
        return _already_made(workspace, round, inputs, again)

    def make(places: turns.Places) -> Manifest:
        processes.agree((inputs, again))
        return _train(workspace, round, inputs, again, models, processes, places, report)

    paths = [workspace.slm(round), workspace.llm(round)]
    return turns.take(paths, _lock(workspace, round), look=look, make=make, overwrite=overwrite, report=report)


def _help(
    workspace: Workspace, round: int, phase: Phase | None, models: Models | None, processes: Processes, report: Report
) -> Manifest:
    """What a process does that is not the first: train what that one says."""
    if phase != "train":
        inputs, again = processes.agree()
        return _train(workspace, round, inputs, again, models, processes, {}, report)
    made: Manifest | None = None
    while what := processes.agree():
        role, inputs, taught_by, parents, llm, again = what
        made = _train_against(
            workspace, round, role, inputs, taught_by, parents, llm, again, models, processes, {}, report
        )
        gc.collect()
    assert made  # or the first has ended, and this one with it
    return made


def _lock(workspace: Workspace, round: int) -> Path:
    """Held by whoever trains in a round, in one phase or in two."""
    return workspace.log("co-distill", round).with_suffix(".lock")


def _check_phase(
    workspace: Workspace,
    round: int,
    phase: Phase | None,
    model: Role | None,
    top_k: int | None,
    processes: Processes,
) -> None:
    """Raise UsageProblem for options that do not go together."""
    capture = f"fedcollm co-distill --round {round} --phase capture --model llm; then --model slm; then --phase train"
    if phase is None and (model or top_k):
        raise UsageProblem("--model and --top-k are for co-distill in two phases", mend=capture)
    if phase == "capture" and model is None:
        raise UsageProblem("one model is captured at a time: which?", mend=capture)
    if phase == "capture" and processes.count > 1:
        raise UsageProblem("capturing takes one process: it trains nothing", mend="give the command without torchrun")
    if phase == "train" and top_k:
        raise UsageProblem("--top-k is for the first phase: training takes what was captured", mend=capture)
    if phase and workspace.agreement.distillation.order == "alternating":
        message = 'order "alternating" has no second phase: there the LLM learns from the SLM as it has just become'
        mend = f'agree on distillation.order = "simultaneous", or `fedcollm co-distill --round {round}` in one phase'
        raise UsageProblem(message, where=workspace.root / AGREEMENT, mend=mend)


# --- what it starts from


def _rows(workspace: Workspace, report: Report) -> tuple[list[Row], str]:
    """The auxiliary rows and their digest."""
    data = workspace.auxiliary_data
    require(data, "the server has no auxiliary data", "put JSONL rows there, or make them with `fedcollm prepare`")
    rows, data_sha256 = read_rows(data, unlabelled=True)
    warn_of_unspaced(rows, report)
    _tell_of_unlabelled(workspace, rows, report)
    return rows, data_sha256


def _theta(workspace: Workspace, round: int) -> Artefact:
    """What the SLM starts from."""
    source = workspace.aggregate(round)
    require(source, f"the aggregate of round {round} is not there", f"fedcollm aggregate --round {round}")
    theta = read_artefact(source)
    check_belongs(theta, workspace, reader=SERVER, stage="aggregate", round=round)
    return theta


def _omega(workspace: Workspace, round: int) -> Artefact | None:
    """What the LLM starts from; None in round 1."""
    if round == 1:
        return None
    earlier = workspace.llm(round - 1)
    require(earlier, f"the LLM's adapter of round {round - 1} is not there", f"fedcollm co-distill --round {round - 1}")
    omega = read_artefact(earlier)
    check_belongs(omega, workspace, reader=SERVER, stage="co-distill", round=round - 1)
    return omega


def _tell_of_unlabelled(workspace: Workspace, rows: list[Row], report: Report) -> None:
    """Tell how many rows only distillation learns from. Raises UsageProblem if that leaves a model without a loss."""
    unlabelled = sum(row.completion is None for row in rows)
    if unlabelled:
        report(Event("note", f"{unlabelled} of {len(rows)} auxiliary rows are unlabelled: distillation alone"))
    settings = workspace.agreement.distillation
    for role, weight in (("slm", settings.lambda_slm), ("llm", settings.lambda_llm)):
        if unlabelled == len(rows) and weight == 0:
            message = f"nothing would teach the {role.upper()}: no auxiliary row has a completion, lambda_{role} is 0"
            mend = f"add rows with a completion to it, or agree on distillation.lambda_{role} = 1.0"
            raise UsageProblem(message, where=workspace.auxiliary_data, mend=mend)


def _ready(workspace: Workspace, round: int, models: Models, role: Role, start: Artefact | None) -> Tuned:
    """One model with the adapter that it starts from: start, or in round 1 the LLM's own, made fresh."""
    from stages.parts import adapter_files, adapters

    tuned = models.get(role)
    if start is None:
        adapters.make_fresh(tuned.model, workspace.seed_for("omega", 1))
        return tuned
    whose = f"the aggregate of round {round}" if role == "slm" else f"the LLM's adapter of round {round - 1}"
    models.expect(role, start.manifest.base, whose)
    lora = workspace.agreement.model_of(role).lora
    adapters.put(tuned.model, adapter_files.read_adapter(start, adapters.layout(tuned.model), lora))
    return tuned


def _examples(workspace: Workspace, rows: list[Row], slm: Outline, llm: Outline) -> tuple[list[Example], int]:
    """The auxiliary rows as tokens of the one vocabulary, and its size. Refused for a token that only one model has."""
    from stages.parts.models import check_one_vocabulary

    shared = check_one_vocabulary(slm, llm)
    examples = encode(
        rows,
        slm.tokenizer,
        max_length=workspace.agreement.distillation.max_length,
        context=min(slm.context, llm.context),
        too_long=workspace.agreement.data.too_long,
        path=workspace.auxiliary_data,
    )
    largest = max(max(example.input_ids) for example in examples)
    if largest >= shared:
        message = f"the auxiliary data uses token {largest}, but the models share only the first {shared}"
        raise Refused(message, where=workspace.auxiliary_data, mend="take two models with one tokenizer")
    return examples, shared


# --- in one phase


def _already_made(workspace: Workspace, round: int, inputs: _Inputs, overwrite: bool) -> Manifest | None:
    """The SLM's manifest if both adapters are there, whole, and from these inputs, in one phase or in two."""
    slm, llm = workspace.slm(round), workspace.llm(round)
    if overwrite:
        return None
    if not os.path.lexists(slm):
        _refuse_half_of_two_phases(workspace, round)
        return None  # an LLM's adapter without it is half of a run that was stopped, and is made again
    captured = {name: digest for name, digest in read_manifest(slm)[0].parents.items() if name.startswith("captured-")}
    parents = inputs.parents | captured | ({"llm-after": read_manifest(llm)[1]} if llm.exists() else {})
    log = workspace.log("co-distill", round)
    done = already_made(slm, workspace, parents, overwrite=False, log=log, data=inputs.data_sha256)
    if done:
        read_artefact(llm)
    return done


def _refuse_half_of_two_phases(workspace: Workspace, round: int) -> None:
    """Raise Refused where the LLM was trained in two phases, and the SLM is still to be."""
    llm = workspace.llm(round)
    if llm.exists() and "captured-slm" in read_manifest(llm)[0].parents:
        message = f"round {round}'s LLM was trained in two phases, the SLM not yet"
        mend = f"fedcollm co-distill --round {round} --phase train; or --overwrite, to begin again in one phase"
        raise Refused(message, where=llm, mend=mend)


def _train(
    workspace: Workspace,
    round: int,
    inputs: _Inputs,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    places: turns.Places,
    report: Report,
) -> Manifest:
    from stages.parts import adapters, trackers, training
    from stages.parts.models import Models
    from stages.parts.objective import Objective, mutual_losses

    settings = workspace.agreement.distillation
    tracking = trackers.tracking(workspace, "co-distill", round)
    models = models or Models(workspace, processes)
    models.use("slm", "llm")
    slm = _ready(workspace, round, models, "slm", inputs.theta)
    llm = _ready(workspace, round, models, "llm", inputs.omega)
    examples, _ = _examples(workspace, inputs.rows, slm.outline, llm.outline)
    before, omega = adapters.take(slm.model), adapters.take(llm.model)

    unfinished = workspace.unfinished("co-distill", round)
    outcome = training.train(
        Objective([slm, llm], mutual_losses(settings), _weights(workspace, "slm") | _weights(workspace, "llm")),
        examples,
        _recipe(workspace, round, "slm", "llm"),
        machine=workspace.machine,
        folder=unfinished,
        inputs={
            "agreement": workspace.agreement_sha256,
            "data": inputs.data_sha256,
            **inputs.parents,
            "slm_base": slm.identity.weights_sha256,
            "llm_base": llm.identity.weights_sha256,
            "dtype": f"{slm.dtype}, {llm.dtype}",
        },
        overwrite=overwrite,
        tracking=tracking,
        processes=processes,
        report=report,
    )
    report(Event("note", outcome.change))
    llm_norms = adapters.check_trained(omega, adapters.take(llm.model))
    slm_norms = adapters.check_trained(before, adapters.take(slm.model))
    if not processes.is_first:
        return Manifest.model_validate(processes.agree())
    _publish(workspace, round, llm, inputs.parents, outcome, outcome.metrics | llm_norms, places)
    parents = inputs.parents | {"llm-after": read_manifest(workspace.llm(round))[1]}
    manifest = _publish(workspace, round, slm, parents, outcome, outcome.metrics | slm_norms, places)
    files.write_log(workspace.log("co-distill", round), outcome.log)
    shutil.rmtree(unfinished, ignore_errors=True)  # which another process may be writing into
    processes.agree(manifest)
    return manifest


def _recipe(workspace: Workspace, round: int, *roles: Role) -> Recipe:
    from stages.parts.training import Recipe

    settings = workspace.agreement.distillation
    rates = {"slm": settings.slm_learning_rate, "llm": settings.llm_learning_rate}
    clips = {"slm": settings.slm_max_grad_norm, "llm": settings.llm_max_grad_norm}
    return Recipe(
        budget=settings,
        learning_rates={role: rates[role] for role in roles},
        clips={role: clips[role] for role in roles},
        warmup_steps=settings.warmup_steps if round == 1 else 0,
        seed=workspace.seed_for("co-distill", round),
        alternating=settings.order == "alternating",
    )


def _weights(workspace: Workspace, role: Role) -> dict[str, float]:
    """What each term of this model's loss counts."""
    settings = workspace.agreement.distillation
    return {f"{role}_ft": 1.0, f"{role}_kd": settings.lambda_slm if role == "slm" else settings.lambda_llm}


def _publish(
    workspace: Workspace,
    round: int,
    tuned: Tuned,
    parents: dict[str, str],
    outcome: Outcome,
    metrics: dict[str, float],
    places: turns.Places,
) -> Manifest:
    from stages.parts import adapters

    folder = workspace.slm(round) if tuned.role == "slm" else workspace.llm(round)
    return publish(
        folder,
        adapters.as_files(tuned.model, workspace.agreement.model_of(tuned.role).lora),
        workspace,
        stage="co-distill",
        role=tuned.role,
        round=round,
        parents=parents,
        base=tuned.identity,
        parameters=adapters.count(tuned.model),
        seed=workspace.seed_for("co-distill", round),
        dtype=tuned.dtype,
        steps=outcome.steps,
        examples=outcome.examples,
        tokens=outcome.tokens,
        metrics=metrics,
        over=places[folder],
    )


# --- in two phases: capture


def _capture(
    workspace: Workspace,
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
    start = _theta(workspace, round) if role == "slm" else _omega(workspace, round)
    parents = {start.path.name: start.sha256} if start else {}
    name, folder = f"capture-{role}", workspace.captured(round, role)
    log = workspace.log(name, round)
    again = overwrite

    def look(asked: bool) -> Manifest | None:
        nonlocal again
        again = asked
        done = already_made(folder, workspace, parents, overwrite=again, log=log, data=data_sha256)
        if done:
            _check_top_k(workspace, done, top_k)
        return done

    def make(places: turns.Places) -> Manifest:
        from stages.parts import adapters, capture_files, captures
        from stages.parts.models import Models

        loaded = models or Models(workspace)
        loaded.use(role)
        outlines = {one: loaded.outline(one) for one in OTHER}
        examples, shared = _examples(workspace, rows, outlines["slm"], outlines["llm"])
        source = capture_files.Source(
            data_sha256=data_sha256,
            rows_sha256=capture_files.rows_sha256(examples),
            temperature=workspace.agreement.distillation.temperature,
            vocabulary=shared,
            top_k=top_k,
        )
        teacher = _ready(workspace, round, loaded, role, start)
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
        content = capture_files.capture_bytes(captured)
        words = f"{len(content)} bytes; the {captured.tokens.shape[1]} likeliest tokens of {len(kept)} positions have"
        report(Event("note", f"{words} {100 * float(kept.mean()):.4g} % of the probability, at least {kept.min():.3g}"))
        manifest = publish(
            folder,
            {CAPTURE: content},
            workspace,
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
            metrics={"top_k": float(top_k), "kept": float(kept.mean()), "kept_least": float(kept.min())},
            over=places[folder],
        )
        files.write_log(log, [{"inputs": inputs}, {"wall_s": time.monotonic() - started}])
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


# --- in two phases: train


def _train_one(
    workspace: Workspace,
    round: int,
    role: Role,
    inputs: _Inputs,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    report: Report,
) -> Manifest:
    """Train one model against the other's capture and publish it; the SLM comes last, as the commit record."""
    teacher = OTHER[role]
    place = workspace.captured(round, teacher)
    capture = f"fedcollm co-distill --round {round} --phase capture --model {teacher}"
    target = workspace.slm(round) if role == "slm" else workspace.llm(round)
    taught_by, parents = None, inputs.parents
    if not target.exists() or place.exists():  # what served a finished model may have been cleared away
        require(place, f"the {teacher.upper()} of round {round} is not captured", capture)
        taught_by = read_artefact(place)
        check_belongs(taught_by, workspace, reader=SERVER, stage="capture", round=round)
        parents |= {place.name: taught_by.sha256}
    elif before := read_manifest(target)[0].parents.get(place.name):
        parents |= {place.name: before}
    llm = _llm_after(workspace, round, taught_by) if role == "slm" else None
    parents |= {"llm-after": llm.sha256} if llm else {}
    name = "co-distill" if role == "slm" else "co-distill-llm"
    log = workspace.log(name, round)
    report(Event("stage", f"co-distill, round {round}, train {role.upper()}"))
    again = overwrite

    def look(asked: bool) -> Manifest | None:
        nonlocal again
        again = asked or (role == "llm" and _is_half_of_one_phase(workspace, round))
        return already_made(target, workspace, parents, overwrite=again, log=log, data=inputs.data_sha256)

    def make(places: turns.Places) -> Manifest:
        if taught_by is None:
            message = f"the {teacher.upper()} of round {round} is not captured any more"
            raise NotReady(message, where=place, mend=capture)
        processes.agree((role, inputs, taught_by, parents, llm, again))
        return _train_against(
            workspace, round, role, inputs, taught_by, parents, llm, again, models, processes, places, report
        )

    lock = _lock(workspace, round)
    manifest = turns.take([target], lock, look=look, make=make, overwrite=overwrite, report=report)
    gc.collect()  # modules refer to each other in circles: before the next model is loaded, this one is to be gone
    return manifest


def _llm_after(workspace: Workspace, round: int, captured: Artefact | None) -> Artefact:
    """The LLM as it was trained in two phases in this round; by the base that was captured."""
    place, mend = workspace.llm(round), f"fedcollm co-distill --round {round} --phase train --model llm"
    require(place, f"the LLM of round {round} is not trained: the SLM comes last", mend)
    llm = read_artefact(place)
    check_belongs(llm, workspace, reader=SERVER, stage="co-distill", round=round)
    if "captured-slm" not in llm.manifest.parents:
        raise Refused(f"round {round}'s LLM was trained in one phase", where=place, mend=f"{mend} --overwrite")
    if captured and llm.manifest.base != captured.manifest.base:
        message = f"{workspace.shown(captured.path)} is of another LLM than {workspace.shown(place)}"
        raise Refused(message, where=captured.path, mend="capture again with --overwrite, with the same base")
    return llm


def _is_half_of_one_phase(workspace: Workspace, round: int) -> bool:
    """Whether an LLM's adapter is there that a run in one phase left behind when it was stopped."""
    llm = workspace.llm(round)
    is_half = llm.exists() and not os.path.lexists(workspace.slm(round))
    return is_half and "captured-slm" not in read_manifest(llm)[0].parents


def _train_against(
    workspace: Workspace,
    round: int,
    role: Role,
    inputs: _Inputs,
    taught_by: Artefact,
    parents: dict[str, str],
    llm: Artefact | None,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    places: turns.Places,
    report: Report,
) -> Manifest:
    from stages.parts import adapters, capture_files, captures, trackers, training
    from stages.parts.models import Models

    content = taught_by.contents.pop(CAPTURE)  # not kept beside what is made of it: it may be large
    captured = capture_files.parse_capture(content, taught_by.path / CAPTURE)
    del content
    models = models or Models(workspace, processes)
    models.use(role)
    outlines = {one: models.outline(one) for one in OTHER}
    examples, shared = _examples(workspace, inputs.rows, outlines["slm"], outlines["llm"])
    source = capture_files.Source(
        data_sha256=inputs.data_sha256,
        rows_sha256=capture_files.rows_sha256(examples),
        temperature=workspace.agreement.distillation.temperature,
        vocabulary=shared,
        top_k=captured.source.top_k,
    )
    _check_capture(workspace, round, taught_by, captured, source, inputs)
    student = _ready(workspace, round, models, role, inputs.theta if role == "slm" else inputs.omega)
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
        captures.TaughtObjective(student, captured, workspace.agreement.distillation, _weights(workspace, role)),
        captures.taught(examples, captured),
        _recipe(workspace, round, role),
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
    manifest = _publish(workspace, round, student, parents, outcome, outcome.metrics | earlier | norms, places)
    if role == "slm":
        files.write_log(workspace.log("co-distill", round), _both_logs(workspace, round, outcome))
    else:
        files.write_log(workspace.log(name, round), outcome.log)
    shutil.rmtree(unfinished, ignore_errors=True)
    processes.agree(manifest)
    return manifest


def _check_capture(
    workspace: Workspace, round: int, artefact: Artefact, captured: Captured, source: Source, inputs: _Inputs
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


def _both_logs(workspace: Workspace, round: int, slm: Outcome) -> list[dict[str, Any]]:
    """The log of the round, as in one phase: the LLM's and the SLM's losses of every step side by side."""
    log = files.read(workspace.log("co-distill-llm", round), limit_bytes=LARGEST_DATA_BYTES)
    begun, *steps, ended = slm.log
    other_begun, *others, other_ended = map(files.parse_json, log.splitlines())
    both = [{**other, **step} for step, other in zip(steps, others, strict=True)]
    inputs = {**other_begun["inputs"], **begun["inputs"]}
    return [{"inputs": inputs}, *both, {"wall_s": ended["wall_s"] + other_ended["wall_s"]}]
