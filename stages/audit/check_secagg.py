"""A9, secure aggregation: from the files alone, that one sum was opened in each round, over those who sent it.

What an auditor cannot see, because it is sealed, is whether shares are sound: the server finds that when it unmasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from stages.artefacts.arrays import read_array
from stages.artefacts.manifest import Opening
from stages.artefacts.publishing import KEPT_OLD
from stages.artefacts.reading import Artefact, inbox
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder, Scope, said_by
from stages.parties.names import client as party_of
from stages.runtime.errors import Problem
from stages.secagg import masking, unmasking
from stages.secagg.one_round import transcript_of
from stages.workspace.agreement import Agreement
from stages.workspace.averaging import threshold
from stages.workspace.names import MANIFEST, MASKED_UPDATE, SEALED_SHARES

A9 = Check("A9", "secagg")


def masked_of(folder: Folder) -> Iterator[Finding]:
    """Of one masked update: its vector is the one that it commits to, and there is a sealed row for each client."""
    manifest = folder.manifest
    if manifest is None or manifest.masking is None:
        return
    clients = len(manifest.masking.commit_pairs) + 1
    row = masking.sealed_row_bytes(clients)
    try:
        path = folder.path / MASKED_UPDATE
        shape = (manifest.parameters + 3,)
        vector = read_array(folder.contents.get(path.name, b""), path, name="y", kind="U32", shape=shape)
        found = hashlib.sha256(vector.data).hexdigest()
        if found != manifest.masking.y_sha256:
            said = f"is not the vector that its manifest commits to: {found[:16]}..."
            yield A9.fail(folder.file(path.name), said, f"{manifest.masking.y_sha256[:16]}...")
        path = folder.path / SEALED_SHARES
        read_array(folder.contents.get(path.name, b""), path, name="s", kind="U8", shape=(clients, row))
    except Problem as problem:
        yield A9.fail(folder.file(path.name), said_by(problem), "what a masked update holds")


def rounds_of(scope: Scope, folders: list[Folder]) -> Iterator[Finding]:
    """Of every round: how it was opened, masked, closed and revealed. folders: all of this scope."""
    if scope.agreement is not None and not scope.agreement.aggregation.is_secure:
        yield A9.skip(_readable(scope.agreement))
        return
    ours = [folder for folder in folders if folder.manifest]
    begins = {one.said.round: one for one in ours if one.said.stage == "broadcast" and one.said.opening}
    if not begins:
        yield A9.skip("no round that was opened for secure aggregation is here")
        return
    slot, before = -1, None
    for round, theta in sorted(begins.items()):
        opening = theta.said.opening
        assert opening is not None
        yield from _opening(theta, opening, scope, before if round > 1 else None)
        if opening.slot <= slot:
            found = f"is opened with keys {opening.slot}, after keys {slot} were used"
            yield A9.fail(theta.shown, found, "keys that no round had")
        slot, before = max(slot, opening.slot), theta
        if scope.members and len(opening.clients) < len(scope.members.clients):
            few = f"is opened for {len(opening.clients)} of {len(scope.members.clients)} clients: {opening.clients}"
            yield A9.warn(theta.shown, few, "all of the roster, unless --without was agreed on")
        least = scope.agreement.quorum(len(opening.clients)) if scope.agreement else opening.threshold
        yield from _round([one for one in ours if one.said.round == round], theta, opening, least)
    yield A9.ok(f"{number_of(len(begins), 'round')}: transcripts, commitments, closes and reveals agree")


def _readable(agreement: Agreement) -> str:
    """Of a federation without masks: what the server reads."""
    federation = agreement.federation
    if agreement.averages:
        return "plain mode: the server reads each client's update"
    if federation.clients_tell:
        return "FedMKT has no secure mode: the server reads what each client knows of public rows"
    return f"method {federation.method} has no secure mode: clients send neither updates nor what they know"


def _opening(theta: Folder, opening: Opening, scope: Scope, before: Folder | None) -> Iterator[Finding]:
    """Who may take part, how many must reveal, and what the round follows."""
    clients = opening.clients
    known = scope.members.clients if scope.members else clients
    least = scope.agreement.smallest_round if scope.agreement else threshold(len(known))
    if clients != sorted(set(clients) & set(known)) or len(clients) < least:
        yield A9.fail(theta.shown, f"is opened for clients {clients}", f"at least {least} of {known}")
    if opening.threshold != threshold(len(clients)):
        yield A9.fail(theta.shown, f"t={opening.threshold}", f"t={threshold(len(clients))}")
    if theta.said.round == 1 and scope.members and opening.previous_sha256 != scope.members.sha256:
        found = f"follows another roster: {opening.previous_sha256[:16]}..."
        yield A9.fail(theta.shown, found, f"{scope.members.sha256[:16]}...")
    follows = before and before.said.round == theta.said.round - 1
    if before and follows and opening.previous_sha256 != before.sha256:
        found = f"follows another broadcast than {before.shown}: {opening.previous_sha256[:16]}..."
        yield A9.fail(theta.shown, found, f"{before.sha256[:16]}...")
    if scope.workspace and scope.members:
        yield from _prekeys(theta, opening, scope)


def _prekeys(theta: Folder, opening: Opening, scope: Scope) -> Iterator[Finding]:
    assert scope.workspace is not None
    assert scope.members is not None
    for client, named in zip(opening.clients, opening.prekeys, strict=False):
        if client not in scope.members.clients or not scope.workspace.public_keys(client).exists():
            continue
        try:
            own = scope.members.prekeys(scope.workspace, client)
        except (Problem, OSError):  # A1 says why
            continue
        if own[opening.slot : opening.slot + 1] != [named]:
            yield A9.fail(theta.shown, f"names another key of {party_of(client)}", f"its own of slot {opening.slot}")


def _round(folders: list[Folder], theta: Folder, opening: Opening, least: int) -> Iterator[Finding]:
    """What was sent in one round, closed, and revealed. least: how many the agreement wants in its sum."""
    transcript = transcript_of(_artefact(theta))
    of_this = [one for one in folders if one.said.attempt == theta.said.attempt]  # A1 tells of earlier attempts
    masked = [one for one in of_this if one.said.masking]
    closes = [one for one in of_this if one.said.stage == "close"]
    reveals = [one for one in of_this if one.said.stage == "reveal"]
    for one in [*masked, *closes, *reveals]:
        if one.said.transcript != transcript:
            found = f"was made for another opening of the round: T {str(one.said.transcript)[:16]}..."
            yield A9.fail(one.shown, found, f"{transcript[:16]}...")
    yield from _commitments(masked, theta, opening)
    for closed in closes:
        yield from _close(closed, masked, opening, max(least, opening.threshold))
        yield from _reveals(closed, reveals, folders, opening)
    if not closes and reveals:
        yield A9.warn(reveals[0].shown, "reveals for a close that is not here")
    said = f"T {transcript[:8]}.., t={opening.threshold}, {len(masked)} of {len(opening.clients)} masked updates"
    survivors = f", {number_of(len(closes[0].said.closing or {}), 'survivor')}" if closes else ", not closed"
    yield A9.ok(f"{said}{survivors}, {number_of(len(reveals), 'reveal')}", where=f"round {theta.said.round:04d}")


def _commitments(masked: list[Folder], theta: Folder, opening: Opening) -> Iterator[Finding]:
    """Both ends of each pair commit to the same key, and everyone to one for everyone else."""
    committed: dict[int, dict[int, str]] = {}
    for folder in masked:
        manifest = folder.said
        assert manifest.masking is not None
        if manifest.client not in opening.clients:
            yield A9.fail(folder.shown, "is not of this round", f"one of clients {opening.clients}")
            continue
        pairs = manifest.masking.commit_pairs
        if pairs.keys() != {party_of(k) for k in opening.clients if k != manifest.client}:
            yield A9.fail(folder.shown, f"commits to keys with {', '.join(sorted(pairs))}", "all others of the round")
        committed[manifest.client] = {k: pairs[party_of(k)] for k in opening.clients if party_of(k) in pairs}
    for u, v in unmasking.disagreements(committed):
        found = f"clients {u} and {v} derived different pair keys"
        yield A9.fail(theta.shown, f"{found}: they were shown different rounds, or have damaged keys")


def _close(closed: Folder, masked: list[Folder], opening: Opening, least: int) -> Iterator[Finding]:
    """Enough survivors, each with the vector that it sent, and an inbox for each."""
    manifest = closed.said
    closing = manifest.closing or {}
    if len(closing) < least:
        yield A9.fail(closed.shown, f"closes over {number_of(len(closing), 'client')}", f"{least} or more")
    if strangers := sorted(closing.keys() - {party_of(k) for k in opening.clients}):
        yield A9.fail(closed.shown, f"closes over {', '.join(strangers)}", f"clients of {opening.clients}")
    numbers = [k for k in opening.clients if party_of(k) in closing]
    if set(manifest.files) != {inbox(k) for k in numbers}:
        yield A9.fail(closed.shown, f"has files {', '.join(sorted(manifest.files))}", "one for each survivor")
    for folder in masked:
        update = folder.said
        assert update.masking is not None
        assert update.client is not None
        named = closing.get(party_of(update.client))
        if named is None:
            yield A9.warn(folder.shown, "came after the close, or was left out: it stays masked")
        elif named != update.masking.y_sha256:
            found = f"closes over another vector of {party_of(update.client)}: {named[:16]}..."
            yield A9.fail(closed.shown, found, f"{update.masking.y_sha256[:16]}...")


def _reveals(closed: Folder, reveals: list[Folder], folders: list[Folder], opening: Opening) -> Iterator[Finding]:
    """Reveals are survivors', for this close; what the average says of them is so."""
    closing = closed.said.closing or {}
    for folder in reveals:
        if party_of(folder.said.client or 0) not in closing:
            yield A9.fail(folder.shown, "is by a client that the close does not name", "a survivor's")
        if folder.said.parents != {"close": closed.sha256}:
            yield A9.fail(folder.shown, "is for another close of this round", f"{closed.sha256[:16]}...")
    averages = [one for one in folders if one.said.stage == "aggregate" and KEPT_OLD not in one.said.metrics]
    for average in averages:
        how = average.said.unmasking
        if how is None:
            yield A9.fail(average.shown, "does not say how it was unmasked", "survivors and reveals")
            continue
        if {party_of(k) for k in how.survivors} != closing.keys() or how.count != len(how.survivors):
            found = f"is a sum over {how.survivors}, count {how.count}"
            yield A9.fail(average.shown, found, f"over {', '.join(closing)}, count {len(closing)}")
        if len(how.revealed) < opening.threshold or not set(how.revealed) <= set(how.survivors):
            found = f"was opened by {number_of(len(how.revealed), 'reveal')}, of {how.revealed}"
            yield A9.fail(average.shown, found, f"{opening.threshold} or more, of survivors")


def _artefact(folder: Folder) -> Artefact:
    return Artefact(folder.path, folder.said, folder.contents[MANIFEST], folder.sha256, {})
