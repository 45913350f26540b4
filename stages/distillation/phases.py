"""One phase or two: which options go together, and what a round's folders show of how it was done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from stages.artefacts.manifest import Manifest
from stages.artefacts.publishing import already_made
from stages.artefacts.reading import read_manifest
from stages.artefacts.receiving import read_sound
from stages.artefacts.steps import Computed, Opened, Step
from stages.distillation.inputs import Inputs
from stages.parties.party import Party
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.processes import Processes
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.models.tuned import Tuned
    from stages.training.recipes import Outcome

Phase = Literal["capture", "train"]


@dataclass(frozen=True, kw_only=True)
class Distilling(Step[Opened, Computed, Manifest]):
    """A step of a round's co-distillation. models: those that are loaded already."""

    round: int
    models: Models | None

    @property
    def name(self) -> str:
        """Of its checkpoints, and with trackers."""
        return "co-distill"


class Trained(NamedTuple):
    """Both models with the adapters that were trained, how that went, and what each manifest tells."""

    slm: Tuned
    llm: Tuned
    outcome: Outcome
    norms: dict[Role, dict[str, float]]
    left_out: dict[str, float]

    def metrics(self, role: Role) -> dict[str, float]:
        """What one model's manifest tells: the losses of both, and the norms of its own update."""
        return self.outcome.metrics | self.left_out | self.norms[role]


def check_phase(
    workspace: Workspace,
    round: int,
    *,
    phase: Phase | None,
    model: Role | None,
    top_k: int | None,
    processes: Processes,
) -> None:
    """Raise UsageProblem for a round that there is not, and for options that do not go together."""
    workspace.check_round(round)
    workspace.check_step("co-distill", round)
    first = Command("co-distill", round=round, phase="capture", model="llm")
    capture = f"{first}; then --model slm; then --phase train"
    if phase is None and (model or top_k):
        raise UsageProblem("--model and --top-k are for co-distill in two phases", mend=capture)
    if phase == "capture" and model is None:
        raise UsageProblem("one model is captured at a time: which?", mend=capture)
    if phase == "capture" and processes.count > 1:
        raise UsageProblem("capturing takes one process: it trains nothing", mend="give the command without torchrun")
    if phase == "train" and top_k:
        raise UsageProblem("--top-k is for the first phase: training takes what was captured", mend=capture)
    if phase and workspace.agreement.federation.clients_tell:
        message = "method fedmkt has no phases: each model is trained by itself in any case"
        raise UsageProblem(message, mend=Command("co-distill", round=round))
    if phase and workspace.agreement.distillation.order == "alternating":
        message = 'order "alternating" has no second phase: there the LLM learns from the SLM as it has just become'
        mend = f'agree on distillation.order = "simultaneous", or `{Command("co-distill", round=round)}` in one phase'
        raise UsageProblem(message, where=workspace.root / AGREEMENT, mend=mend)


def done_before(server: Party, round: int, inputs: Inputs, *, overwrite: bool) -> Manifest | None:
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
        second = Command("co-distill", round=round, phase="train")
        mend = f"{second}; or --overwrite, to begin again in one phase"
        raise Refused(message, where=llm, mend=mend)
