"""Which model a command is about: the SLM, the LLM or the average at the server, or one client's SLM, after a round."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from stages.artefacts.manifest import Stage
from stages.artefacts.reading import Artefact, carries_residual, read_manifest
from stages.artefacts.receiving import received
from stages.artefacts.residual_sizes import is_agreed
from stages.parties.names import number_of
from stages.parties.party import Onlooker, Party, Reader
from stages.runtime.errors import Problem, Refused, UsageProblem
from stages.workspace.commands import Command
from stages.workspace.names import CLIENT, MANIFEST, RESIDUAL, THETA_FILES
from stages.workspace.paths import Workspace

Subject = Literal["slm", "llm", "aggregate"]
"""The server's: "slm" and "llm" after co-distill, "aggregate" the SLM before it."""

OWN_EXAMPLES, OWN_TOKENS = "own_examples", "own_tokens"
"""Metrics of an adapter that learned on public rows and is averaged: how many of its own its client saw before."""


def subject_of(model: Subject, client: int | None) -> str:
    """The subject's name on disk: "slm", "llm", "aggregate", or "client-2". A client has an SLM only."""
    if client is None:
        return model
    if model != "slm":
        mend = f"give --client {client} alone, or --model {model}"
        raise UsageProblem("a client has an SLM only: --client and --model exclude each other", mend=mend)
    return f"client-{client}"


def is_subject(name: str) -> bool:
    """Whether a name on disk is one of a subject."""
    return re.fullmatch(rf"slm|llm|aggregate|{CLIENT}", name) is not None


def folder_of(workspace: Workspace, round: int, subject: str) -> Path:
    """Where the adapter of a subject lies after a round."""
    if subject.startswith("client-"):
        return workspace.client_adapter(round, number_of(subject))
    return {"slm": workspace.slm, "llm": workspace.llm, "aggregate": workspace.aggregate}[subject](round)


def is_of_another(workspace: Workspace, round: int | None, subject: str, manifest_sha256: object) -> bool:
    """Whether what was measured is of another adapter than lies there now; of one that is not here nothing is said.

    round: None where it is of the base alone.
    """
    if round is None:
        return False
    try:
        return read_manifest(folder_of(workspace, round, subject))[1] != manifest_sha256
    except (Problem, OSError):
        return False


def scored_by(round: int | None, subject: str) -> Command:
    """The command that scores a subject after a round; without a round, its base alone."""
    what = Command("evaluate", zero_shot=round is None, round=round)
    if subject.startswith("client-"):
        return what.also(client=number_of(subject))
    return what.also(model=subject)


def adapter_of(workspace: Workspace, model: Subject, round: int, client: int | None) -> Artefact:
    """The subject's adapter after a round, every byte checked. Raises as received does."""
    workspace.check_round(round)
    stage: Stage
    mend: object
    if client is not None:
        workspace.check_client(client)
        stage = client_stage(workspace)
        mend = Command(stage, client=client, round=round)
    else:
        step: Literal["aggregate", "co-distill"] = "aggregate" if model == "aggregate" else "co-distill"
        if model == "slm" and not workspace.agreement.federation.averages:
            message = f"method {workspace.agreement.federation.method} makes no SLM at the server"
            average = ", --model aggregate" if workspace.agreement.averages else ""
            raise UsageProblem(message, mend=f"give --client k, whose own model it is{average}, or --model llm")
        if model == "slm" and not workspace.agreement.federation.distils:
            message = (
                f"method {workspace.agreement.federation.method} ends a round with the average: nothing is distilled"
            )
            raise UsageProblem(message, mend="give --model aggregate, or --client k for what a client trained")
        workspace.check_step(step, round)
        stage, mend = step, Command(step, round=round)
        if not workspace.auxiliary_data.exists():
            mend = f"the server has it; there: {Command('export', round=round, model=model)}"
    folder = folder_of(workspace, round, subject_of(model, client))
    missing = f"there is no adapter at {workspace.shown(folder)}", mend
    who = Onlooker(workspace)
    found = received(folder, by=who, stage=stage, round=round, client=client, missing=missing, only=THETA_FILES)
    return _standing_on(found, who)


def _standing_on(adapter: Artefact, by: Reader) -> Artefact:
    """An adapter with the file of what it stands on: a client's was trained on that of its broadcast.

    Raises as received does where the broadcast is not here, and Refused where it is another than the client began with.
    """
    manifest, workspace = adapter.manifest, by.workspace
    if not is_agreed(workspace.agreement) or manifest.role != "slm" or carries_residual(manifest):
        return adapter
    round, place = manifest.round, workspace.broadcast(manifest.round)
    mend = f"on the server: {Command('broadcast', round=round)}; then carry exchange/ here"
    missing = f"the broadcast of round {round} is not there, on whose {RESIDUAL} this adapter stands", mend
    theta = received(place, by=by, stage="broadcast", round=round, missing=missing, only=[RESIDUAL])
    if manifest.parents.get("broadcast") != theta.sha256:
        message = f"{workspace.shown(adapter.path)} stands on the {RESIDUAL} of another broadcast than the one here"
        raise Refused(message, where=adapter.path / MANIFEST, mend=mend)
    return replace(adapter, contents=adapter.contents | theta.contents)


def theta_of(party: Party, round: int) -> Artefact | None:
    """What a client starts from: theta^t; where nothing is averaged, from round 2 on, its own of the round before.

    None in round 1 where clients have models of their own: each makes an adapter for itself.
    """
    workspace, client = party.workspace, party.number
    if round == 1 and not workspace.agreement.is_of_one_slm:
        return None
    if workspace.agreement.averages or round == 1:
        mend = f"on the server: {Command('broadcast', round=round)}; then carry exchange/ here"
        missing = f"the broadcast of round {round} is not there", mend
        return received(workspace.broadcast(round), by=party, stage="broadcast", round=round, missing=missing)
    own, before = workspace.client_adapter(round - 1, client), round - 1
    stage = client_stage(workspace)
    absent = f"client {client}'s adapter of round {before} is not there", Command(stage, client=client, round=before)
    return received(own, by=party, stage=stage, round=before, client=client, missing=absent)


def trained_by(client: Party, round: int) -> Artefact:
    """What client-train has made in a round, before the client learns on public rows.

    Raises as received does, and Refused where adapters are averaged and this one began with another broadcast than lies
    here: the server would refuse what is made of it.
    """
    workspace, number = client.workspace, client.number
    missing = f"client {number} has not trained in round {round}", Command("client-train", client=number, round=round)
    place = workspace.client_trained(round, number)
    trained = received(place, by=client, stage="client-train", round=round, client=number, missing=missing)
    begun_by = trained.manifest.parents.get("broadcast")
    is_compared = workspace.agreement.averages and workspace.broadcast(round).exists()
    if is_compared and begun_by != read_manifest(workspace.broadcast(round))[1]:
        message = f"client {number} has trained in round {round} from another broadcast than the one here"
        raise Refused(message, where=place, mend=missing[1].also(overwrite=True))
    return trained


def client_stage(workspace: Workspace) -> Literal["client-train", "client-distill"]:
    """The step that makes the adapter which a client ends a round with."""
    return "client-distill" if workspace.agreement.federation.learns_in_public else "client-train"
