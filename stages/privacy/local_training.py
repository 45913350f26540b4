"""How a client trains on its rows, and what may be told of it: as it is, or with differential privacy of each row.

A learner is chosen once, by [privacy], and is asked the same either way. Another way to train is a class, and a row in
LEARNERS.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stages.accounting import budget
from stages.artefacts.manifest import PrivacyClaim
from stages.data.examples import Example, encode, tell_left_out
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.data.spacing import warn_of_spacing
from stages.parties.party import Party
from stages.progress.staleness import warn_of_stale_rows
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report
from stages.runtime.processes import Processes
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.models.tuned import Tuned
    from stages.training.recipes import Outcome, Recipe

Metrics = Mapping[str, float]


class Trained(NamedTuple):
    """The SLM with the adapter that was trained, how that went, and what is told of its update and of the rows."""

    slm: Tuned
    outcome: Outcome
    norms: Metrics
    left_out: Metrics


class Told(NamedTuple):
    """What the manifest says of a training: its seed, its metrics, what it claims of privacy; and the log's head."""

    seed: int | None
    metrics: Metrics
    privacy: PrivacyClaim | None
    log: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A client in one round, which trains as Eq. 3 says."""

    party: Party
    round: int
    resets: bool
    processes: Processes
    report: Report

    @property
    def workspace(self) -> Workspace:
        """The client's."""
        return self.party.workspace

    @property
    def client(self) -> int:
        """The client's number."""
        return self.party.number

    @property
    def unfinished(self) -> Path:
        """Where its checkpoints are."""
        return self.workspace.unfinished("client-train", self.round, self.client)

    def rows(self) -> tuple[list[Row], str]:
        """The client's rows, and the digest of their file. Raises NotReady where there are none."""
        data = self.workspace.client_data(self.client)
        make = f"in a simulation, `{Command('prepare')}` makes them"
        mend = f"on client {self.client}'s machine, put JSONL rows there; {make}"
        require(data, f"client {self.client} has no training data here", mend)
        rows, data_sha256 = read_rows(data)
        warn_of_spacing(rows, self.report)
        warn_of_stale_rows(self.workspace, self.report)
        return rows, data_sha256

    def check(self, rows: Sequence[Row], again: bool) -> None:
        """Refuse what cannot train, before a model is loaded. again: whether a stopped run is passed over."""
        from stages.training import trackers

        trackers.tracking(self.workspace, "client-train", self.round, self.client)

    def examples(self, rows: Sequence[Row], slm: Tuned) -> tuple[list[Example], Metrics]:
        """The rows as tokens, and how many were left out, as tell_left_out says."""
        data = self.workspace.client_data(self.client)
        examples = encode(
            rows,
            slm.tokenizer,
            max_length=self.workspace.agreement.client_training.max_length,
            context=slm.context,
            too_long=self.workspace.agreement.data.too_long,
            path=data,
        )
        return examples, tell_left_out(rows, examples, data, self.report)

    @property
    def recipe(self) -> Recipe:
        """As the agreement has it; warm-up is for the first round."""
        from stages.training.recipes import Recipe

        settings = self.workspace.agreement.client_training
        return Recipe(
            budget=settings,
            learning_rates={"slm": settings.learning_rate},
            clips={"slm": settings.max_grad_norm},
            proximal=settings.proximal or 0.0,
            warmup_steps=settings.warmup_steps if self.round == 1 else 0,
            schedule=settings.schedule,
            rounds_done=self.round - 1,
            rounds=self.workspace.agreement.federation.rounds,
            seed=self.workspace.seed_for("client-train", self.round, self.client),
        )

    def train(self, slm: Tuned, examples: Sequence[Example], parents: Mapping[str, str], again: bool) -> Outcome:
        """Train the SLM's adapter in place. Raises as training.train does.

        parents: the digests of what it begins with; a run that was stopped goes on only from the same.
        """
        inputs = {
            "agreement": self.workspace.agreement_sha256,
            **parents,
            "slm_base": slm.identity.weights_sha256,
            "dtype": slm.dtype,
        }
        outcome = self._train(slm, examples, inputs, again)
        self.report(Event("note", outcome.change))
        if outcome.metrics["slm_ft_after"] > outcome.metrics["slm_ft_before"]:
            words = f"client {self.client}'s loss rose in training: a smaller learning rate may help"
            self.report(Event("warning", words))
        return outcome

    def _train(self, slm: Tuned, examples: Sequence[Example], inputs: Mapping[str, str], again: bool) -> Outcome:
        from stages.training import trackers, training
        from stages.training.adversarial import objective_of

        return training.train(
            objective_of(slm, self.workspace.agreement.client_training.adversarial),
            examples,
            self.recipe,
            machine=self.workspace.machine,
            folder=self.unfinished,
            inputs=inputs,
            overwrite=again,
            tracking=trackers.tracking(self.workspace, "client-train", self.round, self.client),
            processes=self.processes,
            report=self.report,
        )

    def tell(self, trained: Trained) -> Told:
        """All of it. norms: of the update; left_out: how many rows were too long."""
        metrics = {**trained.outcome.metrics, **trained.norms, **trained.left_out}
        return Told(self.recipe.seed, metrics, None, dict(trained.left_out))


