"""The command line in this process. Its tree of commands is built once: that takes longer than many a command."""

from __future__ import annotations

import functools
from typing import Any

import typer


@functools.cache
def command_line() -> Any:
    """What `fedcollm` calls."""
    from fedcollm_cli.main import app

    return typer.main.get_command(app)


def give(*words: object) -> int:
    """Give a command. Returns its exit code."""
    try:
        command_line()([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
