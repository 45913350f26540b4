"""A9 in encrypted mode: that each sum is that of the updates it names, was opened once, and became the average.

No key is needed for that, but TenSEAL is, to add the ciphertexts again. What is in one of them an auditor cannot see.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stages.artefacts.adapter_files import flat, part_of, read_adapter
from stages.artefacts.parts import numbers_sent
from stages.artefacts.publishing import keeps_old
from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.artefacts.sizes import ciphertexts_of
from stages.audit.check_secagg import A9, masked_of
from stages.audit.checks import Finding, number_of
from stages.audit.folders import Folder, Scope, said_by
from stages.encryption import ckks, summing
from stages.encryption.ciphertext_files import read
from stages.encryption.sending import precision_of
from stages.parties import encryption_keys
from stages.parties.names import client as party_of
from stages.parties.names import number_of as client_of
from stages.parties.party import Onlooker
from stages.runtime.errors import Problem, UsageProblem
from stages.runtime.events import ignore
from stages.workspace.agreement import Agreement
from stages.workspace.names import ENCRYPTED, OPENED


def hidden_of(folder: Folder) -> Iterator[Finding]:
    """Of one folder where updates are hidden: a masked update, or ciphertexts, holds what its manifest says."""
    yield from masked_of(folder)
    agreement, hidden_by = folder.scope.agreement, folder.manifest and folder.manifest.hidden_by
    if agreement and hidden_by not in (None, agreement.aggregation.mode):
        yield A9.fail(folder.shown, f"is of {hidden_by} mode", f"{agreement.aggregation.mode} mode, as agreed")
    if folder.manifest is None or ENCRYPTED not in folder.manifest.files:
        return
    try:
        count = ciphertexts_of(folder.manifest.parameters)
        read(folder.contents.get(ENCRYPTED, b""), folder.path / ENCRYPTED, count)
    except Problem as problem:
        yield A9.fail(folder.file(ENCRYPTED), said_by(problem), "ciphertexts of so many numbers")


def sums_of(scope: Scope, folders: list[Folder]) -> Iterator[Finding]:
    """Of every round in encrypted mode: what was added, opened and taken over. folders: all of this scope."""
    agreement = scope.agreement
    assert agreement is not None, "it says that updates are encrypted"
    ours = [folder for folder in folders if folder.manifest]
    closes = {one.said.round: one for one in ours if one.said.stage == "close" and ENCRYPTED in one.said.files}
    if not closes:
        yield A9.skip("no round whose encrypted updates were added is here")
        return
    added = 0
    for round, closed in sorted(closes.items()):
        of_this = [one for one in ours if (one.said.round, one.said.attempt) == (round, closed.said.attempt)]
        yield from _close(closed, of_this, agreement)
        yield from _reveals(closed, of_this, agreement)
        for finding in _numbers(scope, closed, agreement):
            added += finding.level == "OK"
            yield finding
    yield A9.ok(
        f"{number_of(len(closes), 'sum')}, {added} of them added again: updates, opened means and averages agree"
    )


def _close(closed: Folder, folders: list[Folder], agreement: Agreement) -> Iterator[Finding]:
    """Enough clients, and each with the update that it sent."""
    closing, parents = closed.said.closing or {}, closed.said.parents
    least = max(2, agreement.aggregation.min_clients or agreement.federation.clients)
    if len(closing) < least:
        yield A9.fail(closed.shown, f"is a sum of {number_of(len(closing), 'client')}", f"of {least} or more")
    if parents.keys() != {"broadcast", *closing}:
        yield A9.fail(closed.shown, f"was made of {', '.join(sorted(parents))}", f"the broadcast, {', '.join(closing)}")
    for one in folders:
        name = party_of(one.said.client or 0)
        if one.said.stage != "client-train" or ENCRYPTED not in one.said.files:
            continue
        if name not in closing:
            yield A9.warn(one.shown, "came after the close, or was left out: it is not in the sum")
        elif (one.sha256, one.said.files[ENCRYPTED].sha256) != (parents.get(name), closing[name]):
            yield A9.fail(one.shown, "is not the update that was added", f"{closing[name][:16]}...")


def _reveals(closed: Folder, folders: list[Folder], agreement: Agreement) -> Iterator[Finding]:
    """One client opened this very sum, and the average's manifest says so."""
    holder, closing = agreement.aggregation.key_holder, closed.said.closing or {}
    for one in folders:
        if one.said.stage == "reveal":
            if one.said.client != holder:
                yield A9.fail(one.shown, "is by a client without the key", f"client {holder}'s")
            if one.said.parents != {"close": closed.sha256}:
                yield A9.fail(one.shown, "is of another sum of this round", f"{closed.sha256[:16]}...")
        if one.said.stage == "aggregate" and not keeps_old(one.said):
            how = one.said.unmasking
            told = how and (how.survivors, how.revealed, how.count)
            expected = sorted(map(client_of, closing)), [holder], len(closing)
            if told != expected:
                yield A9.fail(one.shown, f"says of its sum: {told}", f"{expected}")


