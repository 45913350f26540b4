"""run: whole federations on one machine, in one process, by the same stages; what chains them is here.

Base models are loaded once. It leaves exactly the files that the separate commands leave, and goes on from whatever is
there. Another method than the agreement's runs in baselines/<method>, on the same data.
"""

from __future__ import annotations

import functools
import gc
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.aggregate import aggregate
from stages.artefacts.lineage import EDITED
from stages.artefacts.reading import read_manifest
from stages.artefacts.records import Result
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.data.prepare import prepare
from stages.evaluate import evaluate
from stages.federation.in_public import align_all, round_in_public
from stages.federation.time_left import TimeLeft
from stages.parties.agreed import check_agreement
from stages.parties.enroll import enroll
from stages.parties.join import join
from stages.parties.keys import keys
from stages.parties.names import listed
from stages.progress.rounds import Reader
from stages.progress.status import edited
from stages.reveal import reveal
from stages.runtime.errors import NotReady, Problem, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.methods import Compared, Federation
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.study.variants import Changes


def run(
    workspace: Workspace,
    *,
    method: Compared | None = None,
    rounds: range | None = None,
    scores: bool = True,
    each_round: bool = True,
    client_scores: bool = True,
    overwrite: bool = False,
    models: Models | None = None,
    report: Report = ignore,
) -> list[Result]:
    """Every step of these rounds (default: all). Returns the scores, unless scores is False.

    method: by default the agreement's. Scored are the server's models after every round, and each client's SLM after
    the last (where nothing is averaged, after each); before, the bases alone. each_round: False to score all of them
    after the last round alone. client_scores: False to leave out the clients' own where others are scored.
    """
    from stages.models.loading import Models

    _keep_imports()
    models = models or Models(workspace)
    if method not in (None, workspace.agreement.federation.method):
        from stages.study import variants

        folder, changes = variants.baseline(workspace, method)
        made_by = Command("run", method=method)
        workspace = derived(workspace, folder, changes, made_by=made_by, overwrite=overwrite, report=report)
        models = models.of(workspace)
    federation = workspace.agreement.federation
    rounds = rounds or range(1, federation.rounds + 1)
    for round in (rounds[0], rounds[-1]):
        workspace.check_round(round)
    is_derived = workspace.home != workspace.root  # the bases are checked and scored where it was derived from
    if federation.distils and not is_derived:
        models.check_both()
    scores = scores and bool(workspace.scored_tasks)

    if workspace.agreement.aggregation.is_hidden:
        _enrol(workspace, renew=overwrite, report=report)
    done = set() if overwrite else check_edits(workspace, rounds[-1])
    report = TimeLeft([("", {*rounds} - done)], report).report
    score = partial(evaluate, workspace, overwrite=overwrite, models=models, report=report)
    results = score_bases(workspace, score) if scores and not is_derived else []
    if federation.learns_in_public:
        align_all(workspace, _here(workspace, rounds[0], overwrite), overwrite=overwrite, report=report)
    for round in rounds:
        words = f"{method or federation.method}{_of_whom(federation)}, round {round} of {federation.rounds}"
        report(Event("round", words, step=round, total=federation.rounds))
        _round(workspace, round, overwrite, models, report, has_ended=round in done)
        if scores and (each_round or round == rounds[-1]):
            are_asked = (client_scores and round == rounds[-1]) or not workspace.agreement.averages
            asked = [*workspace.client_adapters(round)] if are_asked else []
            results += [score(round=round, **one) for one in scored_after(workspace, asked)]
    return results


def _of_whom(federation: Federation) -> str:
    """Whose model a baseline without a server trains, and from which seed."""
    whose = {"centralized": "the LLM", "standalone": "each client's own SLM"}.get(federation.method)
    return f" ({whose}, seed {federation.seed})" if whose else ""


def scored_after(workspace: Workspace, clients: Sequence[int]) -> list[dict[str, Any]]:
    """Which models are scored after a round, as evaluate is told: the server's, and these clients' own.

    Clients' are asked for after the last round; where none are averaged, after each.
    """
    federation, found = workspace.agreement.federation, list[dict[str, Any]]()
    if federation.distils:
        found += [{"model": "slm"}, {"model": "llm"}]
    if workspace.agreement.averages and not federation.distils:
        found.append({"model": "aggregate"})
    if federation.clients_tell:
        found.append({"model": "llm"})
    return [*found, *({"client": client} for client in clients)]


@functools.cache
def _keep_imports() -> None:
    """Keep what is imported out of garbage collection, which Trainer asks for whenever it begins: 0.2 s each time.

    Once in a process: a second time would keep the models of an earlier run for ever.
    """
    from stages.training import training  # noqa: F401

    gc.collect()
    gc.freeze()


