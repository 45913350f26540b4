"""A8, secrets: no key lies in the workspace, which a copy carries along; none is damaged or open to others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.audit.checks import Check, Finding
from stages.audit.folders import READ, Folder, Scope, every_file, kind_of, said_by
from stages.files import reading
from stages.parties.party import all_of
from stages.runtime.errors import Problem
from stages.workspace.names import SECRETS_MARKER
from stages.workspace.paths import Workspace

A8 = Check("A8", "secrets")

NAMES = ("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "identity.key", "ratchet.json", ".netrc", ".htpasswd")
ENDINGS = (".key", ".p12", ".pfx", ".jks", ".keystore")
PRIVATE_KEY = b"PRIVATE KEY-----"
LARGEST_KEY_FILE_BYTES = 1 << 20
"""Larger files hold weights and rows; keys are small."""


def secrets_of(folder: Folder) -> Iterator[Finding]:
    """Of one folder, whose bytes are in memory."""
    for name, content in folder.contents.items():
        if len(content) <= LARGEST_KEY_FILE_BYTES and PRIVATE_KEY in content and not _is_named_so(name):
            yield A8.fail(folder.file(name), "holds a private key", "keys outside the workspace")


def secrets_in(scope: Scope, folders: Iterable[Folder]) -> Iterator[Finding]:
    """Anywhere under the workspace, or the folder that was named. folders: what secrets_of has seen of it."""
    top = scope.workspace.root if scope.workspace and scope.is_workspace else scope.path
    seen = {f"{folder.path}/{name}" for folder in folders for name in folder.names if name.endswith(READ)}
    seen -= {f"{folder.path}/{name}" for folder in folders for name in folder.unreadable}
    for place in every_file(top):
        if place in seen and not _is_named_so(place.rpartition("/")[2]):
            continue
        path = Path(place)
        status = path.lstat()
        if kind_of(status):
            continue
        if path.name == SECRETS_MARKER:
            yield A8.fail(scope.shown(path.parent), "is a folder of secret keys", "keys outside the workspace")
        elif _is_named_so(path.name):
            yield A8.fail(scope.shown(path), "is named like a secret key", "keys outside the workspace")
        elif place not in seen and status.st_size <= LARGEST_KEY_FILE_BYTES and PRIVATE_KEY in _content(path):
            yield A8.fail(scope.shown(path), "holds a private key", "keys outside the workspace")
    yield A8.ok("no key lies here")


def _is_named_so(name: str) -> bool:
    return name == SECRETS_MARKER or name in NAMES or name.endswith(ENDINGS)


def _content(path: Path) -> bytes:
    try:
        return reading.read(path, limit_bytes=LARGEST_KEY_FILE_BYTES)
    except (Problem, OSError):
        return b""


def vaults_of(workspace: Workspace) -> Iterator[Finding]:
    """The folders of keys that parties of this workspace have on this machine: outside it, and their owner's alone."""
    found = 0
    for party in all_of(workspace):
        try:
            found += party.vault is not None
            for fault in party.vault.faults() if party.vault else ():
                yield A8.fail(str(fault.where), fault.message, "the secret as it was written")
        except (Problem, OSError) as problem:
            where = problem.where if isinstance(problem, Problem) else problem.filename
            yield A8.fail(str(where), said_by(problem), "0700, its files 0600, outside every workspace")
    if not found:
        yield A8.skip("modes of the folder of keys: no keys on this machine")
