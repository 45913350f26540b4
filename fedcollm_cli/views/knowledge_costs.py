"""What `comm-cost` prints of a federation whose models learn on public rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from fedcollm_cli.views.plans import MOST_LISTED, shown, travelled
from stages.runtime import texts

if TYPE_CHECKING:
    from stages.planning.knowledge_cost import Exchange, InPublic, Told

COUNTED = (
    "vocabulary: once, with where its tokenizer cuts the rows; N x S x K: the paper's count of logits each way, for as "
    "many rows, of max_length positions and top_k tokens, 8 bytes each with the token's id"
)


def told_cost_of(found: InPublic) -> Group:
    """The bytes that each party sent and received; and what a client tells and is told, against what else could be."""
    parts: list[Table | str] = []
    if found.totals:
        parts.append(travelled(found.rounds, found.totals, "once"))
    if not found.exchanges:
        return Group(*parts, f"with method {found.method} nothing travels")
    parts += [_exchanges(found), COUNTED]
    if found.tells_once:
        parts.append("the LLM stays as it is, and tells what it knows in round 1 alone")
    if any(told and told.is_estimate for one in found.exchanges for told in (one.sends, one.receives)):
        parts.append("~: not told yet, estimated from the public rows here; ?: rows or tokenizer are not here")
    if len(found.exchanges) > MOST_LISTED:
        parts.append(f"and {len(found.exchanges) - MOST_LISTED} clients more: --json has all")
    return Group(*parts)


def _exchanges(found: InPublic) -> Table:
    """A column for each client: knowledge each way, against its adapter, the paper's count and its full model."""
    some = found.exchanges[:MOST_LISTED]
    table = Table()
    table.add_column("each round, one way")
    for one in some:
        table.add_column(f"client {one.client}", justify="right")
    table.add_row("its model", *(one.model.rpartition("/")[2] for one in some))
    table.add_row("public rows, positions", *(_counts(one.sends) for one in some))
    table.add_row("knowledge, sends", *(_bytes(one.sends, "round_bytes") for one in some))
    table.add_row("knowledge, receives", *(_bytes(one.receives, "round_bytes") for one in some))
    full = [one.full for one in some]
    adapters = [one.adapter_bytes if one else None for one in full]
    if found.averages:
        table.add_row("its adapter, each way", *("?" if one is None else shown(one) for one in adapters))
    table.add_row("vocabulary, sends", *(_bytes(one.sends, "once_bytes") for one in some))
    table.add_row("vocabulary, receives", *(_bytes(one.receives, "once_bytes") for one in some))
    table.add_section()
    models = [one.float32_bytes if one else None for one in full]
    if not found.averages:
        table.add_row("its adapter instead", *map(_beside, some, adapters))
    table.add_row("N x S x K instead", *(_beside(one, one.paper_bytes) for one in some))
    table.add_row("its full model, float32", *map(_beside, some, models))
    return table


def _counts(told: Told | None) -> str:
    return "?" if told is None or told.rows is None else f"{told.rows:,}, {told.positions:,}"


def _bytes(told: Told | None, name: str) -> str:
    size_bytes = getattr(told, name)
    mark = "~" if told and told.is_estimate else ""
    return "?" if size_bytes is None else f"{mark}{shown(size_bytes)}"


def _beside(told: Exchange, size_bytes: int | None) -> str:
    """What would travel instead, and how many times what is told the larger way that is."""
    if size_bytes is None:
        return "?"
    known = [one.round_bytes for one in (told.sends, told.receives) if one and one.round_bytes]
    return texts.lines([shown(size_bytes), f"{size_bytes / max(known):.3g} times"]) if known else shown(size_bytes)
