"""What parties are called."""

from __future__ import annotations

from typing import Literal

SERVER: Literal["server"] = "server"


def client(number: int) -> str:
    """How a client is called as a party."""
    return f"client-{number}"


def of(number: int | None) -> str:
    """The party of a client's number; the server where there is none."""
    return SERVER if number is None else client(number)
