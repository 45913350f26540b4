"""What a shell offers for a value: templates, clients, rounds and keys. Where that fails, it offers nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

    from stages.workspace.paths import Workspace

Completion = Callable[[typer.Context, str], list[str]]


def _beginning(offered: Callable[[typer.Context], Iterable[str]]) -> Completion:
    """A completion that offers those values that begin with what is typed."""

    @functools.wraps(offered)
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            return [value for value in offered(ctx) if value.startswith(incomplete)]
        except Exception:  # a traceback would stand in the line that is being typed
            return []

    complete.__annotations__ = {"ctx": typer.Context, "incomplete": str, "return": list[str]}
    del vars(complete)["__wrapped__"]  # typer looks at the parameters
    return complete


def _workspace(ctx: typer.Context) -> Workspace:
    """The one that the line names so far, or that the shell stands in."""
    from stages.workspace.paths import Workspace

    return Workspace.find(Path(ctx.params.get("workspace") or Path.cwd()))


@_beginning
def templates(_: typer.Context) -> Iterable[str]:
    """Of init."""
    from stages.workspace.init import TEMPLATES

    return TEMPLATES


@_beginning
def clients(ctx: typer.Context) -> Iterable[str]:
    """The federation's clients."""
    return map(str, _workspace(ctx).clients)


@_beginning
def rounds(ctx: typer.Context) -> Iterable[str]:
    """The federation's rounds."""
    return map(str, range(1, _workspace(ctx).agreement.federation.rounds + 1))


@_beginning
def settings(_: typer.Context) -> Iterable[str]:
    """Every key of fedcollm.toml, with the sign that its value follows."""
    from stages.workspace.agreement import Agreement

    return (f"{key}=" for key in _keys(Agreement))


def _keys(kind: type[BaseModel], place: str = "") -> Iterator[str]:
    from pydantic import BaseModel

    for name, field in kind.model_fields.items():
        tables = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [one for one in tables if isinstance(one, type) and issubclass(one, BaseModel)]
        if not inner:
            yield f"{place}{name}"
        elif not getattr(field.annotation, "__origin__", None):  # of [clients.2] the number is the reader's
            yield from _keys(inner[0], f"{place}{name}.")
