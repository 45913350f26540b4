"""A1's signatures: who made each folder, by the keys of the roster, and whether that is the roster people agreed on."""

from __future__ import annotations

from collections.abc import Iterator

from stages.artefacts.lineage import check_signed
from stages.artefacts.reading import Artefact
from stages.audit.checks import Check, Finding
from stages.audit.folders import Folder, Scope, said_by
from stages.files import reading
from stages.parties import roster, roster_files
from stages.parties.agreed import check_tasks
from stages.parties.party import Party
from stages.runtime.errors import Problem
from stages.workspace import listing
from stages.workspace.names import MANIFEST, SIGNATURE
from stages.workspace.paths import Workspace

A1 = Check("A1", "chain")


def signature_of(folder: Folder) -> Iterator[Finding]:
    """That the party which made a folder signed its manifest, if the federation has a roster."""
    manifest, members, content = folder.manifest, folder.scope.members, folder.contents.get(MANIFEST)
    if manifest is None or members is None or content is None:
        return
    if manifest.federation_sha256 != members.sha256:
        found = f"{manifest.federation_sha256[:16]}..." if manifest.federation_sha256 else "none"
        yield A1.fail(folder.shown, f"is of another roster: {found}", f"{members.sha256[:16]}...")
    try:
        check_signed(Artefact(folder.path, manifest, content, folder.sha256, {}), members, manifest.party)
    except (Problem, OSError) as problem:
        yield A1.fail(folder.file(SIGNATURE), said_by(problem), f"the signature of {manifest.party}")


def roster_of(scope: Scope, client: int | None) -> Iterator[Finding]:
    """That the roster and the keys in the exchange are sound, and the very ones that parties here have pinned."""
    workspace = scope.workspace
    if workspace is None or not workspace.federation.exists():
        is_secure = scope.agreement is not None and scope.agreement.aggregation.is_hidden
        if workspace and is_secure and listing.has_rounds(workspace):
            yield A1.fail(
                scope.shown(workspace.federation), "is missing", "the roster, without which no round is secure"
            )
            return
        yield A1.skip("signatures: no keys of this federation are here")
        return
    try:
        federation, content = roster_files.read_federation(workspace.federation)
    except (Problem, OSError) as problem:
        yield A1.fail(scope.shown(workspace.federation), said_by(problem), "a roster signed by the server it names")
        return
    members = roster.Roster(federation, reading.sha256(content))
    for number in members.clients if client is None else [client]:
        path = workspace.public_keys(number)
        try:
            if path.exists() and number in members.clients:
                members.prekeys(workspace, number)
        except (Problem, OSError) as problem:
            yield A1.fail(scope.shown(path), said_by(problem), "the keys that the roster names")
    if scope.is_workspace:
        yield from _tasks_of(scope, workspace, federation)
    pinned = dict(_pinned(workspace, members.clients))
    for party, digest in pinned.items():
        if digest != members.sha256:
            found = f"is not the roster that {party} has pinned: {members.sha256[:16]}..."
            yield A1.fail(scope.shown(workspace.federation), found, f"{digest[:16]}...")
    if not pinned:
        missing = (
            f"nobody here has pinned it; its fingerprint, to compare with a client's: {roster.fingerprint(content)}"
        )
        yield A1.skip(f"whether the roster is the one people agreed on: {missing}")


def _tasks_of(scope: Scope, workspace: Workspace, federation: roster_files.Federation) -> Iterator[Finding]:
    if federation.tasks_sha256 is None:
        yield A1.skip("whether tasks/ is what people agreed on: this roster, of an earlier version, does not say")
    try:
        check_tasks(workspace, federation)
    except (Problem, OSError) as problem:
        yield A1.fail(scope.shown(workspace.tasks), said_by(problem), "the task files that the roster names")


def _pinned(workspace: Workspace, clients: list[int]) -> Iterator[tuple[str, str]]:
    """The parties whose keys are on this machine, and the digest of the roster that each has pinned."""
    for party in [Party.server(workspace), *(Party.client(workspace, number) for number in clients)]:
        try:
            content = party.pinned
        except (Problem, OSError):  # A8 says why
            continue
        if content is not None:
            yield party.name, reading.sha256(content)
