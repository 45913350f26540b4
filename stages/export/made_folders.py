"""A folder of a model that was made here: a record in it says from what, and which files it holds.

The same command again finds it done; no other folder is ever taken for one of ours, whatever may be overwritten.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from stages.files import reading
from stages.runtime.errors import Damaged, Refused, UsageProblem

ELSEWHERE = "name another folder with --to"


class Entry(TypedDict):
    """One file of a folder."""

    sha256: str
    size_bytes: int


ENTRY = Entry.__required_keys__


def already_made(
    target: Path, what: Mapping[str, Any], shown: str, *, record: str, made: str, overwrite: bool
) -> dict[str, Any] | None:
    """What the record of a whole folder of the same inputs says, or None: make it.

    what: all that decides the folder, its "format" included, as it stands in the record. made: how it was made, as in
    "exported". Raises Refused for one of other inputs, and, whatever overwrite says, as ours does.
    """
    earlier = ours(target, what["format"], shown, record=record, made=made)
    if earlier is None or overwrite:
        return None
    mend = "give the command again with --overwrite to replace it"
    if changed := [key.removesuffix("_sha256") for key in what if earlier.get(key) != what.get(key)]:
        message = f"{shown} was {made} from other inputs; changed since: {', '.join(changed)}"
        raise Refused(message, where=target, mend=mend)
    for name, entry in earlier["files"].items():
        path = target / name
        if not path.is_file() or path.stat().st_size != entry["size_bytes"]:
            raise Damaged(f"{name} of {shown} is missing or was changed", where=path, mend=mend)
    return earlier


def ours(target: Path, format: str, shown: str, *, record: str, made: str) -> dict[str, Any] | None:
    """What the record of a folder of this format says; None where nothing is. Raises Refused for any other folder.

    Raises UsageProblem for a folder that cannot be made, and Damaged for a record that does not say what it is of.
    """
    above = next(one for one in target.absolute().parents if os.path.lexists(one))
    if not above.is_dir():
        raise UsageProblem(f"{shown} cannot be made: {above.name} is no folder", where=above, mend=ELSEWHERE)
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return None
    elsewhere = f"{ELSEWHERE}, or move that one away"
    earlier: dict[str, Any] = reading.read_json(target / record)[0] if (target / record).is_file() else {}
    if earlier.get("format") != format:
        raise Refused(f"{shown} is there already and was not {made} here", where=target, mend=elsewhere)
    if not _are_entries(earlier.get("files")):
        message = f"{record} of {shown} does not say which files it is of"
        raise Damaged(message, where=target / record, mend=elsewhere)
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if strangers := sorted(found - earlier["files"].keys() - {record}):
        message = f"{shown} holds {strangers[0]}, which was not {made}"
        raise Refused(message, where=target / strangers[0], mend=elsewhere)
    return earlier


def _are_entries(files: Any) -> bool:
    return isinstance(files, dict) and all(isinstance(one, dict) and one.keys() >= ENTRY for one in files.values())


def spare_base(target: Path, base: Path, shown: str) -> None:
    """Raise UsageProblem where a folder to be made is that of the base which it is made from, or lies in it.

    Whatever may be overwritten: what a model was made from is to stay as it is.
    """
    place, source = target.resolve(), base.resolve()
    if source in (place, *place.parents):
        inside = "" if place == source else "in "
        raise UsageProblem(
            f"{shown} is {inside}the folder of the base that it is made from", where=base, mend=ELSEWHERE
        )


def digests(draft: Path) -> dict[str, Entry]:
    """sha256 and size of every file, read in pieces: weights are large."""
    found: dict[str, Entry] = {}
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(draft).as_posix()] = {"sha256": digest, "size_bytes": path.stat().st_size}
    return found
