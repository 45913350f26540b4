"""unpack: put what another party packed into its place in the exchange.

Reads one bundle, once. Writes exchange/round-t/broadcast, close, client-k, reveal-k, server, vocabulary-* or adapter-*,
exchange/keys or the roster, whatever the bundle holds: each folder whole or not at all, and nothing unless everything
in the bundle is sound.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.artefacts.publishing import spare_strangers
from stages.exchange.bundles import Listing, read_bundle
from stages.files import reading, writing
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import MANIFEST
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.exchange.parcel_kinds import Parcel

Content = bytes | dict[str, bytes]
"""Of a file, or of a folder's files."""


@dataclass(frozen=True)
class Unpacked:
    """The paths, from the workspace down, that were put there and that were there already."""

    unpacked: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)


def unpack(workspace: Workspace, path: Path, *, overwrite: bool = False, report: Report = ignore) -> Unpacked:
    """Unpack a bundle.

    Raises Damaged for anything but a bundle of `pack`, Refused for one of another federation, agreement or round, and
    where other bytes are in its place, unless overwrite says to replace them.
    """
    from stages.exchange import invites, parcel_checks, parcels

    require(path, f"{path.name} is not there", f"name the bundle that has arrived: {Command('unpack', 'FILE')}")

    def check(listing: Listing, read: Callable[[str], bytes]) -> None:
        """Who made it and how large it is: before the bulk of it is read."""
        if invites.is_invite([one.name for one in listing.members]):
            message = f"{path.name} is an invitation, which a folder is made from"
            raise Refused(message, where=path, mend=invites.open_with(path))
        name = workspace.agreement.federation.name
        if listing.federation != name:
            message = f"{path.name} is of another federation: {listing.federation}, here it is {name}"
            raise Refused(message, where=path, mend="unpack it in the workspace that it was made for")
        sizes = parcels.sorted_out({one.name: one.size_bytes for one in listing.members}, workspace, path)
        for parcel, of in sizes.items():
            where = path / parcel.name(workspace, "")
            parcel_checks.check_first(parcel, of, partial(_read_member, read, parcel, workspace), workspace, where)

    bundle = read_bundle(path, check)
    sorted_out = parcels.sorted_out(bundle.members, workspace, path)
    for parcel, contents in sorted_out.items():
        parcel_checks.check(parcel, contents, workspace, path / parcel.name(workspace, ""))
    found = put_in_place(sorted_out, workspace, called=path.name, overwrite=overwrite)
    if not found.unpacked:
        report(Event("note", "already done"))
    return found


def put_in_place(
    sorted_out: Mapping[Parcel, dict[str, bytes]], workspace: Workspace, *, called: str, overwrite: bool
) -> Unpacked:
    """Write what has been checked, each folder whole or not at all; called: where it is from.

    Raises Refused, before anything is written, where other bytes are in a place, unless overwrite.
    """
    found = Unpacked()
    new: dict[Path, Content] = {}
    for parcel, contents in sorted_out.items():
        places = _places(parcel, contents, workspace)
        if all(_holds(place, content) for place, content in places.items()):
            found.already.extend(map(workspace.shown, places))
            continue
        taken = [place for place, content in places.items() if os.path.lexists(place) and not _holds(place, content)]
        if taken and not overwrite:
            message = f"{workspace.shown(taken[0])} is there already, and is not what {called} holds"
            whose = "the bundle's" if called != "the remote" else "the remote's"
            mend = f"find out which is right; to take {whose}, give the command again with --overwrite"
            raise Refused(message, where=taken[0], mend=mend)
        new |= places
    for place, content in new.items():
        _put(place, content, workspace)
        found.unpacked.append(workspace.shown(place))
    return found


def _read_member(read: Callable[[str], bytes], parcel: Parcel, workspace: Workspace, file: str) -> bytes:
    return read(parcel.name(workspace, file))


def _places(parcel: Parcel, contents: dict[str, bytes], workspace: Workspace) -> dict[Path, Content]:
    """What goes where: a whole folder, its manifest written last; or two files, the signature first."""
    folder = parcel.folder(workspace)
    if parcel.is_folder:
        return {folder: {name: contents[name] for name in sorted(contents, key=lambda name: (name == MANIFEST, name))}}
    return {folder / name: contents[name] for name in parcel.public_files(workspace)}


def _holds(place: Path, content: Content) -> bool:
    """Whether these very bytes are there. A folder may have more: the server's own close holds every client's inbox."""
    if isinstance(content, dict):
        return not place.is_symlink() and all(_holds(place / name, inner) for name, inner in content.items())
    try:
        return reading.read(place, limit_bytes=len(content)) == content
    except (NotReady, Damaged, NotADirectoryError):
        return False


def _put(place: Path, content: Content, workspace: Workspace) -> None:
    """Put it there, unless a link below exchange/ leads elsewhere, or what is there is no folder of ours."""
    levels = len(place.relative_to(workspace.exchange).parts)
    if isinstance(content, dict):
        writing.publish(place, content, levels=levels, spares=spare_strangers)
    else:
        writing.write(place, content, levels=levels)
