"""A2, the files: every byte is the one its manifest names, and nothing lies there that has no place there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stages.artefacts.reading import expected_names
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import FOLDER, PICKLES, READ, Folder, Scope, every_file, kind_of
from stages.files import reading
from stages.progress import damage
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, SEALED_INBOX, SIGNATURE, signature_beside

A2 = Check("A2", "files")


def files_of(folder: Folder) -> Iterator[Finding]:
    """Of one folder: what it holds against what its manifest names."""
    for name, why in folder.unreadable.items():
        yield A2.fail(folder.file(name), why, "a plain file")
    if folder.manifest is None:
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if name not in folder.names:
                yield A2.fail(folder.file(name), "is missing")
        yield A2.skip("sha256 and sizes: no manifest", where=folder.shown)
        named = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    else:
        named = set(folder.manifest.files)
        expected = expected_names(folder.manifest)
        others, known = 0, {ADAPTER_WEIGHTS: folder.weights_sha256}
        for name, entry in folder.manifest.files.items():
            content = folder.contents.get(name)
            if (expected is not None and name not in expected) or not name.endswith(READ):
                yield A2.fail(folder.file(name), "is named by the manifest", "no such file in such a folder")
            elif name not in folder.names and _is_sealed_to_another(name, folder):
                others += 1
            elif name not in folder.names:
                yield A2.fail(folder.file(name), "is missing", f"sha256 {entry.sha256[:16]}...")
            elif content is not None and len(content) != entry.size_bytes:
                yield A2.fail(folder.file(name), number_of(len(content), "byte"), str(entry.size_bytes))
            elif content is not None and (found := known.get(name) or reading.sha256(content)) != entry.sha256:
                yield A2.fail(folder.file(name), f"sha256 {found[:16]}...", f"{entry.sha256[:16]}...")
        if others:
            found = f"{number_of(others, 'file')} sealed to other clients: not here, as `pack --to` leaves them out"
            yield A2.skip(found, where=folder.shown)
    for name in folder.names:
        if name not in named | {MANIFEST, SIGNATURE} and name not in folder.unreadable:
            yield from _superfluous(folder.path / name, folder.file(name))


def _is_sealed_to_another(name: str, folder: Folder) -> bool:
    """Whether a file of a close may be elsewhere: it is sealed to a client that does not act here, nor does the server.

    Who acts in a workspace has a folder in private/. Outside of every workspace nobody does.
    """
    sealed = re.fullmatch(SEALED_INBOX, name)
    if folder.manifest is None or folder.manifest.stage != "close" or sealed is None:
        return False
    workspace = folder.scope.workspace
    parties = ("server", f"client-{sealed[1]}")
    return workspace is None or not any((workspace.private / party).exists() for party in parties)


def files_between(folders: list[Folder], scopes: list[Scope], client: int | None) -> Iterator[Finding]:
    """What lies in the exchange outside the folders that were read; and how much was looked at."""
    read = {str(folder.path) for folder in folders}
    total = sum(len(folder.names) for folder in folders)
    for scope in scopes:
        if not scope.exchanged.is_dir():
            continue
        for place in every_file(scope.exchanged):
            if place.rpartition("/")[0] in read or not scope.concerns(path := Path(place), client):
                continue
            total += 1
            if not _belongs(path, scope) or kind_of(path.lstat()):
                yield from _superfluous(path, scope.shown(path))
        yield from _records(scope, client)
    yield A2.ok(f"{number_of(total, 'file')} in {number_of(len(folders), 'folder')}, all sha256 and sizes match")


def _records(scope: Scope, client: int | None) -> Iterator[Finding]:
    """Of a whole workspace: results, private logs, rows and checkpoints against the digests that were written down."""
    if scope.workspace is None or scope.agreement is None or not scope.is_workspace:
        return
    for path, found, expected in damage.faults(scope.workspace):
        if scope.concerns(path, client):
            yield A2.fail(scope.shown(path), found, expected)


def _belongs(path: Path, scope: Scope) -> bool:
    """Whether a file outside the rounds is one that the exchange has."""
    if scope.workspace is None:
        return False
    federation = scope.workspace.federation
    keys = scope.workspace.public_keys(1).parent
    return path in (federation, signature_beside(federation)) or (
        path.parent == keys and path.name.removesuffix(".sig").endswith(".json")
    )


def _superfluous(path: Path, shown: str) -> Iterator[Finding]:
    """A file that nothing names: how bad it is depends on what it is."""
    kind = kind_of(path.lstat())
    if kind == FOLDER:
        yield A2.warn(shown, "no manifest names it")
    elif kind:
        yield A2.fail(shown, f"is {kind}", "a plain file")
    elif path.name.endswith(PICKLES):
        yield A2.fail(shown, "may run code when it is loaded", "safetensors and JSON alone")
    elif any(part.startswith(".") for part in path.parts[-3:]):
        yield A2.warn(shown, "a draft, left by a copy or a command that was stopped")
    else:
        yield A2.warn(
            shown,
            "no manifest names it" + ("" if path.name.endswith(READ) else ", and it is neither safetensors nor JSON"),
        )
