"""Whether another party of FedMKT tells of the public rows that are here, by the digest that its cuts carry."""

from __future__ import annotations

import re
from pathlib import Path

from stages.artefacts.tensor_files import read_header, told_in
from stages.files import reading
from stages.parties import names
from stages.runtime.errors import Refused
from stages.workspace.commands import Command
from stages.workspace.names import CUTS
from stages.workspace.paths import Workspace

LARGEST_CUTS_BYTES = 1 << 24
"""Of a file that is read for its header alone: cuts of four million tokens."""


def told_sha256(folder: Path) -> str:
    """Of which rows a party's vocabulary folder says that its cuts are. Raises as read and read_header do.

    Empty where it says no digest.
    """
    path = folder / CUTS
    header = read_header(reading.read(path, limit_bytes=LARGEST_CUTS_BYTES), path)
    found = re.fullmatch("[0-9a-f]{64}", str(told_in(header, "cuts").get("data_sha256")))
    return found[0] if found else ""


def of_other_rows(workspace: Workspace, party: int | None, place: Path, told: str, here: str) -> Refused:
    """The error about a party (None: the server) whose cuts are of other rows than the copy at place.

    told, here: the digests of the two. A party whose own copy that is has changed it since.
    """
    both = f"sha256 {told[:16]}..., here {here[:16]}..."
    name, own = names.said(names.of(party)), workspace.public_data(party)
    if place == own:
        message = f"{workspace.shown(place)} was changed after {name} told how it reads these rows ({both})"
        again = Command("align", client=party, server=party is None, overwrite=True)
        return Refused(message, where=place, mend=f"put the rows back that all parties have, or `{again}`")
    message = f"{name} has other public rows than this machine ({both})"
    mend = f"compare `sha256sum {workspace.shown(place)}` with that of {workspace.shown(own)} there"
    return Refused(message, where=workspace.vocabulary(party), mend=f"{mend}, and give all parties the same file")
