"""co-distill, lines 15-18 of Algorithm 1: LLM and SLM teach each other on the auxiliary data (Eq. 4-6).

Reads private/server/round-t/aggregate, from round 2 private/server/round-(t-1)/llm, and private/server/auxiliary.jsonl.
Writes private/server/round-t/llm and, last, .../slm, and the log private/server/round-t/co-distill.jsonl.

In two phases, with one model in memory at a time: `capture` writes what a model says, before the round changes it, to
private/server/round-t/captured-llm (captured-slm); `train` trains each model against the other's capture.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Literal

from stages.artefacts import turns
from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import already_made
from stages.artefacts.reading import read_manifest
from stages.artefacts.receiving import read_sound
from stages.distillation.inputs import Inputs, lock_of, omega_of, read_auxiliary, theta_of
from stages.files import writing
from stages.parties.party import Party
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

if TYPE_CHECKING:
    from stages.models.loading import Models

Phase = Literal["capture", "train"]
TOP_K = 64
"""How many tokens a capture keeps of each position, unless the command says otherwise."""


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
    server = Party.server(workspace)
    if not processes.is_first:
        return _help(server, round, phase, models, processes, report)
    workspace.check_round(round)
    workspace.check_step("co-distill", round)
    _check_phase(workspace, round, phase, model, top_k, processes)
    words = f", capture {model.upper()}" if phase == "capture" and model else ""
    if phase != "train":
        report(Event("stage", f"co-distill, round {round}{words}"))
    rows, data_sha256 = read_auxiliary(workspace, report)
    if phase == "capture":
        from stages.distillation import capture, two_phases

        assert model
        return capture.capture(server, round, model, top_k or TOP_K, rows, data_sha256, overwrite, models, report)
    inputs = Inputs(theta_of(server, round), omega_of(server, round), rows, data_sha256)
    if phase == "train":
        from stages.distillation import capture, two_phases

        roles: tuple[Role, ...] = (model,) if model else ("llm", "slm")
        made = [two_phases.train(server, round, one, inputs, overwrite, models, processes, report) for one in roles]
        processes.agree(None)
        processes.agree(made[-1])
        return made[-1]
    again = overwrite

    def look(asked: bool) -> Manifest | None:
        nonlocal again
        again = asked
        return _already_made(server, round, inputs, again)

    def make(places: turns.Places) -> Manifest:
        processes.agree((inputs, again))
        return _train(server, round, inputs, again, models, processes, places, report)

    paths = [workspace.slm(round), workspace.llm(round)]
    return turns.take(paths, lock_of(workspace, round), look=look, make=make, overwrite=overwrite, report=report)


def _help(
    server: Party, round: int, phase: Phase | None, models: Models | None, processes: Processes, report: Report
) -> Manifest:
    """What a process does that is not the first: train what that one says."""
    if phase != "train":
        inputs, again = processes.agree()
        return _train(server, round, inputs, again, models, processes, {}, report)
    from stages.distillation import two_phases

    while what := processes.agree():
        role, inputs, taught_by, parents, llm, again = what
        two_phases.train_against(
            server, round, role, inputs, taught_by, parents, llm, again, models, processes, {}, report
        )
    return Manifest.model_validate(processes.agree())


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


def _already_made(server: Party, round: int, inputs: Inputs, overwrite: bool) -> Manifest | None:
    """The SLM's manifest if both adapters are there, whole, and from these inputs, in one phase or in two."""
    workspace = server.workspace
    slm, llm = workspace.slm(round), workspace.llm(round)
    if overwrite:
        return None
    if not os.path.lexists(slm):
        _refuse_half_of_two_phases(workspace, round)
        return None  # an LLM's adapter without it is half of a run that was stopped, and is made again
    captured = {name: digest for name, digest in read_manifest(slm)[0].parents.items() if name.startswith("captured-")}
    parents = inputs.parents | captured | ({"llm-after": read_manifest(llm)[1]} if llm.exists() else {})
    log = workspace.log("co-distill", round)
    done = already_made(slm, parents, by=server, overwrite=False, log=log, data=inputs.data_sha256)
    if done:
        read_sound(llm, by=server)
    return done


def _refuse_half_of_two_phases(workspace: Workspace, round: int) -> None:
    """Raise Refused where the LLM was trained in two phases, and the SLM is still to be."""
    llm = workspace.llm(round)
    if llm.exists() and "captured-slm" in read_manifest(llm)[0].parents:
        message = f"round {round}'s LLM was trained in two phases, the SLM not yet"
        mend = f"fedcollm co-distill --round {round} --phase train; or --overwrite, to begin again in one phase"
        raise Refused(message, where=llm, mend=mend)


def _train(
    server: Party,
    round: int,
    inputs: Inputs,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    places: turns.Places,
    report: Report,
) -> Manifest:
    from stages.distillation.side import encoded, publish_model, ready, recipe, weights
    from stages.models import adapters
    from stages.models.loading import Models
    from stages.training import trackers, training
    from stages.training.objective import Objective, mutual_losses

    workspace = server.workspace
    settings = workspace.agreement.distillation
    tracking = trackers.tracking(workspace, "co-distill", round)
    models = models or Models(workspace, processes)
    models.use("slm", "llm")
    slm = ready(workspace, round, models, "slm", inputs.theta)
    llm = ready(workspace, round, models, "llm", inputs.omega)
    examples, _, left_out = encoded(workspace, inputs.rows, slm.outline, llm.outline, report)
    before, omega = adapters.take(slm.model), adapters.take(llm.model)

    unfinished = workspace.unfinished("co-distill", round)
    outcome = training.train(
        Objective([slm, llm], mutual_losses(settings), weights(workspace, "slm") | weights(workspace, "llm")),
        examples,
        recipe(workspace, round, "slm", "llm"),
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
    metrics = outcome.metrics | left_out
    publish_model(server, round, llm, inputs.parents, outcome, metrics | llm_norms, places)
    parents = inputs.parents | {"llm-after": read_manifest(workspace.llm(round))[1]}
    manifest = publish_model(server, round, slm, parents, outcome, metrics | slm_norms, places)
    writing.write_log(workspace.log("co-distill", round), [outcome.log[0] | left_out, *outcome.log[1:]])
    shutil.rmtree(unfinished, ignore_errors=True)  # which another process may be writing into
    processes.agree(manifest)
    return manifest
