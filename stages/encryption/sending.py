"""A client encrypts what it has trained and sends it; what it sent is remembered, to be told from another."""

from __future__ import annotations

import numpy as np

from stages.artefacts.adapter_files import flat
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import Manifest
from stages.artefacts.parts import cut
from stages.artefacts.publishing import publish
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import read_sound
from stages.encryption import ckks
from stages.encryption.ciphertext_files import written
from stages.parties import encryption_keys
from stages.parties.memory import recall, remember
from stages.parties.party import Party
from stages.runtime.errors import BadNumbers, Problem, Refused
from stages.runtime.events import Event, Report
from stages.workspace import addressees
from stages.workspace.commands import Command
from stages.workspace.names import ENCRYPTED
from stages.workspace.paths import Workspace


def weight_of(workspace: Workspace, client: int, examples: int) -> float:
    """What a client's update weighs: 1, or by its examples, and 1 where it has the most. Raises BadNumbers beyond."""
    settings = workspace.agreement.aggregation
    most = settings.max_examples or 0
    if settings.weighting == "uniform":
        return 1.0
    if examples > most:
        message = f"client {client} would train on {examples} examples, aggregation.max_examples is {most}"
        mend = f"all parties agree on max_examples = {examples} or more, or on fewer steps"
        raise BadNumbers(message, where=workspace.client_data(client), mend=mend)
    return examples / most


def send(party: Party, theta: Artefact, trained: Artefact, report: Report) -> Manifest:
    """Encrypt a trained adapter's change and publish it. Returns its manifest.

    Publishes nothing and raises BadNumbers for a change beyond aggregation.max_update_value, for one that is not finite
    and for one that would not be known to ckks.LARGEST_ERROR; Refused where the client has taken another broadcast of
    the round meanwhile.
    """
    workspace, client, round = party.workspace, party.number, theta.manifest.round
    with party.keys.alone(report):
        kept = recall(party.keys, round)
        if kept is None or kept.broadcast_sha256 != theta.sha256:
            message = f"client {client} has taken another broadcast of round {round} while it trained for this one"
            again = Command("client-train", client=client, round=round)
            raise Refused(message, where=theta.path, mend=f"copy the newer broadcast here; {again}")
        target = workspace.client_update(round, client)
        if kept.adapter_sha256 == trained.sha256 and (done := _sent(party, theta, kept.y_sha256)):
            report(Event("note", "already sent"))
            return done
        content = written(_encrypted(party, theta, trained))
        after, _ = cut(theta, trained, workspace.agreement)
        draft = Draft(
            stage="client-train",
            round=round,
            attempt=theta.manifest.attempt,
            parents={theta.path.name: theta.sha256},
            base=theta.manifest.base,
            parameters=flat(after).size,
            privacy=trained.manifest.privacy,
        )
        made = publish(target, {ENCRYPTED: content}, draft, by=party)
        sent = {"adapter_sha256": trained.sha256, "y_sha256": made.files[ENCRYPTED].sha256}
        remember(party.keys, round, kept.model_copy(update=sent))
    pack = Command("pack", client=client, round=round)
    addressees.tell(workspace, target, pack, report, client=client)
    return made


def precision_of(workspace: Workspace, numbers: int) -> ckks.Precision:
    """What this federation's sums are known to, where each client sends so many numbers."""
    federation = workspace.agreement.federation
    return ckks.Precision(federation.clients, federation.rounds, numbers)


def _encrypted(party: Party, theta: Artefact, trained: Artefact) -> list[bytes]:
    workspace, members = party.workspace, party.members
    assert members is not None, "where updates are encrypted there is a roster"
    after, before = cut(theta, trained, workspace.agreement)
    update = np.subtract(flat(after), flat(before), dtype=np.float32)
    bound = workspace.agreement.aggregation.max_update_value
    weight = weight_of(workspace, party.number, trained.manifest.examples)
    precision = precision_of(workspace, len(update))
    try:
        ckks.check_fits(update, weight, bound, precision)
    except BadNumbers as problem:
        problem.where = trained.path
        raise
    key = encryption_keys.public_key(workspace, members)
    return list(ckks.encrypted(update, weight, bound, key, precision))


def _sent(party: Party, theta: Artefact, sha256: str | None) -> Manifest | None:
    """What lies in exchange/, if it is sound and what was sent; if not, it is sent again."""
    try:
        found = read_sound(party.workspace.client_update(theta.manifest.round, party.number), by=party).manifest
    except Problem:
        return None
    is_it = ENCRYPTED in found.files and found.files[ENCRYPTED].sha256 == sha256
    return found if is_it and found.parents == {theta.path.name: theta.sha256} else None
