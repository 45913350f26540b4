"""private/split.json: what `prepare` dealt from which sources, and to whom."""

from __future__ import annotations

from typing import NotRequired, TypedDict, cast

from stages.files import reading
from stages.workspace.paths import Workspace

DEALT_BY = ("federation.seed", "federation.clients", "data.")
"""What the settings begin with that decide how rows are dealt, but for IN_TRAINING."""
IN_TRAINING = "data.too_long"


class Share(TypedDict):
    """The rows of one party, or those that are held out; how many have each answer label, and each source."""

    rows: int
    sha256: str  # of the file that they are in
    labels: dict[str, int]
    sources: dict[str, int]


class Auxiliary(TypedDict):
    """The server's rows, with an answer and without one."""

    labelled: int
    unlabelled: int


class Split(TypedDict):
    """All that the file says."""

    agreement_sha256: str
    sources: list[str]  # lm-eval's tasks, or files
    sources_sha256: NotRequired[str]  # an earlier version did not write it
    split: str  # data.split of the agreement
    rows: int  # of all sources, duplicates included
    duplicates_dropped: int
    left_out: NotRequired[int]  # rows of data.auxiliary_sources beyond data.auxiliary_share, which nobody has
    beyond_limit: NotRequired[int]  # rows of clients that data.limit left out, which nobody has
    also_in_test: int | None  # rows whose prompt is also in the test set; None: not compared
    auxiliary: Auxiliary
    parties: dict[str, Share]  # by client-1, client-2, ..., server
    held_out: NotRequired[Share]  # kept from the server's rows for the gate


def decides_the_deal(key: str) -> bool:
    """Whether a setting, which the text begins with, decides how `prepare` deals the rows."""
    return key.startswith(DEALT_BY) and not key.startswith(IN_TRAINING)


def read_split(workspace: Workspace) -> Split:
    """The file as `prepare` wrote it. Raises Problem if it is not there or is no JSON."""
    return cast(Split, reading.read_json(workspace.split)[0])
