"""A1, the chain: every manifest is ours, at its place, made from what lies there, and none contradicts another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stages.artefacts.lineage import has_attempt, lies_at, parent_place, round_of_parent, short
from stages.artefacts.reading import read_manifest
from stages.audit.check_signatures import A1, roster_of, signature_of
from stages.audit.checks import Finding, number_of
from stages.audit.folders import Folder, Scope
from stages.audit.parts import is_kept
from stages.runtime.errors import Problem
from stages.workspace import edits
from stages.workspace.commands import Command
from stages.workspace.layout import broadcast_in
from stages.workspace.names import ADAPTER_WEIGHTS, AGREEMENT, RESIDUAL, round_name

TAKEN_IN = {
    "aggregate": (("client-train", "client-distill"), "is not in the average"),
    "co-distill": (("share-knowledge",), "is not in what the LLM learned from"),
}
"""What a step of the server takes in of every client in a round, and what is said of one that it did not."""


def manifest_of(folder: Folder) -> Iterator[Finding]:
    """Of one folder: that its manifest can be read, belongs where it lies, and was made under this agreement."""
    manifest = folder.manifest
    if manifest is None:
        if folder.is_ours:
            yield A1.fail(folder.shown, folder.problem, "a manifest of this tool")
        else:
            yield A1.skip("no manifest: another tool made it", where=folder.shown)
        return
    claims_to_be = folder.claims_to_be
    if folder.place and lies_at(folder.path, claims_to_be) != claims_to_be and not is_kept(folder):
        yield A1.fail(folder.shown, f"it says it is {claims_to_be}", lies_at(folder.path, claims_to_be))
    agreement, workspace = folder.scope.agreement, folder.scope.workspace
    if agreement is None or workspace is None:
        return
    claims: list[tuple[str, object, object]] = [
        ("federation", manifest.federation, agreement.federation.name),
        (f"agreement, the sha256 of {AGREEMENT}", manifest.agreement_sha256, workspace.agreed_in(manifest.round)),
    ]
    for name, found, expected in claims:
        if found != expected:
            edited = edits.since(workspace, manifest.agreement_sha256)
            said = f"; edited since: {edited}" if edited and name != "federation" else ""
            yield A1.fail(folder.shown, f"is of another {name}: {short(found)}{said}", short(expected))
    yield from signature_of(folder)
    numbers = [("round", manifest.round, agreement.federation.rounds)]
    numbers += [("client", manifest.client, agreement.federation.clients)] if manifest.client else []
    for name, number, last in numbers:
        if number > last:
            yield A1.fail(folder.shown, f"is of {name} {number}", f"{name} 1 to {last}")


def chain(folders: list[Folder], scopes: list[Scope], client: int | None) -> Iterator[Finding]:
    """Of all folders together: parents, forks, one federation and one base for each model; and the roster."""
    for scope in scopes:
        if scope.workspace and scope.agreement is None:
            yield A1.fail(AGREEMENT, f"cannot be read: {Command('status')} says why", "the agreement")
        yield from roster_of(scope, client)
    ours = [folder for folder in folders if folder.manifest]
    yield from _forks(ours)
    yield from _agreement(ours)
    known = {folder.path: folder for folder in ours}
    earlier, sent = _earlier(ours), _sent(ours)
    elsewhere: list[str] = []
    for folder in ours:
        if folder.path in earlier:
            yield A1.skip("is of an earlier attempt at its round, which counts no more", where=folder.shown)
        for name, digest in folder.said.parents.items():
            parent = parent_of(folder, name)
            here = parent and (known[parent].sha256 if parent in known else _digest(parent))
            if not here:
                elsewhere.append(f"{name} for {folder.place or folder.shown}")
            elif folder.path in earlier:
                continue
            elif here != digest and parent:
                found = f"was made from another {name} than lies in {folder.scope.shown(parent)}: {short(digest)}"
                yield A1.fail(folder.shown, found, short(here))
        yield from _left_out(folder, sent, earlier)
        yield from _other_weights(folder, known)
    if ours:
        yield _summary(ours, elsewhere)


def _earlier(ours: list[Folder]) -> set[Path]:
    """Those of an attempt at their round that was given up: the broadcast beside them is of a later one."""
    found, attempts = set(), dict[Path, int]()
    for folder in ours:
        manifest, workspace = folder.said, folder.scope.workspace
        if not has_attempt(manifest) or folder.place is None:
            continue
        path = workspace.broadcast(manifest.round) if workspace else broadcast_in(folder.path.parent)
        if path not in attempts:
            try:
                attempts[path] = read_manifest(path)[0].attempt
            except (Problem, OSError):
                attempts[path] = 0
        if manifest.attempt < attempts[path]:
            found.add(folder.path)
    return found


def _round_of(folder: Folder) -> tuple[str, int]:
    return folder.said.federation, folder.said.round


def _sent(ours: list[Folder]) -> dict[tuple[str, int], list[Folder]]:
    """What clients have sent, by its federation and round."""
    found: dict[tuple[str, int], list[Folder]] = {}
    for folder in ours:
        if folder.said.client and not is_kept(folder):
            found.setdefault(_round_of(folder), []).append(folder)
    return found


def parent_of(folder: Folder, name: str) -> Path | None:
    """Where a parent of this name belongs: in the workspace, or in the same exchange. None if that cannot be told."""
    manifest, workspace = folder.said, folder.scope.workspace
    if folder.place is None:
        return None
    if workspace is None:
        return folder.path.parents[1] / round_name(round_of_parent(manifest, name)) / name
    return parent_place(workspace, manifest, name)


def _digest(folder: Path) -> str:
    """The digest of a manifest that is not among those looked at; empty where none can be read."""
    try:
        return read_manifest(folder)[1]
    except (Problem, OSError):
        return ""


def _forks(ours: list[Folder]) -> Iterator[Finding]:
    """Two folders that claim to be the same step of the same federation, and are not the same bytes."""
    first: dict[tuple[str, str, bool], Folder] = {}
    for folder in ours:
        manifest, claims_to_be = folder.said, folder.claims_to_be
        same = first.setdefault((manifest.federation, claims_to_be, is_kept(folder)), folder)
        if same.sha256 != folder.sha256:
            found = f"contradicts {same.shown}: both say they are {claims_to_be}, sha256 {short(folder.sha256)}"
            yield A1.fail(folder.shown, found, short(same.sha256))


def _agreement(ours: list[Folder]) -> Iterator[Finding]:
    """Folders of one federation that differ in the agreement, the base model or the shape of the adapter."""
    agreed: dict[tuple[str, str, str], Folder] = {}
    first: dict[tuple[str, str, int | None], Folder] = {}
    for folder in ours:
        manifest = folder.said
        workspace = folder.scope.workspace
        until_fork = workspace.as_agreed if workspace else ""
        same = agreed.setdefault((manifest.federation, manifest.role, until_fork), folder)
        model = first.setdefault((manifest.federation, manifest.role, folder.owner), folder)
        for name, before in (("agreement_sha256", same), ("base", model), ("lora", model)):
            other = before.said
            is_same = getattr(manifest, name) == getattr(other, name)
            if not is_same and not (name == "base" and manifest.base.is_of(other.base)):
                yield A1.fail(folder.shown, f"has another {name} than {before.shown}", "the same in all folders")


def _left_out(folder: Folder, sent: dict[tuple[str, int], list[Folder]], earlier: set[Path]) -> Iterator[Finding]:
    """Updates of a round that are here and not in its average; what clients told, and the LLM did not learn from."""
    manifest = folder.said
    if manifest.stage not in TAKEN_IN:
        return
    stages, said = TAKEN_IN[manifest.stage]
    for other in sent.get(_round_of(folder), []):
        update = other.said
        name = other.claims_to_be.removeprefix(f"{round_name(update.round)}/")  # of what a client keeps it stays a path
        is_missing = update.stage in stages and "/" not in name and name not in manifest.parents
        if is_missing and other.path not in earlier:
            yield A1.warn(other.shown, f"{said} of its round: it came too late, or was left out")


def _other_weights(folder: Folder, ours: dict[Path, Folder]) -> Iterator[Finding]:
    """A broadcast that sends other weights than those of the adapter it says that it was made from."""
    if folder.said.stage != "broadcast":
        return
    own = folder.said.files
    for name, digest in folder.said.parents.items():
        place = parent_of(folder, name)
        parent = ours.get(place) if place else None
        if parent is None or parent.sha256 != digest:
            continue
        for file, named in parent.said.files.items():
            found = own[file].sha256 if file in own else ""
            if file in (ADAPTER_WEIGHTS, RESIDUAL) and named.sha256 != found:
                yield A1.fail(folder.file(file), f"is not that of {parent.shown}: {short(found)}", short(named.sha256))


def _summary(ours: list[Folder], elsewhere: list[str]) -> Finding:
    manifests = [folder.said for folder in ours]
    rounds = sorted({manifest.round for manifest in manifests})
    names = ", ".join(sorted({manifest.federation for manifest in manifests}))
    said = f"federation {names}, {_rounds(rounds)}: {number_of(len(ours), 'manifest')}"
    keys = {(folder.scope.path, folder.said.party) for folder in ours if folder.scope.members}
    said += f" signed by {number_of(len(keys), 'key')}" if keys else ""
    if elsewhere:
        return A1.ok(f"{said}; {number_of(len(elsewhere), 'parent')} not on this machine: {_some(elsewhere)}")
    return A1.ok(f"{said}, every parent is here" + (", back to round 1" if rounds[0] == 1 else ""))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _rounds(rounds: list[int]) -> str:
    return f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {rounds[0]} to {rounds[-1]}"
