"""next: whatever one party can do now, for cron and job scripts; it reads and writes what that step does.

Where there is nothing to do yet it says whom it waits for and ends with exit code 3.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.aggregate import aggregate
from stages.artefacts.reading import read_manifest
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.data.prepare import prepare
from stages.evaluate import evaluate
from stages.files import locks
from stages.parties import roster
from stages.parties.enroll import enroll
from stages.parties.keys import keys
from stages.progress.status import status
from stages.reveal import reveal
from stages.runtime.errors import NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

STAGES: dict[str, Callable[..., Any]] = {
    "aggregate": aggregate,
    "broadcast": broadcast,
    "client-train": client_train,
    "co-distill": co_distill,
    "enroll": enroll,
    "evaluate": evaluate,
    "keys": keys,
    "prepare": prepare,
    "reveal": reveal,
}


def next(workspace: Workspace, *, party: str | None = None, report: Report = ignore) -> str:
    """Do the next step of a party, "server" or "client-2", or of any on this machine. Returns its command, or "".

    A step that would replace something is left to a person. Raises NotReady naming what the party waits for, Refused
    under an edited agreement, which no waiting mends, and Held while another process takes the party's step: a cron job
    that is faster than its steps must not pile up.
    """
    found = status(workspace, party=party)
    if found.edited:
        mend = "undo the edit first; where all parties have agreed on it, `fedcollm status` names what begins anew"
        raise Refused(found.edited, where=workspace.root / AGREEMENT, mend=mend)
    roster.check_agreement(workspace, party)
    if found.waiting_for:
        raise NotReady(f"waiting for {found.waiting_for}", where=workspace.root, mend="fedcollm status shows all of it")
    if not found.next_command:
        report(Event("note", "nothing is left to do"))
        return ""
    verb, arguments = _parsed(found.next_command)
    if "overwrite" in arguments:
        message = f"the next step replaces what is there: {found.next_command}"
        raise NotReady(message, where=workspace.root, mend="look at `fedcollm status`, then give that command")
    close = workspace.close(arguments.get("round", 1))
    before = _digest(close)
    with locks.held(workspace.turn(party), waits=False):
        try:
            STAGES[verb](workspace, **arguments, report=report)
        except NotReady:
            if not (verb == "aggregate" and _digest(close) != before):
                raise
            report(Event("note", "the round is closed; now clients reveal"))
    return found.next_command


def _digest(close: Path) -> str:
    return read_manifest(close)[1] if close.exists() else ""


def _parsed(command: str) -> tuple[str, dict[str, Any]]:
    """The stage and the arguments of a command of status: `fedcollm reveal --client 2 --round 1`."""
    _, verb, *words = shlex.split(command)
    arguments: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--")
            arguments[name] = True
        else:
            arguments[name] = int(word) if word.isdecimal() else word
    return verb, arguments
