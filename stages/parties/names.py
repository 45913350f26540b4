"""What parties are called: "server", "client-2"."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from stages.workspace.commands import Command

SERVER: Literal["server"] = "server"

MOST_LISTED = 8
"""Clients, or runs of them, that one line names before it counts them."""


def client(number: int) -> str:
    """How a client is called as a party."""
    return f"client-{number}"


def of(number: int | None) -> str:
    """The party of a client's number; the server where there is none."""
    return SERVER if number is None else client(number)


def number_of(party: str) -> int:
    """The number of a client. Raises ValueError for the server, which has none."""
    return int(party.removeprefix("client-"))


def said(party: str) -> str:
    """A party as people say it: client 2, the server."""
    return "the server" if party == SERVER else party.replace("-", " ")


def listed(numbers: Iterable[int]) -> str:
    """Clients as people say them, those with consecutive numbers as one: client 2, clients 1 to 7 and 9."""
    each = sorted(numbers)
    runs: list[list[int]] = []
    for number in each:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [part for run in runs for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else list(map(str, run)))]
    if len(parts) > MOST_LISTED:
        return f"{len(each)} clients, {', '.join(parts[:MOST_LISTED])} and so on"
    *before, last = parts
    return f"client{'s' if len(each) > 1 else ''} {', '.join(before)}{' and ' if before else ''}{last}"


def keys_made_by(party: str, *, renew: bool = False) -> Command:
    """The command that makes a party's keys."""
    if party == SERVER:
        return Command("enroll", renew=renew)
    return Command("keys", client=number_of(party), renew=renew)
