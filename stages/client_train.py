"""client-train, ClientUpdate of Algorithm 1: client k tunes the SLM's adapter on its private data (Eq. 3).

Reads exchange/round-t/broadcast and private/client-k/train.jsonl. Where the method averages nothing, a client goes on
from round 2 with its own exchange/round-(t-1)/client-k instead.
In round 1 a client with a model of its own makes its adapter itself.
Writes exchange/round-t/client-k, and the private log private/client-k/round-t/client-train.jsonl; with differential
privacy, private/client-k/privacy-ledger.jsonl too, before training begins. Where updates are masked or encrypted the
adapter stays in private/client-k/round-t/slm, and so it does where A or B alone is sent; with FedMKT it stays in
.../trained.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stages.aggregation import channels
from stages.artefacts.manifest import Manifest
from stages.artefacts.parts import Start, start_of
from stages.artefacts.publishing import already_made, is_earlier, publish
from stages.artefacts.steps import Over, Step
from stages.data.rows import Row
from stages.files import writing
from stages.parties.party import Party
from stages.privacy.local_training import Learner, Trained, learner_of
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models


def client_train(
    workspace: Workspace,
    *,
    client: int,
    round: int,
    overwrite: bool = False,
    reset_privacy: bool = False,
    models: Models | None = None,
    processes: Processes = ALONE,
    report: Report = ignore,
) -> Manifest:
    """Train one client's adapter for one round and publish it. Returns its manifest.

    Publishes nothing unless the adapter is finite, its B is not zero and it has moved. Raises BadNumbers if the privacy
    budget does not allow the round. reset_privacy: begin a new privacy ledger, whatever was spent. processes: all call
    this alike; the first decides and writes, and each trains its share.
    """
    party = Party.client(workspace.of_round(round), client)
    channel = channels.to_server(party, report)
    return ClientTrain(
        party=party,
        round=round,
        channel=channel,
        learner=learner_of(party, round, resets=reset_privacy, processes=processes, report=report),
        publishes=[workspace.client_trained(round, client)],
        log=workspace.log("client-train", round, client),
        done=channel.done,
        overwrite=overwrite,
        models=models,
        processes=processes,
        report=report,
    ).take()


class Opened(NamedTuple):
    """The rows, the digest of their file, what training starts from, and whether a final update is only sent again."""

    rows: list[Row]
    data_sha256: str
    start: Start
    sends_again: bool


@dataclass(frozen=True, kw_only=True)
class ClientTrain(Step[Opened, Trained, Manifest]):
    """ClientUpdate: receive theta, train on the private rows, send what came of it."""

    round: int
    channel: channels.ToServer
    learner: Learner
    models: Models | None

    def open(self) -> Opened:
        """Read the rows, and receive theta."""
        self.workspace.check_round(self.round)
        self.workspace.check_client(self.party.number)
        self.report(Event("stage", f"client-train, round {self.round}, client {self.party.number}"))
        rows, data_sha256 = self.learner.rows()
        start = start_of(self.party, self.round)
        self.channel.accept(start.theta)
        self.channel.check(start.theta, rows, self.overwrite)
        return Opened(rows, data_sha256, start, self.overwrite and self.channel.is_final(start.theta))

    def decide(self, opened: Opened, again: bool) -> tuple[Opened, bool]:
        """An adapter is made again if that is asked for and can be, or if it is of an earlier attempt at the round."""
        again = again and not opened.sends_again
        self.channel.check(opened.start.theta, opened.rows, again)  # once more: another process may have sent it
        return opened, again or is_earlier(self.publishes[0], opened.start.attempt)  # unread, if asked for

    def look(self, opened: Opened, again: bool) -> Manifest | None:
        """An adapter that was trained from this theta on these rows."""
        [target], data = self.publishes, opened.data_sha256
        return already_made(target, opened.start.parents, by=self.party, overwrite=again, log=self.log, data=data)

    def compute(self, opened: Opened, again: bool) -> Trained:
        """Train the adapter, and keep its update as short as agreed."""
        from stages.aggregation.ranks import at_rank_of
        from stages.models import adapters
        from stages.models.loading import Models
        from stages.training.update_norm import keep_short

        self.learner.check(opened.rows, again)
        models = self.models.of(self.workspace) if self.models else Models(self.workspace, self.processes)
        models.use("slm")
        seed = self.workspace.seed_for("theta", 1, self.party.number)
        agreement = self.workspace.agreement
        theta = opened.start.adapter(agreement)
        begins = at_rank_of(theta, agreement.slm.lora) if theta else None
        slm = models.begun("slm", begins, seed=seed, trains=agreement.trained_in(self.round))
        start = adapters.take(slm.model)
        if agreement.trained_in(self.round) == "A":
            adapters.check_can_train_a(start, self.round)
        examples, left_out = self.learner.examples(opened.rows, slm)
        outcome = self.learner.train(slm, examples, {"data": opened.data_sha256, **opened.start.parents}, again)
        return Trained(slm, outcome, keep_short(slm, start, examples, self.workspace, self.report), left_out)

    def publish(self, opened: Opened, computed: Trained, over: Over) -> Manifest:
        """Publish the adapter, and write the log."""
        from stages.models import adapters
        from stages.training.drafts import draft_of

        [target], slm, outcome = self.publishes, computed.slm, computed.outcome
        told = self.learner.tell(computed)
        draft = draft_of(
            slm,
            outcome,
            stage="client-train",
            round=self.round,
            attempt=opened.start.attempt,
            parents=opened.start.parents,
            seed=told.seed,
            metrics=told.metrics,
            privacy=told.privacy,
        )
        contents = adapters.as_files(slm.model, self.workspace.agreement.slm.lora)
        manifest = publish(target, contents, draft, by=self.party, over=over[target])
        writing.write_log(self.log, [outcome.log[0] | told.log, *outcome.log[1:]])
        shutil.rmtree(self.learner.unfinished, ignore_errors=True)  # which another process may be writing into
        return manifest

    def end(self, opened: Opened, made: Manifest, again: bool) -> Manifest:
        """Send it."""
        return self.channel.send(opened.start.theta, made, again or opened.sends_again)
