"""What lies in a workspace, whoever put it there: found by the names that `layout` gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stages.workspace.layout import Layout
from stages.workspace.names import AGREEMENT, SIGNATURE, ZERO_SHOT


def has_rounds(workspace: Layout) -> bool:
    """Whether the exchange holds anything of a round."""
    return any(workspace.exchange.glob("round-*/*"))


def results(workspace: Layout) -> list[Path]:
    """Every file of scores, of rounds and of bases alone."""
    found = sorted((workspace.root / "results").glob("*/*.json"))
    return [path for path in found if path.parent.name.startswith(("round-", ZERO_SHOT))]


def rows_results(workspace: Layout) -> list[Path]:
    """Every file of what models' losses on rows of one's own were."""
    return sorted(workspace.rows_results.glob("*/*.json"))


def task_results(workspace: Layout) -> list[Path]:
    """Every file of scores of tasks that a command named in the place of the settings'."""
    return sorted(workspace.task_results.glob("*/*/*.json"))


def agreements(workspace: Layout) -> list[Path]:
    """The kept copies of agreements that something was published under."""
    return sorted(workspace.agreed("").parent.glob("*.toml"))


def public_keys(workspace: Layout) -> list[Path]:
    """The files of the clients' public keys that are here."""
    return sorted(workspace.public_keys(1).parent.glob("client-*.json"))


def logs(workspace: Layout) -> list[Path]:
    """Every party's private logs."""
    return sorted(workspace.private.glob("*/round-*/*.jsonl"))


def checkpoints(workspace: Layout, file: str) -> list[Path]:
    """A file of this name, in every checkpoint of a stage that has not ended."""
    return sorted(workspace.private.glob(f"*/round-*/.*/*/checkpoint-*/{file}"))


def clients_own(workspace: Layout) -> list[Path]:
    """The folders that clients keep of their rounds, hidden ones among them."""
    return sorted(workspace.private.glob("client-*/round-*/*/"))


def signatures(workspace: Layout) -> Iterator[Path]:
    """The signature of every folder of a round, in exchange/ and in private/."""
    for top in (workspace.exchange, workspace.private):
        yield from sorted(top.glob(f"**/round-*/*/{SIGNATURE}"))


def in_close(close: Path) -> list[str]:
    """The files of a close that are here: each client has its own, and the one that can open it has a sum."""
    return [path.name for path in close.glob("*.safetensors")]


def seeds(workspace: Layout) -> list[int]:
    """The seeds that there is a replica of."""
    places = workspace.replica(0).parent.glob(f"*/{AGREEMENT}")
    found = (re.fullmatch(r"seed-([0-9]+)", place.parent.name) for place in places)
    return [int(number[1]) for number in found if number]


def swept(workspace: Layout) -> list[Path]:
    """The folders of the combinations of its sweeps."""
    return [place.parent for place in sorted(workspace.sweep_point("").glob(f"*/{AGREEMENT}"))]


def methods(workspace: Layout) -> set[str]:
    """The methods that there is a baseline of."""
    return {place.parent.name for place in workspace.baseline("").glob(f"*/{AGREEMENT}")}
