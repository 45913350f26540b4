"""client-train, ClientUpdate of Algorithm 1: client k tunes the SLM's adapter on its private data (Eq. 3).

Reads exchange/round-t/broadcast and private/client-k/train.jsonl. Where the method averages nothing, a client goes on
from round 2 with its own exchange/round-(t-1)/client-k instead.
Writes exchange/round-t/client-k, and the private log private/client-k/round-t/client-train.jsonl; with differential
privacy, private/client-k/privacy-ledger.jsonl too, before training begins. In secure mode the adapter stays in
private/client-k/round-t/slm, and what goes to exchange/ is masked.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.accounting import budget
from stages.artefacts import turns
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest, Stage
from stages.artefacts.publishing import already_made, publish
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import read_sound, received
from stages.data.rows import Example, Row, encode, read_rows, tell_left_out, warn_of_spacing
from stages.files import writing
from stages.parties.party import Party
from stages.progress.staleness import warn_of_stale_rows
from stages.runtime.errors import BadNumbers, Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.runtime.processes import ALONE, Processes
from stages.secagg import accepting, said
from stages.workspace.names import MANIFEST
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.models.tuned import Tuned


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
    party = Party.client(workspace, client)
    if not processes.is_first:
        rows, data_sha256, theta, again = processes.agree()
        return _train(party, round, rows, data_sha256, theta, again, models, processes, {}, report)
    workspace.check_round(round)
    workspace.check_client(client)
    report(Event("stage", f"client-train, round {round}, client {client}"))
    data = workspace.client_data(client)
    mend = f"on client {client}'s machine, put JSONL rows there; in a simulation, `fedcollm prepare` makes them"
    require(data, f"client {client} has no training data here", mend)
    rows, data_sha256 = read_rows(data)
    warn_of_spacing(rows, report)
    warn_of_stale_rows(workspace, report)
    theta = _start(party, round)
    is_secure = workspace.agreement.aggregation.is_secure
    if is_secure:
        said.check_known(party)
    accepting.accept(party, theta, report)
    if is_secure:
        _check_may_mask(party, theta, rows, overwrite)
    # What was masked for this opening and is damaged is sent again as it was, never trained or masked again.
    sends_again = is_secure and overwrite and _is_masked(party, theta)
    overwrite = overwrite and not sends_again
    target, log = workspace.client_adapter(round, client), workspace.log("client-train", round, client)
    parents = {theta.path.name: theta.sha256}
    again = overwrite

    def look(asked: bool) -> Manifest | None:
        nonlocal again
        if is_secure:  # once more: another process may have sent it meanwhile
            _check_may_mask(party, theta, rows, asked)
        again = asked or _is_earlier(target, theta)
        return already_made(target, parents, by=party, overwrite=again, log=log, data=data_sha256)

    def make(places: turns.Places) -> Manifest:
        if workspace.agreement.privacy.is_on:
            _check_alone(processes)
            _check_privacy(workspace, client, round, rows, again, reset_privacy, report)
        processes.agree((rows, data_sha256, theta, again))
        return _train(party, round, rows, data_sha256, theta, again, models, processes, places, report)

    lock = log.with_suffix(".lock")
    done = "already trained" if is_secure else "already done"
    trained = turns.take([target], lock, look=look, make=make, overwrite=overwrite, done=done, report=report)
    return _mask(party, theta, again or sends_again, report) if is_secure else trained


def _check_may_mask(party: Party, theta: Artefact, rows: list[Row], overwrite: bool) -> None:
    """Raise before training if what it gives could not be sent: masked already, or of too many examples."""
    from stages.secagg import sending

    workspace, client = party.workspace, party.number
    if overwrite and sending.whole(party, theta):
        round = theta.manifest.round
        message = (
            f"client {client} has sent its masked update of this opening of round {round}, which cannot be replaced"
        )
        mend = f"on the server, open the round again: fedcollm broadcast --round {round} --overwrite"
        raise Refused(message, where=workspace.client_update(round, client), mend=mend)
    settings, budget = workspace.agreement.aggregation, workspace.agreement.client_training
    examples = budget.steps_for(len(rows)) * budget.rows_per_step
    if settings.weighting == "samples" and examples > (settings.max_examples or 0):
        message = (
            f"client {client} would train on {examples} examples, aggregation.max_examples is {settings.max_examples}"
        )
        mend = f"all parties agree on max_examples = {examples} or more, or on fewer steps"
        raise BadNumbers(message, where=workspace.client_data(client), mend=mend)


def _is_masked(party: Party, theta: Artefact) -> bool:
    from stages.secagg import sending

    return sending.is_made(party, theta)


def _is_earlier(target: Path, theta: Artefact) -> bool:
    """Whether an adapter is there that was trained for an earlier attempt at this round, which no longer counts."""
    return (
        target.is_dir() and (target / MANIFEST).exists() and read_manifest(target)[0].attempt < theta.manifest.attempt
    )


def _mask(party: Party, theta: Artefact, overwrite: bool, report: Report) -> Manifest:
    """Send the trained adapter masked; once for every opening of a round, unless what was sent is damaged."""
    from stages.secagg import sending

    trained = read_sound(party.workspace.client_adapter(theta.manifest.round, party.number), by=party)
    return sending.send(party, theta, trained, overwrite=overwrite, report=report)


def _start(party: Party, round: int) -> Artefact:
    """What the client starts from: theta^t; where nothing is averaged, from round 2 on, its own of the round before."""
    workspace, client = party.workspace, party.number
    stage: Stage
    if workspace.agreement.federation.averages or round == 1:
        source, stage, made_in, by = workspace.broadcast(round), "broadcast", round, None
        name = f"the broadcast of round {round}"
        mend = f"on the server: fedcollm broadcast --round {round}; then carry exchange/ here"
    else:
        source, stage, made_in, by = workspace.client_adapter(round - 1, client), "client-train", round - 1, client
        name = f"client {client}'s adapter of round {round - 1}"
        mend = f"fedcollm client-train --client {client} --round {round - 1}"
    missing = f"{name} is not there", mend
    return received(source, by=party, stage=stage, round=made_in, client=by, missing=missing)


def _check_alone(processes: Processes) -> None:
    if processes.count > 1:
        message = "differentially private training draws its rows and noise in one process; torchrun has started more"
        raise UsageProblem(message, mend="give the command without torchrun")


def _check_privacy(
    workspace: Workspace, client: int, round: int, rows: list[Row], overwrite: bool, reset: bool, report: Report
) -> None:
    """Everything about privacy that can be refused before a model is loaded."""
    unfinished = workspace.unfinished("client-train", round, client)
    if reset:
        budget.reset(workspace, client)
        shutil.rmtree(unfinished, ignore_errors=True)
        report(Event("warning", f"client {client}'s privacy ledger begins anew: epsilon counts from zero"))
    # A run that goes on has paid; where rows may be left out, their number is known when they have been tokenised.
    is_known = (overwrite or not unfinished.exists()) and workspace.agreement.data.too_long == "refuse"
    budget.check(workspace, client=client, round=round, examples=len(rows) if is_known else None)
    if workspace.machine.trackers:
        report(Event("warning", "trackers get nothing: differential privacy does not cover the losses of training"))


def _train(
    party: Party,
    round: int,
    rows: list[Row],
    data_sha256: str,
    theta: Artefact,
    overwrite: bool,
    models: Models | None,
    processes: Processes,
    places: turns.Places,
    report: Report,
) -> Manifest:
    from stages.artefacts import adapter_files
    from stages.models import adapters
    from stages.models.loading import Models
    from stages.training import recipes, trackers, training
    from stages.training.objective import Objective, task_loss
    from stages.training.update_norm import keep_short

    workspace, client = party.workspace, party.number
    agreement, machine = workspace.agreement, workspace.machine
    settings, lora, privacy = agreement.client_training, agreement.slm.lora, agreement.privacy
    tracking = trackers.tracking(workspace, "client-train", round, client)
    seed = workspace.seed_for("client-train", round, client)
    models = models or Models(workspace, processes)
    models.use("slm")
    slm = models.expect("slm", theta.manifest.base, workspace.shown(theta.path))
    received = adapter_files.read_adapter(theta, adapters.layout(slm.model), lora)
    examples = _examples(workspace, client, rows, slm)
    left_out = tell_left_out(rows, examples, workspace.client_data(client), report)
    adapters.put(slm.model, received)
    objective = Objective([slm], task_loss, {"slm_ft": 1.0})
    unfinished = workspace.unfinished("client-train", round, client)
    inputs = {
        "agreement": workspace.agreement_sha256,
        "data": data_sha256,
        theta.path.name: theta.sha256,
        "slm_base": slm.identity.weights_sha256,
        "dtype": slm.dtype,
    }
    recipe = recipes.Recipe(
        budget=settings,
        learning_rates={"slm": settings.learning_rate},
        clips={"slm": settings.max_grad_norm},
        warmup_steps=settings.warmup_steps if round == 1 else 0,
        seed=seed,
    )
    train = partial(training.train, objective, tracking=tracking, processes=processes)
    if privacy.is_on:
        from stages.privacy import dp_sgd

        reserve = partial(budget.reserve, workspace, client, round, len(examples))
        finish = partial(budget.finish, workspace, client, round)
        train = partial(dp_sgd.train, slm, clip=privacy.max_grad_norm, reserve=reserve, finish=finish)
    outcome = train(
        examples, recipe, machine=machine, folder=unfinished, inputs=inputs, overwrite=overwrite, report=report
    )
    report(Event("note", outcome.change))
    if outcome.metrics["slm_ft_after"] > outcome.metrics["slm_ft_before"]:
        report(Event("warning", f"client {client}'s loss rose in training: a smaller learning rate may help"))
    metrics = outcome.metrics | keep_short(objective, received, examples, workspace, report)
    if not privacy.is_on:  # epsilon does not cover how many of a client's rows are long
        metrics |= left_out
    if not processes.is_first:
        return Manifest.model_validate(processes.agree())
    manifest = publish(
        workspace.client_adapter(round, client),
        adapters.as_files(slm.model, lora),
        Draft(
            stage="client-train",
            round=round,
            attempt=theta.manifest.attempt,
            parents={theta.path.name: theta.sha256},
            base=slm.identity,
            parameters=adapters.count(slm.model),
            seed=None if privacy.is_on else seed,
            dtype=slm.dtype,
            steps=outcome.steps,
            examples=outcome.examples,
            tokens=outcome.tokens,
            metrics={name: value for name, value in metrics.items() if not (privacy.is_on and name in outcome.metrics)},
            privacy=budget.claim(workspace, client),
        ),
        by=party,
        over=places[workspace.client_adapter(round, client)],
    )
    head = {"ledger_sha256": manifest.privacy.ledger_sha256} if manifest.privacy else {}
    writing.write_log(
        workspace.log("client-train", round, client), [outcome.log[0] | head | left_out, *outcome.log[1:]]
    )
    shutil.rmtree(unfinished, ignore_errors=True)  # which another process may be writing into
    processes.agree(manifest)
    return manifest


def _examples(workspace: Workspace, client: int, rows: list[Row], slm: Tuned) -> list[Example]:
    """The client's rows as tokens."""
    return encode(
        rows,
        slm.tokenizer,
        max_length=workspace.agreement.client_training.max_length,
        context=slm.context,
        too_long=workspace.agreement.data.too_long,
        path=workspace.client_data(client),
    )
