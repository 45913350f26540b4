"""What is carried from party to party: the folders and files of exchange/, known by round and client, and checked.

A name from outside is looked at, never used: it is taken apart into a round and a client, and the path is built from
these as every other path here. A folder is checked in memory, before it is sent and before it is put in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from stages.exchange.parcel_checks import check_first
from stages.exchange.parcel_kinds import OF_NO_CLIENT, Parcel
from stages.files import reading
from stages.runtime.errors import Damaged, Refused
from stages.workspace.names import (
    SEALED_INBOX,
    SECRETS_MARKER,
)
from stages.workspace.paths import Workspace

PRIVATE_KEY = b"PRIVATE KEY-----"
"""Stands in the first line of every secret key in PEM."""

FOLDER = "broadcast|close|client|reveal|server|vocabulary-server|vocabulary-client|adapter-client"
NAME = re.compile(rf"round-(\d{{4,6}})/({FOLDER})(?:-(\d{{1,9}}))?/([a-z_.0-9-]+)", re.ASCII)
KEYS = re.compile(r"keys/client-(\d{1,9})\.json(?:\.sig)?", re.ASCII)


T = TypeVar("T")


def sorted_out(members: Mapping[str, T], workspace: Workspace, where: Path) -> dict[Parcel, dict[str, T]]:
    """The files of a bundle, or their sizes, by what they belong to.

    Raises Refused for a name that is not exchanged here.
    """
    parcels: dict[Parcel, dict[str, T]] = {}
    for name, content in members.items():
        parcel, file = _parse(name, workspace)
        if parcel is None:
            rounds, clients = workspace.agreement.federation.rounds, len(workspace.clients)
            message = (
                f"{name} is nothing that this federation exchanges: it has {rounds} rounds, clients 1 to {clients}"
            )
            raise Refused(message, where=where, mend="unpack it in the workspace that it was made for")
        parcels.setdefault(parcel, {})[file] = content
    return dict(sorted(parcels.items()))


def _parse(name: str, workspace: Workspace) -> tuple[Parcel | None, str]:
    """What a name from outside stands for; None unless it is exactly how we would spell that ourselves."""
    file = name.rpartition("/")[2]
    parcel = Parcel("federation")
    if found := NAME.fullmatch(name):
        parcel = Parcel(found[2], int(found[1]), int(found[3] or 0))  # type: ignore[arg-type]
    elif found := KEYS.fullmatch(name):
        parcel = Parcel("keys", client=int(found[1]))
    has_round = parcel.round in range(1, workspace.agreement.federation.rounds + 1) or not parcel.is_folder
    has_client = parcel.client in workspace.clients or parcel.kind in OF_NO_CLIENT
    if has_round and has_client and parcel.takes(file, workspace) and parcel.name(workspace, file) == name:
        return parcel, file
    return None, file


def collected(parcel: Parcel, workspace: Workspace, *, to: int | None = None) -> dict[str, bytes]:
    """What lies in a folder that is to be sent, or the public files. Hidden files of rsync and the like stay behind.

    to: of a close, only what is for this client. Raises Refused where a secret lies, Damaged for a file
    that has no place.
    """
    folder = parcel.folder(workspace)
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder.name} is no folder, or a link to one", where=folder, mend="put the folder itself there")
    names = sorted(path.name for path in folder.iterdir()) if parcel.is_folder else parcel.public_files(workspace)
    wanted = []
    for name in names:
        path = folder / name
        if parcel.is_folder and not parcel.takes(name, workspace):
            _refuse_stranger(path)
            continue
        sealed = re.fullmatch(SEALED_INBOX, name) if parcel.kind == "close" else None
        if sealed and to not in (None, int(sealed[1])):
            continue
        wanted.append(name)

    def read(name: str) -> bytes:
        return reading.read(folder / name, limit_bytes=reading.LARGEST_ADAPTER_BYTES, levels=parcel.levels)

    check_first(parcel, {name: (folder / name).lstat().st_size for name in wanted}, read, workspace, folder)
    contents = {name: read(name) for name in wanted}
    for name, content in contents.items():
        if PRIVATE_KEY in content:
            raise secret(folder / name)
    return contents


def _refuse_stranger(path: Path) -> None:
    if path.name == SECRETS_MARKER or path.suffix in (".pem", ".key"):
        raise secret(path)
    if not path.name.startswith("."):
        raise Damaged(f"{path.name} does not belong in {path.parent.name}", where=path, mend="take it out, then pack")


def secret(path: Path) -> Refused:
    """What is said of a secret key where files are packed."""
    mend = "move it out of the workspace, and make new keys: whoever has the folder may have read it"
    return Refused(f"{path.name} is or holds a secret key, which is never sent", where=path, mend=mend)
