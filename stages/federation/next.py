"""next: whatever one party can do now, for cron and job scripts; it reads and writes what that step does.

Where there is nothing to do yet it says whom it waits for and ends with exit code 3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.aggregate import aggregate
from stages.align_party import align_party
from stages.artefacts.reading import read_manifest
from stages.bases import one_tokenizer
from stages.broadcast import broadcast
from stages.client_distill import client_distill
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.data.prepare import prepare
from stages.evaluate import evaluate
from stages.files import locks
from stages.parties.agreed import check_agreement
from stages.parties.enroll import enroll
from stages.parties.keys import keys
from stages.progress.status import status
from stages.reveal import reveal
from stages.runtime.errors import NotReady, Refused
from stages.runtime.events import Event, Report, ignore
from stages.share_knowledge import share_knowledge
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace


def _align(workspace: Workspace, *, client: int | None = None, server: bool = False, report: Report = ignore) -> None:
    align_party(workspace, client=None if server else client, report=report)


STAGES: dict[str, Callable[..., Any]] = {
    "aggregate": aggregate,
    "align": _align,
    "broadcast": broadcast,
    "client-distill": client_distill,
    "client-train": client_train,
    "co-distill": co_distill,
    "enroll": enroll,
    "evaluate": evaluate,
    "keys": keys,
    "prepare": prepare,
    "reveal": reveal,
    "share-knowledge": share_knowledge,
}


def next(workspace: Workspace, *, party: str | None = None, report: Report = ignore) -> Command | None:
    """Do the next step of a party, "server" or "client-2", or of any on this machine. Returns its command, if any.

    A step that would replace something is left to a person. Raises NotReady naming what the party waits for, Refused
    under an edited agreement and UsageProblem for two models that cannot be trained together, which no waiting mends,
    and Held while another process takes the party's step: a cron job that is faster than its steps must not pile up.
    """
    found = status(workspace, party=party)
    if found.edited:
        mend = f"undo the edit first; where all parties have agreed on it, `{Command('status')}` names what begins anew"
        raise Refused(found.edited, where=workspace.root / AGREEMENT, mend=mend)
    check_agreement(workspace, party)
    if found.unfit:
        one_tokenizer.check(workspace)
    if found.waiting_for:
        mend = f"{Command('status')} shows all of it"
        raise NotReady(f"waiting for {found.waiting_for}", where=workspace.root, mend=mend)
    command = found.next_command
    if command is None:
        report(Event("note", "nothing is left to do"))
        return None
    if "overwrite" in command.options:
        message = f"the next step replaces what is there: {command}"
        raise NotReady(message, where=workspace.root, mend=f"look at `{Command('status')}`, then give that command")
    round = command.options.get("round")
    close = workspace.close(round if isinstance(round, int) else 1)
    before = _digest(close)
    with locks.held(workspace.turn(party), waits=False):
        try:
            STAGES[command.verb](workspace, **command.options, report=report)
        except NotReady:
            if not (command.verb == "aggregate" and _digest(close) != before):
                raise
            report(Event("note", "the round is closed; now its sum is to be revealed"))
    return command


def _digest(close: Path) -> str:
    return read_manifest(close)[1] if close.exists() else ""