def _numbers(scope: Scope, closed: Folder, agreement: Agreement) -> Iterator[Finding]:
    """The sum added again from the updates, and the average made again from what was opened."""
    if scope.workspace is None or scope.members is None:
        yield A9.skip("the sum is not added again without the roster and the keys", where=closed.shown)
        return
    reader, round = Onlooker(scope.workspace), closed.said.round
    try:
        theta = received(scope.workspace.broadcast(round), by=reader, stage="broadcast", round=round)
        clients = sorted(client_of(name) for name in closed.said.closing or {})
        heads = {k: summing.head_of(reader, theta, k, only=[]) for k in clients}
        total = summing.add(reader, theta, heads, ignore)
        sent = received(closed.path, by=reader, stage="close", round=round)
        numbers = numbers_sent(theta, agreement)
        key, precision = (
            encryption_keys.public_key(scope.workspace, scope.members),
            precision_of(scope.workspace, numbers),
        )
        named = ckks.add(
            [], read(sent.contents[ENCRYPTED], sent.path / ENCRYPTED, ciphertexts_of(numbers)), key, precision
        )
        if not ckks.same(total, named):
            yield A9.fail(closed.shown, "is not the sum of the updates that it names", "their ciphertexts, added")
            return
        yield from _average(reader, theta, closed, agreement)
    except UsageProblem as problem:  # TenSEAL is not here
        yield A9.skip(f"the sum is not added again: {problem.message}", where=closed.shown)
    except (Problem, OSError) as problem:
        yield A9.skip(f"the sum is not added again: {said_by(problem)}", where=closed.shown)
    else:
        yield A9.ok(f"the sum of {number_of(len(clients), 'update')}, added again", where=closed.shown)


def _average(reader: Onlooker, theta: Artefact, closed: Folder, agreement: Agreement) -> Iterator[Finding]:
    """What was opened is a mean, and the average is the broadcast with it, where nothing else changed that."""
    workspace, round, holder = reader.workspace, closed.said.round, agreement.aggregation.key_holder
    place, opened = workspace.aggregate(round), workspace.reveal(round, holder or 0)
    if not opened.exists():
        return
    factors, lora = agreement.sent_in(round), agreement.slm.lora
    before = flat(part_of(read_adapter(theta, None, lora), factors))
    reveal = received(opened, by=reader, stage="reveal", round=round, client=holder, only=[OPENED])
    try:
        mean = summing.mean_of(reveal, before.size, agreement.aggregation.max_update_value)
    except Problem as problem:
        yield A9.fail(workspace.shown(opened / OPENED), problem.message, "a mean that clients can have sent")
        return
    if agreement.aggregation.server != "none" or not place.exists():
        return
    average = received(place, by=reader, stage="aggregate", round=round)
    if keeps_old(average.manifest) or "close" not in average.manifest.parents:
        return
    expected = (before + mean.astype(np.float64)).astype(np.float32)
    if not np.array_equal(flat(part_of(read_adapter(average, None, lora), factors)), expected):
        yield A9.fail(
            workspace.shown(place), "is not the broadcast with the opened mean", "their sum, number for number"
        )
