"""One model's training on the public rows in a round of FedMKT, the same at a client and at the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from stages.distillation import knowing, side, teaching
from stages.distillation.learning import Learning, Pupil
from stages.distillation.lessons import Lesson
from stages.distillation.public import Public, tell_left_out
from stages.distillation.teaching import Taught
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.parties.party import Party
from stages.runtime.events import Event, Report
from stages.runtime.processes import Processes
from stages.training import trackers, training
from stages.training.recipes import Outcome, Recipe
from stages.workspace.settings import Role


class Studied(NamedTuple):
    """The model with the adapter that was trained, how that went, and what the manifest tells of it."""

    tuned: Tuned
    outcome: Outcome
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """Of one party, in one round. taught: what others have told; None: the answers alone train it."""

    party: Party
    round: int
    public: Public
    taught: Taught | None
    processes: Processes
    report: Report

    @property
    def stage(self) -> Literal["co-distill", "client-distill"]:
        """Of its checkpoints, and with trackers."""
        return "co-distill" if self.party.is_server else "client-distill"

    @property
    def client(self) -> int | None:
        """Whose it is; None: the server's."""
        return None if self.party.is_server else self.party.number

    def take(self, tuned: Tuned, losses: np.ndarray | None, parents: Mapping[str, str], again: bool) -> Studied:
        """Choose who teaches each row, and train the adapter in place. Raises as training.train does.

        losses: how well the model knows each row, float64 [rows]; None: it is asked. parents: what the adapter is made
        from.
        """
        own = self.taught.own if self.taught else None
        examples = knowing.read_by(self.public, tuned.outline, self.party.workspace, own)
        before, left_out = adapters.take(tuned.model), tell_left_out(self.public, examples, self.report)
        outcome, counts = self._train(tuned, examples, losses, {"data": self.public.sha256, **parents}, again)
        norms = adapters.check_trained(before, adapters.take(tuned.model))
        return Studied(tuned, outcome, {**outcome.metrics, **norms, **counts, **left_out})

    def _train(
        self,
        tuned: Tuned,
        examples: Sequence[Pupil],
        losses: np.ndarray | None,
        inputs: Mapping[str, str],
        again: bool,
    ) -> tuple[Outcome, dict[str, float]]:
        """Also returns how many rows each teacher has won."""
        workspace, role = self.party.workspace, tuned.role
        settings, machine = workspace.agreement.distillation, workspace.machine
        lessons: list[Lesson] = []
        shares: list[np.ndarray] = []
        counts: dict[str, float] = {}
        if self.taught:
            lessons = self.taught.lessons
            if losses is None:
                rows, count = machine.rows_at_once(settings), len(self.public.rows)
                losses = knowing.losses_of(tuned, examples, rows, count, self.report)
            shares, counts = teaching.choose(workspace, losses, lessons, self._whose(role), self.report)
        outcome = training.train(
            Learning(tuned, lessons, shares, settings, side.weights(workspace, role)),
            examples,
            self._recipe(role),
            machine=machine,
            folder=workspace.unfinished(self.stage, self.round, self.client),
            inputs={
                "agreement": workspace.agreement_sha256,
                **inputs,
                f"{role}_base": tuned.identity.weights_sha256,
                "dtype": tuned.dtype,
            },
            overwrite=again,
            tracking=trackers.tracking(workspace, self.stage, self.round, self.client),
            processes=self.processes,
            report=self.report,
        )
        self.report(Event("note", outcome.change))
        return outcome, counts

    def _whose(self, role: Role) -> str:
        return "the LLM" if role == "llm" else f"client {self.client}'s model"

    def _recipe(self, role: Role) -> Recipe:
        """As co-distill's for that model, with a seed of the party's own."""
        workspace = self.party.workspace
        seed = workspace.seed_for(self.stage, self.round, self.client or 0)
        return replace(side.recipe(workspace, self.round, role), seed=seed, alternating=False)
