"""What parties are called: "server", "client-2"."""

from __future__ import annotations

from typing import Literal

from stages.workspace.commands import Command

SERVER: Literal["server"] = "server"


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


def keys_made_by(party: str, *, renew: bool = False) -> Command:
    """The command that makes a party's keys."""
    if party == SERVER:
        return Command("enroll", renew=renew)
    return Command("keys", client=number_of(party), renew=renew)
