"""push and pull: what pack and unpack carry, by way of a remote; the file that makes a folder count goes up last.

push reads exchange/, pull writes there; both by the checks of bundles. Names on the remote are those below exchange/,
built from the agreement.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError

from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import inbox
from stages.exchange import parcel_checks, parcels
from stages.exchange.parcel_kinds import CONTENTS, Kind, Parcel
from stages.exchange.remote import Remote
from stages.exchange.unpack import put_in_place
from stages.files import reading
from stages.runtime.errors import Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import ENCRYPTED, MANIFEST, SIGNATURE
from stages.workspace.paths import Workspace


@dataclass
class Moved:
    """Folders and files, from exchange/ down: moved now, there already, and not whole on the remote yet.

    size_bytes: of those that were moved. With dry_run nothing is, and they are those that would be.
    """

    dry_run: bool = False
    moved: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, name: str, size_bytes: int) -> None:
        """One more that was moved."""
        self.moved.append(name)
        self.size_bytes += size_bytes


def made_by(workspace: Workspace, client: int | None, round: int | None = None) -> Iterator[Parcel]:
    """All that a party can send; client: None is the server. round: that of one alone."""
    federation, sends = workspace.agreement.federation, []
    if round is None:
        yield Parcel("federation") if client is None else Parcel("keys", client=client)
    names: tuple[Kind, ...] = ("vocabulary-server", "broadcast", "server", "close")
    if client is not None:
        names = ("vocabulary-client", "client", "adapter-client", "reveal")
    for t in range(1, federation.rounds + 1) if round is None else [workspace.check_round(round)]:
        sends += [Parcel(kind, t, client or 0) for kind in names if t == 1 or not kind.startswith("vocabulary")]
    for parcel in sends:
        has_none = parcel.kind == "adapter-client" and not workspace.agreement.averages
        if parcel.stage(workspace) is not None and not has_none:
            yield parcel


def needed_by(workspace: Workspace, client: int | None, round: int | None = None) -> Iterator[Parcel]:
    """All that a party takes from others: the server what clients make, a client what the server does, and keys."""
    if client is None:
        for k in workspace.clients:
            yield from made_by(workspace, k, round)
        return
    if round is None:
        yield from (Parcel("keys", client=k) for k in workspace.clients if k != client)
    yield from made_by(workspace, None, round)


def push(
    workspace: Workspace,
    *,
    client: int | None = None,
    round: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    report: Report = ignore,
) -> Moved:
    """Send what this party has made and the remote lacks; client: None is the server.

    dry_run: send nothing, and tell what would be. Raises Refused where other bytes are there, unless overwrite.
    """
    remote, found = Remote.of(workspace), Moved(dry_run)
    here = [
        one
        for one in made_by(workspace, client, round)
        if os.path.lexists(one.folder(workspace) / _last(one, workspace))
    ]
    for number, parcel in enumerate(here, 1):
        shown = _shown(parcel, workspace)
        contents = parcels.collected(parcel, workspace)
        parcel_checks.check(parcel, contents, workspace, parcel.folder(workspace))
        _send(parcel, contents, workspace, remote, overwrite=overwrite, found=found)
        report(Event("step", shown, number, len(here)))
    if not found.moved:
        report(Event("note", "already done"))
    return found


def _send(
    parcel: Parcel,
    contents: dict[str, bytes],
    workspace: Workspace,
    remote: Remote,
    *,
    overwrite: bool,
    found: Moved,
) -> None:
    last, shown = _last(parcel, workspace), _shown(parcel, workspace)
    commit = parcel.name(workspace, last)
    is_there = remote.size(commit) is not None
    if is_there:
        if _is(remote, commit, contents[last]):
            found.already.append(shown)
            return
        if not overwrite:
            mend = "find out which is right; to send this one, give the command again with --overwrite"
            raise Refused(f"{shown} is there already, with other bytes", where=remote.shown(commit), mend=mend)
    if found.dry_run:
        found.add(shown, sum(map(len, contents.values())))
        return
    if is_there:
        remote.remove(commit)
    for file in sorted(contents, key=lambda name: (name == last, name)):
        name = parcel.name(workspace, file)
        if not _is(remote, name, contents[file]):
            remote.write(name, contents[file])
    found.add(shown, sum(map(len, contents.values())))


def _is(remote: Remote, name: str, content: bytes) -> bool:
    """Whether a file of the remote is these bytes: of another size, it is not read."""
    return remote.size(name) == len(content) and remote.read(name, len(content)) == content


def pull(
    workspace: Workspace,
    *,
    client: int | None = None,
    round: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    report: Report = ignore,
) -> Moved:
    """Fetch what others have sent and this party needs, each folder checked as unpack checks it, whole or not at all.

    client: None is the server. What is not whole on the remote yet is named as waiting. dry_run: fetch nothing, and
    tell what would be, as manifests on the remote say it. Raises Damaged and Refused as unpack does.
    """
    remote, found = Remote.of(workspace), Moved(dry_run)
    wanted = list(needed_by(workspace, client, round))
    for number, parcel in enumerate(wanted, 1):
        _fetch(parcel, workspace, remote, client=client, overwrite=overwrite, found=found)
        report(Event("step", _shown(parcel, workspace), number, len(wanted)))
    again = Command("pull", client=client, server=client is None)
    for name in found.waiting:
        report(Event("note", f"{name} is not whole on the remote yet; later: `{again}`"))
    return found


def _fetch(
    parcel: Parcel, workspace: Workspace, remote: Remote, *, client: int | None, overwrite: bool, found: Moved
) -> None:
    last, shown = _last(parcel, workspace), _shown(parcel, workspace)
    commit = parcel.name(workspace, last)
    if remote.size(commit) is None:
        return
    first = remote.read(commit, reading.LARGEST_JSON_BYTES)
    if _is_here(parcel, workspace, last, first):
        found.already.append(shown)
        return
    contents_of = CONTENTS.get(parcel.stage(workspace) or "", set())
    if parcel.kind == "close" and client is not None:  # its own inbox; or the encrypted sum, to the one that opens it
        opens = workspace.agreement.aggregation.key_holder == client
        contents_of = {ENCRYPTED} if opens else {inbox(client)}
    names = {MANIFEST, SIGNATURE} | contents_of
    names = names if parcel.is_folder else set(parcel.public_files(workspace))
    sizes = {file: size for file in sorted(names) if (size := remote.size(parcel.name(workspace, file))) is not None}
    listed = _listed(first) if parcel.is_folder else dict.fromkeys(names, 0)
    if parcel.kind == "close" and not contents_of & listed.keys():
        return
    if any(sizes.get(file, -1) < size for file, size in listed.items() if file in names):
        found.waiting.append(shown)
        return

    if found.dry_run:
        found.add(shown, sum(sizes.values()))
        return

    def read(file: str) -> bytes:
        return first if file == last else remote.read(parcel.name(workspace, file), sizes[file])

    where = workspace.exchange / shown
    parcel_checks.check_first(parcel, sizes, read, workspace, where)
    contents = {file: read(file) for file in sizes}
    parcel_checks.check(parcel, contents, workspace, where)
    put = put_in_place({parcel: contents}, workspace, called="the remote", overwrite=overwrite)
    if put.unpacked:
        found.add(shown, sum(sizes.values()))
    else:
        found.already.append(shown)


def _is_here(parcel: Parcel, workspace: Workspace, last: str, content: bytes) -> bool:
    path = parcel.folder(workspace) / last
    is_alike = path.is_file() and not path.is_symlink() and path.stat().st_size == len(content)
    return is_alike and reading.read(path, limit_bytes=len(content)) == content


def _listed(content: bytes) -> dict[str, int]:
    """The files that a manifest names, and their sizes; none where it is no manifest, which the checks then say."""
    try:
        manifest = Manifest.model_validate(reading.parse_json(content))
    except (ValidationError, ValueError, RecursionError, json.JSONDecodeError):
        return {}
    return {name: entry.size_bytes for name, entry in manifest.files.items()}


def _last(parcel: Parcel, workspace: Workspace) -> str:
    """The file whose arrival makes the others count."""
    return MANIFEST if parcel.is_folder else parcel.public_files(workspace)[-1]


def _shown(parcel: Parcel, workspace: Workspace) -> str:
    return parcel.name(workspace, "" if parcel.is_folder else _last(parcel, workspace))