def derived(
    parent: Workspace,
    folder: Path,
    changes: Changes,
    *,
    made_by: Command,
    overwrite: bool = False,
    report: Report = ignore,
) -> Workspace:
    """A workspace derived from parent, ready to run: made if it is not there, with data of its own if need be.

    One whose rows cannot be dealt is not left there.
    """
    from stages.study import variants

    is_new = not folder.exists()
    variant = variants.make_variant(parent, folder, changes, made_by=made_by, overwrite=overwrite)
    report(Event("note", f"in {parent.shown(folder)}"))
    if variants.deals_anew(parent, changes):
        try:
            prepare(variant, overwrite=overwrite, report=report)
        except Problem:
            if is_new:
                shutil.rmtree(folder)
            raise
    return variant


def check_edits(workspace: Workspace, last: int) -> set[int]:
    """The rounds that are done; raises Refused, before anything is scored, for rounds made under another agreement."""
    check_agreement(workspace)
    reader = Reader(workspace, verify=False)
    rounds = [reader.round(number) for number in range(1, last + 1)]
    if found := edited(workspace, reader.other_agreements):
        raise Refused(found, where=workspace.root / AGREEMENT, mend=EDITED)
    return {round.number for round in rounds if round.is_done}


def _round(
    workspace: Workspace, round: int, overwrite: bool, models: Models, report: Report, *, has_ended: bool
) -> None:
    """One round of Algorithm 1, as far as the method goes."""
    federation = workspace.agreement.federation
    if workspace.agreement.broadcasts(round):
        broadcast(workspace, round=round, overwrite=overwrite, models=models, report=report)
    here = _here(workspace, round, overwrite)
    if federation.learns_in_public:
        round_in_public(workspace, round, here, overwrite=overwrite, models=models, report=report)
    else:
        for client in here:
            client_train(workspace, client=client, round=round, overwrite=overwrite, models=models, report=report)
    if workspace.agreement.averages and not (has_ended and _did_without(workspace, round, report)):
        _aggregate(workspace, round, overwrite, models, report)
    if federation.distils:
        co_distill(workspace, round=round, overwrite=overwrite, models=models, report=report)


def score_bases(workspace: Workspace, score: Callable[..., Result]) -> list[Result]:
    """The scores of the bases alone."""
    return [score(**one) for one in bases_scored(workspace)]


def bases_scored(workspace: Workspace) -> list[dict[str, Any]]:
    """The bases that are scored alone, as evaluate is told: every model that somebody tunes."""
    own = [client for client in workspace.clients if workspace.of_client(client).own_model]
    shared = [] if len(own) == len(workspace.clients) else [{"model": "slm"}]
    return [*shared, *({"client": client} for client in own), {"model": "llm"}]


def _enrol(workspace: Workspace, *, renew: bool, report: Report) -> None:
    """Keys for every party, where one machine plays them all: each joins the roster that is made here."""
    report(Event("stage", "keys, enroll, join"))
    here = [client for client in workspace.clients if workspace.client_data(client).exists()]
    for client in here:
        keys(workspace, client=client, renew=renew)
    enrolled = enroll(workspace, renew=renew)
    for client in here:
        join(workspace, client=client, fingerprint=enrolled.fingerprint)


def _did_without(workspace: Workspace, round: int, report: Report) -> bool:
    """Whether a finished average did without updates that are here, or without all: averaging again would refuse."""
    averaged, updates = read_manifest(workspace.aggregate(round))[0].parents, workspace.client_updates(round)
    if late := [client for client, place in updates.items() if place.name not in averaged]:
        report(Event("warning", f"round {round} has ended without the update of {listed(late)}: it stays as it is"))
    return bool(late) or not any(workspace.client_update(round, k).name in averaged for k in workspace.clients)


def _aggregate(workspace: Workspace, round: int, overwrite: bool, models: Models, report: Report) -> None:
    """The average; where updates are hidden the close, what clients reveal of their sum, and then the average."""
    average = partial(aggregate, workspace, round=round, overwrite=overwrite, models=models, report=report)
    if not workspace.agreement.aggregation.is_hidden or (workspace.aggregate(round).exists() and not overwrite):
        average()
        return
    try:
        average()
    except NotReady:
        if not workspace.close(round).exists():
            raise
        closed = read_manifest(workspace.close(round))[0].closing or {}
        holder = workspace.agreement.aggregation.key_holder
        for client in [holder] if holder else workspace.client_adapters(round):
            if holder or f"client-{client}" in closed:
                reveal(workspace, client=client, round=round, report=report)
        average()


def _here(workspace: Workspace, round: int, overwrite: bool) -> list[int]:
    """The clients to train on this machine in a round.

    Not those whose update came from elsewhere, as at a real server; nor, where a quorum is enough, those without data
    here, or those that a finished average did without, unless that is to be made again.
    """
    clients = list(workspace.clients)
    if workspace.aggregate(round).exists() and not overwrite:
        averaged = read_manifest(workspace.aggregate(round))[0].parents
        clients = [client for client in clients if workspace.client_update(round, client).name in averaged]
    opening = read_manifest(workspace.broadcast(round))[0].opening if workspace.broadcast(round).exists() else None
    clients = [client for client in clients if opening is None or client in opening.clients]
    may_be_absent = workspace.agreement.aggregation.min_clients is not None
    return [
        client
        for client in clients
        if workspace.client_data(client).exists() or not (may_be_absent or workspace.sent_by(round, client).exists())
    ]
