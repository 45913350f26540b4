"""watch, and next --sync: a party's next step, between fetching what others have sent and sending what it made.

Nothing of its own lies on disk: it reads and writes what pull, next and push do, so that it may be stopped at any time
and begun again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stages.exchange.push_and_pull import Moved, pull, push
from stages.federation.next import next as take_next
from stages.parties import names
from stages.runtime.errors import Held, NotReady
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

LONGEST = 5
"""How many times as long as asked for a pause becomes where nothing changes."""


def synced(workspace: Workspace, *, client: int | None, report: Report = ignore) -> Command | None:
    """Fetch, take the next step, send. Returns the step's command; None where nothing is left to do.

    client: None is the server. Raises as pull, next and push do. Where the party has to wait, what it made before is
    sent first.
    """
    _tell(pull(workspace, client=client), "fetched", report)
    try:
        done = _next(workspace, client, report)
    except (NotReady, Held):
        _tell(push(workspace, client=client), "sent", report)
        raise
    _tell(push(workspace, client=client), "sent", report)
    return done


def watch(
    workspace: Workspace,
    *,
    client: int | None,
    every_s: float = 60.0,
    pause: Callable[[float], object] = time.sleep,
    report: Report = ignore,
) -> list[Command]:
    """Take a party's steps until nothing is left to do, and wait where it has to. Returns their commands.

    client: None is the server. Without a remote nothing is fetched or sent: others are to carry it. A remote that fails
    is asked again, as what has not arrived. every_s: seconds between two looks; up to LONGEST times as many where
    nothing changes. Raises what the steps raise, but for NotReady and Held.
    """
    done, told, seconds = list[Command](), "", every_s
    while True:
        here = Workspace(workspace.root, workspace.flags)  # settings may have been edited since
        take = synced if here.machine.exchange.remote else _carried
        try:
            command = take(here, client=client, report=report)
        except (NotReady, Held) as problem:
            if problem.message != told:
                report(Event("stage", "wait"))
                report(Event("note", f"since {time.strftime('%H:%M')}: {problem.message} ({problem.mend})"))
            told = problem.message
            pause(seconds)
            seconds = min(2 * seconds, LONGEST * every_s)
            continue
        if command is None:
            return done
        done.append(command)
        told, seconds = "", every_s


def _carried(workspace: Workspace, *, client: int | None, report: Report) -> Command | None:
    return _next(workspace, client, report)


def _next(workspace: Workspace, client: int | None, report: Report) -> Command | None:
    return take_next(workspace, party=names.SERVER if client is None else names.client(client), report=report)


def _tell(moved: Moved, verb: str, report: Report) -> None:
    for name in moved.moved:
        report(Event("note", f"{verb} {name}"))