class PrivateLearner(Learner):
    """The same by DP-SGD, as far as the privacy budget goes; see dp_sgd and accounting.budget."""

    def check(self, rows: Sequence[Row], again: bool) -> None:
        """Raises BadNumbers, too, if the budget does not allow the round."""
        if self.processes.count > 1:
            message = "differentially private training draws its rows and noise in one process; torchrun has started"
            raise UsageProblem(f"{message} more", mend="give the command without torchrun")
        if self.resets:
            budget.reset(self.workspace, self.client)
            shutil.rmtree(self.unfinished, ignore_errors=True)
            words = f"client {self.client}'s privacy ledger begins anew: epsilon counts from zero"
            self.report(Event("warning", words))
        # A run that goes on has paid; where rows may be left out, their number is known when they have been tokenised.
        is_known = (again or not self.unfinished.exists()) and self.workspace.agreement.data.too_long == "refuse"
        examples = len(rows) if is_known else None
        budget.check(self.workspace, client=self.client, round=self.round, examples=examples)
        if self.workspace.machine.trackers:
            words = "trackers get nothing: differential privacy does not cover the losses of training"
            self.report(Event("warning", words))
        super().check(rows, again)

    def _train(self, slm: Tuned, examples: Sequence[Example], inputs: Mapping[str, str], again: bool) -> Outcome:
        from stages.privacy import dp_sgd

        return dp_sgd.train(
            slm,
            examples,
            self.recipe,
            clip=self.workspace.agreement.privacy.max_grad_norm,
            reserve=partial(budget.reserve, self.workspace, self.client, self.round, len(examples)),
            finish=partial(budget.finish, self.workspace, self.client, self.round),
            machine=self.workspace.machine,
            folder=self.unfinished,
            inputs=inputs,
            overwrite=again,
            report=self.report,
        )

    def tell(self, trained: Trained) -> Told:
        """Epsilon covers neither losses nor how many rows are long, and no seed repeats the run."""
        public = {name: value for name, value in trained.norms.items() if name not in trained.outcome.metrics}
        claim = budget.claim(self.workspace, self.client)
        head = {"ledger_sha256": claim.ledger_sha256} if claim and claim.ledger_sha256 else {}
        return Told(None, public, claim, {**head, **trained.left_out})


LEARNERS: dict[str, Callable[..., Learner]] = {"plain": Learner, "dp-sgd": PrivateLearner}


def learner_of(party: Party, round: int, *, resets: bool, processes: Processes, report: Report) -> Learner:
    """As the agreement has it. resets: whether the privacy ledger begins anew."""
    name = "dp-sgd" if party.workspace.agreement.privacy.is_on else "plain"
    return LEARNERS[name](party=party, round=round, resets=resets, processes=processes, report=report)
