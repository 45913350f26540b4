"""The commands for auditors, audit and diff: their options, and what they found as text."""

from __future__ import annotations

from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from fedcollm_cli import completing
from fedcollm_cli.console import Console
from fedcollm_cli.session import JsonOption, QuietOption, Session, WorkspaceOption, guarded, in_workspace
from stages.runtime import texts

if TYPE_CHECKING:
    from stages.audit.diff import Difference


def audit(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Adapter folders, rounds, exchanges or workspaces. Default: this one.")
    ] = None,
    *,
    client: Annotated[
        int | None,
        typer.Option("--client", min=1, autocompletion=completing.clients, help="Only what concerns this client."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 10 if there are warnings.")] = False,
    canary: Annotated[
        list[str] | None,
        typer.Option("--canary", metavar="<str>", help="A string that nothing that travels may hold; repeatable."),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check all that was exchanged, as an auditor would.

    Prints a line for each check: the chain of manifests and signatures, files, layout, numbers, drift, clients' updates
    against each other, leaks, keys, hidden sums, the privacy ledger, knowledge of public rows. Reads every byte
    of the workspace, or of any folder, also of another tool's PEFT adapter. Writes nothing, loads no model, opens no
    pickle. Ends with exit code 4 if a check failed, and with 3 if nothing was exchanged yet.

    Example: fedcollm audit --client 2 --strict
    """
    console = Console(quiet=quiet, as_json=as_json)
    with guarded(console):
        from stages.audit.audit import audit as stage
        from stages.audit.checks import exit_code, lines, result
        from stages.workspace.paths import Workspace

        given = paths or [Workspace.find(workspace or Path.cwd()).root]
        found = stage(given, client=client, canaries=canary or (), report=console.report)
        shown = [f"{one.id:<3} {one.level:<4} {one.check:<8} {one.text}" for one in lines(found)]
        console.result([one.as_json() for one in found], texts.lines([*shown, result(found, strict=strict)]))
        raise typer.Exit(exit_code(found, strict=strict))


@in_workspace("quiet")
def verify(
    *,
    opened: Session,
) -> None:
    """Walk the chain of manifests and signatures.

    It begins with round 1. It compares every byte with its manifest. It checks each manifest's signature by the party
    that the roster names, its place, its agreement, and the folders it was made from. Reads all folders on this
    machine, writes nothing. Stops at the first fault, names it, and ends with its exit code.

    Example: fedcollm verify
    """
    from stages.audit.verify import verify as stage

    found = stage(opened.workspace, report=opened.console.report)
    opened.console.result(asdict(found), found.as_text)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter folder, ours or any of PEFT's.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two adapters, and what each adds to the model.

    For each tensor, it prints norms, cosine, largest difference and effective rank. For each layer, it prints norms,
    difference and cosine of what is added to the weights: B A, scaled as PEFT does. It names the settings that differ,
    and those that it does not understand. Of two folders of knowledge, it counts the rows that B knows better and
    worse, and says how far probabilities are apart; of two vocabularies, it counts the tokens that only one has. Reads
    the two folders, writes nothing. Ends with exit code 0 whether they are equal or not.

    Example: fedcollm diff exchange/round-0001/broadcast exchange/round-0002/broadcast
    """
    console = Console(quiet=True, as_json=as_json)
    with guarded(console):
        from stages.audit.diff_told import diff_told, is_told

        if is_told(first) or is_told(second):
            told = diff_told(first, second)
            console.result(asdict(told), texts.lines(told.as_lines))
            return
        from stages.audit.diff import diff as stage

        found = stage(first, second)
        console.result(found.as_json(), Group(_tensors(found), *_layers(found), *_words(found)))


def _tensors(found: Difference) -> Table:
    shared = _beginning([one.name for one in found.tensors])
    table = _table(_head("tensor", "of", shared), "norm A", "norm B", "cosine", "max |A-B|", "rank A", "rank B")
    for one in found.tensors:
        numbers = [one.norm_a, one.norm_b, one.cosine, one.largest_difference, one.rank_a, one.rank_b]
        table.add_row(_brief(one.name.removeprefix(shared)), *map(_shown, numbers))
    return table


def _layers(found: Difference) -> list[Table]:
    """What each adds to a layer's weights."""
    shared = _beginning([one.name for one in found.layers])
    table = _table(_head("added to", "in", shared), "|BA| A", "|BA| B", "cosine", "|BA A-B|")
    for one in found.layers:
        table.add_row(
            _brief(one.name.removeprefix(shared)), *map(_shown, [one.norm_a, one.norm_b, one.cosine, one.difference])
        )
    return [table] if found.layers else []


def _table(first: str, *more: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, overflow="fold")
    for name in more:
        table.add_column(name, justify="right", overflow="fold", no_wrap=True)
    return table


def _beginning(names: list[str]) -> str:
    """What all names begin with, up to a dot, such as "model.layers.": said once, so that a row fits a terminal."""
    columns = zip(*(name.split(".") for name in names), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, columns)]
    return ".".join([*shared, ""]) if len(names) > 1 else ""


def _head(plain: str, where: str, beginning: str) -> str:
    shown = beginning.removeprefix("base_model.model.").removesuffix(".")
    return f"{plain.split()[0]} {where} {shown}" if shown else plain


def _brief(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".weight")


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


def _words(found: Difference) -> list[str]:
    lines = [f"only in A: {name}" for name in found.only_in_a] + [f"only in B: {name}" for name in found.only_in_b]
    lines += [f"{key}: {a!r} in A, {b!r} in B" for key, (a, b) in found.config.items()]
    lines += [f"not understood in {which}: {said}" for which, all in found.not_understood.items() for said in all]
    lines += [
        f"{which} has a residual beneath it, which is not compared; export both to compare it"
        for which in found.beneath
    ]
    return [*lines, found.verdict]
