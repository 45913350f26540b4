"""aggregate, line 13 of Algorithm 1: the server averages the clients' adapters.

Reads exchange/round-t/broadcast and every exchange/round-t/client-k that has arrived.
Writes private/server/round-t/aggregate, and the log private/server/round-t/aggregate.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.parts import files
from stages.parts.errors import NotReady, Refused
from stages.parts.events import Event, Report, ignore
from stages.parts.manifest import Artefact, Manifest, already_made, check_belongs, publish, read_artefact, read_manifest
from stages.parts.workspace import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Workspace, require


def aggregate(workspace: Workspace, *, round: int, overwrite: bool = False, report: Report = ignore) -> Manifest:
    """Average the adapters of one round and publish the result. Returns its manifest.

    Raises NotReady below the quorum, naming the absent; refuses, naming the client, any update that was trained from
    another broadcast, under another agreement, on another base or in another shape.
    """
    workspace.check_round(round)
    workspace.check_step("aggregate", round)
    report(Event("stage", f"aggregate, round {round}"))
    source = workspace.broadcast(round)
    require(source, f"the broadcast of round {round} is not there", f"fedcollm broadcast --round {round}")
    theta = read_artefact(source)
    check_belongs(theta, workspace, stage="broadcast", round=round)
    updates = _present(workspace, round, report)
    parents = {"broadcast": theta.sha256} | {f"client-{k}": read_manifest(path)[1] for k, path in updates.items()}
    target = workspace.aggregate(round)
    if done := already_made(target, workspace, parents, overwrite=overwrite):
        report(Event("note", "already done"))
        return done
    return _average(workspace, round, theta, updates, parents, report)


def _present(workspace: Workspace, round: int, report: Report) -> dict[int, Path]:
    """The updates that have arrived, if they are enough."""
    updates = workspace.client_updates(round)
    absent = [k for k in workspace.clients if k not in updates]
    needed = workspace.agreement.aggregation.min_clients or len(workspace.clients)
    names = ", ".join(map(str, absent))
    if len(updates) < needed:
        message = f"round {round} has {len(updates)} of the {needed} updates it needs; absent: client {names}"
        mend = f"fedcollm client-train --client {absent[0]} --round {round}, there; then carry exchange/ here"
        raise NotReady(message, where=workspace.client_update(round, absent[0]), mend=mend)
    if absent:
        report(
            Event("warning", f"averaging {len(updates)} of {len(workspace.clients)} clients; absent: client {names}")
        )
    return updates


def _average(
    workspace: Workspace, round: int, theta: Artefact, updates: dict[int, Path], parents: dict[str, str], report: Report
) -> Manifest:
    from threadpoolctl import threadpool_limits

    from stages.parts import adapter_files
    from stages.parts.aggregators import WEIGHTINGS, Mean

    started = time.monotonic()
    lora = workspace.agreement.slm.lora
    layout = adapter_files.layout_of(adapter_files.read_adapter(theta, None, lora))
    weight_of = WEIGHTINGS[workspace.agreement.aggregation.weighting]
    mean, examples, tokens = Mean(), 0, 0
    with threadpool_limits(1, "blas"):
        for number, (client, update) in enumerate(_each(updates), 1):
            _check_update(workspace, update, client, round, theta)
            parents[f"client-{client}"] = update.sha256  # what was read now, should it have been replaced meanwhile
            mean.add(adapter_files.read_adapter(update, layout, lora), weight_of(update.manifest.examples))
            examples, tokens = examples + update.manifest.examples, tokens + update.manifest.tokens
            report(Event("step", f"client {client}", step=number, total=len(updates)))
        cross_terms = mean.cross_terms()

    average = mean.result()
    adapter_files.check_finite(average, "the average")
    contents = {
        ADAPTER_CONFIG: theta.contents[ADAPTER_CONFIG],
        ADAPTER_WEIGHTS: adapter_files.weights_bytes(average),
    }
    manifest = publish(
        workspace.aggregate(round),
        contents,
        workspace,
        stage="aggregate",
        round=round,
        parents=parents,
        base=theta.manifest.base,
        parameters=theta.manifest.parameters,
        examples=examples,
        tokens=tokens,
        metrics={f"cross_term/{layer}": term for layer, term in cross_terms.items()},
    )
    files.write_log(workspace.log("aggregate", round), [{"inputs": parents}, {"wall_s": time.monotonic() - started}])
    return manifest


def _each(updates: dict[int, Path]) -> Iterator[tuple[int, Artefact]]:
    """The artefacts one by one, the next being read and hashed while the last is added: two in memory, however many."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        paths = list(updates.items())
        upcoming = reader.submit(read_artefact, paths[0][1])
        for number, (client, _) in enumerate(paths):
            artefact = upcoming.result()
            if number + 1 < len(paths):
                upcoming = reader.submit(read_artefact, paths[number + 1][1])
            yield client, artefact


def _check_update(workspace: Workspace, update: Artefact, client: int, round: int, theta: Artefact) -> None:
    """Raise Refused unless this client trained it in this round from this broadcast on this base."""
    check_belongs(update, workspace, stage="client-train", round=round, client=client)
    again = f"fedcollm client-train --client {client} --round {round} --overwrite, on client {client}'s machine"
    if update.manifest.examples == 0:
        raise Refused(
            f"client {client}'s update of round {round} says it saw no examples", where=update.path, mend=again
        )
    if update.manifest.parents != {"broadcast": theta.sha256}:
        message = f"client {client}'s update of round {round} was trained from another broadcast than the one here"
        raise Refused(message, where=update.path, mend=f"carry exchange/ there; then {again}")
    if update.manifest.base != theta.manifest.base:
        message = f"client {client}'s update of round {round} was trained on another base model or tokenizer"
        raise Refused(message, where=update.path, mend=again)
