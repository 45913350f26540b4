"""What parties are called."""

from __future__ import annotations

from typing import Literal

from stages.workspace.commands import Command

SERVER: Literal["server"] = "server"


def client(number: int) -> str:
    """How a client is called as a party."""
    return f"client-{number}"


def number_of(party: str) -> int | None:
    """The client's number; None of the server."""
    return None if party == SERVER else int(party.removeprefix("client-"))


def keys_made_by(party: str, *, renew: bool = False) -> Command:
    """The command that makes a party's keys."""
    number = number_of(party)
    return Command("keys", client=number, renew=renew) if number else Command("enroll", renew=renew)


def of(number: int | None) -> str:
    """The party of a client's number; the server where there is none."""
    return SERVER if number is None else client(number)
