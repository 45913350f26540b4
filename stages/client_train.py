"""client-train, ClientUpdate of Algorithm 1: client k tunes the SLM's adapter on its private data (Eq. 3).

Reads exchange/round-t/broadcast and private/client-k/train.jsonl. Where the method averages nothing, a client goes on
from round 2 with its own exchange/round-(t-1)/client-k instead.
Writes exchange/round-t/client-k, and the private log private/client-k/round-t/client-train.jsonl.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from stages.parts import files
from stages.parts.events import Event, Report, ignore
from stages.parts.manifest import Artefact, Manifest, already_made, check_belongs, publish, read_artefact
from stages.parts.rows import Example, Row, encode, read_rows, warn_of_unspaced
from stages.parts.workspace import Workspace, require

if TYPE_CHECKING:
    from stages.parts.models import Models, Tuned


def client_train(
    workspace: Workspace,
    *,
    client: int,
    round: int,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> Manifest:
    """Train one client's adapter for one round and publish it. Returns its manifest.

    Publishes nothing unless the adapter is finite, its B is not zero and it has moved.
    """
    workspace.check_round(round)
    workspace.check_client(client)
    report(Event("stage", f"client-train, round {round}, client {client}"))
    data = workspace.client_data(client)
    mend = f"on client {client}'s machine, put JSONL rows there; in a simulation, `fedcollm prepare` makes them"
    require(data, f"client {client} has no training data here", mend)
    rows, data_sha256 = read_rows(data)
    warn_of_unspaced(rows, report)
    theta = _start(workspace, client, round)

    target, log = workspace.client_update(round, client), workspace.log("client-train", round, client)
    parents = {theta.path.name: theta.sha256}
    if done := already_made(target, workspace, parents, overwrite=overwrite, log=log, data=data_sha256):
        report(Event("note", "already done"))
        return done
    with files.held(log.with_suffix(".lock")):
        return _train(workspace, client, round, rows, data_sha256, theta, overwrite, models, report)


def _start(workspace: Workspace, client: int, round: int) -> Artefact:
    """What the client starts from: theta^t; where nothing is averaged, from round 2 on, its own of the round before."""
    if workspace.agreement.federation.averages or round == 1:
        source, stage, made_in, by = workspace.broadcast(round), "broadcast", round, None
        name = f"the broadcast of round {round}"
        mend = f"on the server: fedcollm broadcast --round {round}; then carry exchange/ here"
    else:
        source, stage, made_in, by = workspace.client_update(round - 1, client), "client-train", round - 1, client
        name = f"client {client}'s adapter of round {round - 1}"
        mend = f"fedcollm client-train --client {client} --round {round - 1}"
    require(source, f"{name} is not there", mend)
    theta = read_artefact(source)
    check_belongs(theta, workspace, stage=stage, round=made_in, client=by)
    return theta


def _train(
    workspace: Workspace,
    client: int,
    round: int,
    rows: list[Row],
    data_sha256: str,
    theta: Artefact,
    overwrite: bool,
    models: Models | None,
    report: Report,
) -> Manifest:
    from stages.parts import adapter_files, adapters, trackers, training
    from stages.parts.models import Models
    from stages.parts.objective import Objective, task_loss

    settings, lora = workspace.agreement.client_training, workspace.agreement.slm.lora
    tracking = trackers.tracking(workspace, "client-train", round, client)
    seed = workspace.seed_for("client-train", round, client)
    slm = (models or Models(workspace)).expect("slm", theta.manifest.base, workspace.shown(theta.path))
    received = adapter_files.read_adapter(theta, adapters.layout(slm.model), lora)
    examples = _examples(workspace, client, rows, slm)
    adapters.put(slm.model, received)
    unfinished = workspace.unfinished("client-train", round, client)
    outcome = training.train(
        Objective([slm], task_loss, {"slm_ft": 1.0}),
        examples,
        training.Recipe(
            budget=settings,
            learning_rates={"slm": settings.learning_rate},
            clips={"slm": settings.max_grad_norm},
            warmup_steps=settings.warmup_steps if round == 1 else 0,
            seed=seed,
        ),
        machine=workspace.machine,
        folder=unfinished,
        inputs={
            "agreement": workspace.agreement_sha256,
            "data": data_sha256,
            theta.path.name: theta.sha256,
            "slm_base": slm.identity.weights_sha256,
            "dtype": slm.dtype,
        },
        overwrite=overwrite,
        tracking=tracking,
        report=report,
    )
    report(Event("note", outcome.change))
    if outcome.metrics["slm_ft_after"] > outcome.metrics["slm_ft_before"]:
        report(Event("warning", f"client {client}'s loss rose in training: a smaller learning rate may help"))
    norms = adapters.check_trained(received, adapters.take(slm.model))
    manifest = publish(
        workspace.client_update(round, client),
        adapters.as_files(slm.model, lora),
        workspace,
        stage="client-train",
        round=round,
        client=client,
        parents={theta.path.name: theta.sha256},
        base=slm.identity,
        parameters=adapters.count(slm.model),
        seed=seed,
        dtype=slm.dtype,
        steps=outcome.steps,
        examples=outcome.examples,
        tokens=outcome.tokens,
        metrics=outcome.metrics | norms,
    )
    files.write_log(workspace.log("client-train", round, client), outcome.log)
    shutil.rmtree(unfinished)
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
