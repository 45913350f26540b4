"""co-distill, lines 15-18 of Algorithm 1: LLM and SLM teach each other on the auxiliary data (Eq. 4-6).

Reads private/server/round-t/aggregate, from round 2 private/server/round-(t-1)/llm, and private/server/auxiliary.jsonl.
Writes private/server/round-t/llm and, last, .../slm, and the log private/server/round-t/co-distill.jsonl.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.parts import files
from stages.parts.errors import Refused, UsageProblem
from stages.parts.events import Event, Report, ignore
from stages.parts.manifest import Artefact, Manifest, already_made, check_belongs, publish, read_artefact, read_manifest
from stages.parts.processes import ALONE, Processes
from stages.parts.rows import Example, Row, encode, read_rows, warn_of_unspaced
from stages.parts.vault import SERVER
from stages.parts.workspace import Workspace, require

if TYPE_CHECKING:
    from stages.parts.models import Models, Tuned
    from stages.parts.training import Outcome


@dataclass(frozen=True)
class _Inputs:
    """What one run of the stage starts from. omega is None in round 1: the LLM's adapter is made fresh."""

    theta: Artefact
    omega: Artefact | None
    rows: list[Row]
    data_sha256: str

    @property
    def parents(self) -> dict[str, str]:
        return {"aggregate": self.theta.sha256} | ({"llm": self.omega.sha256} if self.omega else {})


def co_distill(
    workspace: Workspace,
    *,
    round: int,
    overwrite: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> Manifest:
    """Train both adapters of one round and publish them. Returns the SLM's manifest.

    The SLM's folder is the commit record: written last, with the LLM's manifest among its parents. processes: all call
    this alike; the first decides and writes, and each trains its share.
    """
    if not processes.is_first:
        return _train(workspace, round, processes.agree(), overwrite, models, processes, report)
    workspace.check_round(round)
    workspace.check_step("co-distill", round)
    report(Event("stage", f"co-distill, round {round}"))
    inputs = _open(workspace, round)
    warn_of_unspaced(inputs.rows, report)
    _tell_of_unlabelled(workspace, inputs.rows, report)
    log = workspace.log("co-distill", round)
    if done := _already_made(workspace, round, inputs, overwrite):
        report(Event("note", "already done"))
        return done
    with files.held(log.with_suffix(".lock")):
        processes.agree(inputs)
        return _train(workspace, round, inputs, overwrite, models, processes, report)


def _open(workspace: Workspace, round: int) -> _Inputs:
    data = workspace.auxiliary_data
    require(data, "the server has no auxiliary data", "put JSONL rows there, or make them with `fedcollm prepare`")
    source = workspace.aggregate(round)
    require(source, f"the aggregate of round {round} is not there", f"fedcollm aggregate --round {round}")
    rows, data_sha256 = read_rows(data, unlabelled=True)
    theta = read_artefact(source)
    check_belongs(theta, workspace, reader=SERVER, stage="aggregate", round=round)
    omega = None
    if round > 1:
        earlier = workspace.llm(round - 1)
        require(
            earlier, f"the LLM's adapter of round {round - 1} is not there", f"fedcollm co-distill --round {round - 1}"
        )
        omega = read_artefact(earlier)
        check_belongs(omega, workspace, reader=SERVER, stage="co-distill", round=round - 1)
    return _Inputs(theta, omega, rows, data_sha256)


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


def _already_made(workspace: Workspace, round: int, inputs: _Inputs, overwrite: bool) -> Manifest | None:
    """The SLM's manifest if both adapters are there, whole, and from these inputs."""
    slm, llm = workspace.slm(round), workspace.llm(round)
    if overwrite or not os.path.lexists(slm):
        return None  # an LLM's adapter without it is half of a run that was stopped, and is made again
    parents = inputs.parents | ({"llm-after": read_manifest(llm)[1]} if llm.exists() else {})
    log = workspace.log("co-distill", round)
    done = already_made(slm, workspace, parents, overwrite=False, log=log, data=inputs.data_sha256)
    if done:
        read_artefact(llm)
    return done


def _train(
    workspace: Workspace,
    round: int,
    inputs: _Inputs,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    report: Report,
) -> Manifest:
    from stages.parts import adapter_files, adapters, trackers, training
    from stages.parts.models import Models, check_one_vocabulary
    from stages.parts.objective import Objective, mutual_losses

    agreement, settings = workspace.agreement, workspace.agreement.distillation
    tracking = trackers.tracking(workspace, "co-distill", round)
    models = models or Models(workspace, processes)
    slm = models.expect("slm", inputs.theta.manifest.base, f"the aggregate of round {round}")
    llm = models.get("llm")
    shared = check_one_vocabulary(slm, llm)
    examples = _examples(workspace, inputs.rows, slm, llm, shared)
    before = adapter_files.read_adapter(inputs.theta, adapters.layout(slm.model), agreement.slm.lora)
    adapters.put(slm.model, before)
    if inputs.omega is None:
        adapters.make_fresh(llm.model, workspace.seed_for("omega", 1))
    else:
        models.expect("llm", inputs.omega.manifest.base, f"the LLM's adapter of round {round - 1}")
        adapters.put(
            llm.model, adapter_files.read_adapter(inputs.omega, adapters.layout(llm.model), agreement.llm.lora)
        )
    omega = adapters.take(llm.model)

    unfinished = workspace.unfinished("co-distill", round)
    outcome = training.train(
        Objective(
            [slm, llm],
            mutual_losses(settings),
            {"slm_ft": 1.0, "slm_kd": settings.lambda_slm, "llm_ft": 1.0, "llm_kd": settings.lambda_llm},
        ),
        examples,
        training.Recipe(
            budget=settings,
            learning_rates={"slm": settings.slm_learning_rate, "llm": settings.llm_learning_rate},
            clips={"slm": settings.slm_max_grad_norm, "llm": settings.llm_max_grad_norm},
            warmup_steps=settings.warmup_steps if round == 1 else 0,
            seed=workspace.seed_for("co-distill", round),
            alternating=settings.order == "alternating",
        ),
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
    _publish(workspace, round, llm, inputs.parents, outcome, llm_norms)
    parents = inputs.parents | {"llm-after": read_manifest(workspace.llm(round))[1]}
    manifest = _publish(workspace, round, slm, parents, outcome, slm_norms)
    files.write_log(workspace.log("co-distill", round), outcome.log)
    shutil.rmtree(unfinished, ignore_errors=True)  # two processes may do so at once
    processes.agree(manifest)
    return manifest


def _examples(workspace: Workspace, rows: list[Row], slm: Tuned, llm: Tuned, shared: int) -> list[Example]:
    """The auxiliary rows as tokens of the one vocabulary. Raises Refused for a token that only one model has."""
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
    return examples


def _publish(
    workspace: Workspace, round: int, tuned: Tuned, parents: dict[str, str], outcome: Outcome, norms: dict[str, float]
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
        metrics=outcome.metrics | norms,
    )
