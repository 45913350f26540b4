"""verify: walk the chain of manifests and signatures from round 1 on, and name the first broken link.

Reads every file of every folder that is on this machine. Writes nothing, loads no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.artefacts.lineage import has_attempt, parent_place
from stages.artefacts.manifest import Manifest, Stage
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.receiving import received
from stages.files import reading
from stages.parties import roster_files
from stages.parties.agreed import check_tasks
from stages.parties.party import Onlooker, Party, all_of
from stages.parties.roster import Roster
from stages.runtime.errors import NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace import listing
from stages.workspace.names import ADAPTER_WEIGHTS, RESIDUAL
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES


@dataclass(frozen=True)
class Verified:
    """What held: folders, signatures among them, the rounds, parents that are not on this machine, and whose roster.

    pinned_by: the party here that has pinned the roster; None where nobody has, or there is none.
    """

    folders: int
    signatures: int
    rounds: list[int]
    elsewhere: int
    pinned_by: str | None

    @property
    def as_text(self) -> str:
        """A sentence for people."""
        if not self.folders:
            return "nothing to verify: no folder is here yet"
        signed = f"{self.signatures} signed" if self.signatures else "none signed: this federation has no keys"
        whose = f", by the roster that {self.pinned_by} pinned" if self.pinned_by else ""
        if self.signatures and not self.pinned_by:
            whose = ", by the roster in exchange/, which nobody here has pinned"
        parents = "1 parent is" if self.elsewhere == 1 else f"{self.elsewhere} parents are"
        away = f"; {parents} not on this machine" if self.elsewhere else ""
        hold = "folder holds" if self.folders == 1 else "folders hold"
        return f"rounds {self.rounds[0]} to {self.rounds[-1]}: {self.folders} {hold}, {signed}{whose}{away}"


def verify(workspace: Workspace, *, report: Report = ignore) -> Verified:
    """Check every folder against its manifest, its signature, its place and the folders it was made from.

    Raises the problem of the first link that does not hold, in the order in which the rounds were made.
    """
    report(Event("stage", "verify"))
    pinned_by = next((party for party in all_of(workspace) if party.pinned is not None), None)
    reader = pinned_by or Onlooker(workspace)
    members = reader.members
    if members:
        _check_roster(workspace, members, pinned_by)
    elif workspace.agreement.aggregation.is_hidden and listing.has_rounds(workspace):
        message = f"{workspace.federation.name} is missing: in secure mode every folder is signed by who it names"
        mend = "copy the roster and its signature, exchange/federation.json and .sig, from the server"
        raise NotReady(message, where=workspace.federation, mend=mend)
    digests: dict[str, str] = {}
    weights: dict[str, str] = {}
    rounds: list[int] = []
    folders = elsewhere = 0
    for round in range(1, workspace.agreement.federation.rounds + 1):
        for folder, stage, client in _folders(workspace, round):
            if not folder.exists():
                continue
            here = listing.in_close(folder) if stage == "close" else None
            artefact = received(folder, by=reader, stage=stage, round=round, client=client, only=here)
            if _is_earlier(workspace, artefact.manifest):
                report(Event("note", f"{workspace.shown(folder)} is of an earlier attempt at its round"))
            else:
                _check_past(workspace, artefact, digests, members)
                elsewhere += _check_parents(workspace, folder, artefact.manifest, digests)
            _check_weights(workspace, artefact, weights)
            digests[workspace.shown(folder)] = artefact.sha256
            folders += 1
            rounds = sorted({*rounds, round})
            report(Event("step", workspace.shown(folder), step=folders))
    return Verified(folders, folders if members else 0, rounds, elsewhere, pinned_by.name if pinned_by else None)


def _folders(workspace: Workspace, round: int) -> Iterator[tuple[Path, Stage, int | None]]:
    """A round's folders in the order in which they are made; clients' readable adapters of secure mode among them."""
    yield workspace.broadcast(round), "broadcast", None
    if workspace.agreement.federation.learns_in_public:
        yield from _in_public(workspace, round)
        return
    for client in workspace.clients:
        for place in {workspace.client_adapter(round, client): None, workspace.client_update(round, client): None}:
            yield place, "client-train", client
    yield workspace.close(round), "close", None
    for client in workspace.clients:
        yield workspace.reveal(round, client), "reveal", client
    yield workspace.aggregate(round), "aggregate", None
    for role in ROLES:
        yield workspace.captured(round, role), "capture", None
    for place in (workspace.llm(round), workspace.slm(round)):
        yield place, "co-distill", None


def _in_public(workspace: Workspace, round: int) -> Iterator[tuple[Path, Stage, int | None]]:
    """Those of a round of FedMKT, after the broadcast; what was told before round 1 is of that."""
    parties = (None, *workspace.clients)
    if round == 1:
        for party in parties:
            yield workspace.vocabulary(party), "align", party
    for client in workspace.clients:
        yield workspace.client_trained(round, client), "client-train", client
        yield workspace.knowledge(round, client), "share-knowledge", client
    yield workspace.llm(round), "co-distill", None
    yield workspace.knowledge(round, None), "share-knowledge", None
    for client in workspace.clients:
        yield workspace.client_adapter(round, client), "client-distill", client
    yield workspace.aggregate(round), "aggregate", None


def _check_roster(workspace: Workspace, members: Roster, pinned_by: Party | None) -> None:
    """Raise Refused for another roster in exchange/ than the one pinned, Damaged for keys that it does not name."""
    path = workspace.federation
    if pinned_by and path.exists() and reading.sha256(roster_files.read_federation(path)[1]) != members.sha256:
        message = f"exchange/federation.json is another roster than the one that {pinned_by.name} has pinned"
        mend = "copy it again; if it stays, ask the server why it shows several rosters"
        raise Refused(message, where=path, mend=mend)
    check_tasks(workspace, members.federation)
    for client in members.clients:
        if workspace.public_keys(client).exists():
            members.prekeys(workspace, client)


def _is_earlier(workspace: Workspace, manifest: Manifest) -> bool:
    """Whether a folder belongs to an attempt at its round that the server has given up, so that it counts no more."""
    if not has_attempt(manifest) or not workspace.broadcast(manifest.round).exists():
        return False
    return manifest.attempt < read_manifest(workspace.broadcast(manifest.round))[0].attempt


def _check_past(workspace: Workspace, theta: Artefact, digests: dict[str, str], members: Roster | None) -> None:
    """Raise Refused for a round of secure aggregation that follows another one than the broadcast that lies here."""
    opening, round = theta.manifest.opening, theta.manifest.round
    if opening is None:
        return
    before = workspace.shown(workspace.broadcast(round - 1))
    expected = digests.get(before) if round > 1 else members and members.sha256
    if expected and opening.previous_sha256 != expected:
        followed = before if round > 1 else "roster"
        message = (
            f"{workspace.shown(theta.path)} follows another {followed} than lies here: "
            f"sha256 {opening.previous_sha256[:16]}..., here {expected[:16]}..."
        )
        raise Refused(message, where=theta.path, mend="copy both again from the server; if it stays, ask it why")


def _check_weights(workspace: Workspace, artefact: Artefact, weights: dict[str, str]) -> None:
    """Raise Refused for a broadcast of other weights than those of the adapter that it was made from, if that is here.

    weights: the sha256 of what every folder so far has of them, by its path; this one's are added.
    """
    manifest = artefact.manifest
    for file, what in ((ADAPTER_WEIGHTS, "other weights"), (RESIDUAL, f"another {RESIDUAL}")):
        if file not in manifest.files:
            continue
        own = weights[workspace.shown(artefact.path / file)] = manifest.files[file].sha256
        for name in manifest.parents if manifest.stage == "broadcast" else ():
            parent = parent_place(workspace, manifest, name)
            there = weights.get(workspace.shown(parent / file), own)
            if there != own:
                message = (
                    f"{workspace.shown(artefact.path)} has {what} than {workspace.shown(parent)}, which it says it was "
                    f"made from: sha256 {own[:16]}..., there {there[:16]}..."
                )
                mend = "ask the server what it sent; make the broadcast again"
                raise Refused(message, where=artefact.path, mend=mend)


def _check_parents(workspace: Workspace, folder: Path, manifest: Manifest, digests: dict[str, str]) -> int:
    """Raise Refused for a parent that is another one than lies here. Returns how many parents are not here."""
    elsewhere = 0
    for name, digest in manifest.parents.items():
        parent = workspace.shown(parent_place(workspace, manifest, name))
        if parent not in digests:
            elsewhere += 1
        elif digests[parent] != digest:
            message = (
                f"{workspace.shown(folder)} was made from another {parent} than lies here: "
                f"sha256 {digest[:16]}..., here {digests[parent][:16]}..."
            )
            mend = "one of the two was replaced since: copy both again, or make this again"
            raise Refused(message, where=folder, mend=mend)
    return elsewhere
