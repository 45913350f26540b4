"""What `plan` and `comm-cost` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from stages.files.reading import LARGEST_ADAPTER_BYTES
from stages.runtime import texts
from stages.workspace.commands import Command

if TYPE_CHECKING:
    from stages.planning.comm_cost import CommCost, Full, Sent, Table3
    from stages.planning.estimates import StagePlan
    from stages.planning.plan import Plan


MOST_COLUMNS = 6
"""How many stages the table of memory has side by side."""
MOST_LISTED = 8
"""How many clients a table lists one by one; more are summed up."""
LEFT_OUT = (
    "not counted: the libraries themselves, the allocator's slack, reading the weights at the start and lm-eval's "
    "texts; transient is on the high side, and batches of shorter rows take less"
)


# --- as people read them


def shown(size_bytes: int) -> str:
    """A number of bytes in decimal units, three digits."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007 (used after the loop)
        if value < 999.5:
            break
        value /= 1000
    return f"{value:.3g} {unit}" if unit != "B" else f"{size_bytes} B"


def _table(*columns: str, left: tuple[str, ...] = (), title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def plan_of(found: Plan) -> Group:
    """A plan as tables: what is missing, the models, the stages, memory, and what travels."""
    models = _table("role", "parameters", "adapter", "stored", "held in", "computes in", left=("role",))
    names = []
    for number, one in enumerate(found.models, 1):
        stored = shown(one.stored_bytes) if one.stored_bytes else "?"
        is_only = sum(other.role == one.role for other in found.models) == 1
        name = one.role if is_only else f"{one.role} {number}"
        models.add_row(name, f"{one.parameters:,}", f"{one.adapter_parameters:,}", stored, one.held_in, one.dtype)
        names.append(f"{name}: {one.model}; its adapter is on {', '.join(one.modules)}")
    stages = _table("stage", "where", "rows", "steps", "largest batch", left=("stage", "where"))
    for stage in found.stages:
        trains = stage.answers is not None
        rows, steps = (_range(stage.rows), _range(stage.steps)) if trains else ("", "")
        stages.add_row(stage.name, stage.party, rows, steps, _batch(stage))
    lines = [LEFT_OUT]
    if found.two_phases:
        takes = ", ".join(f"{one.name} {shown(sum(one.memory.values()))}" for one in found.two_phases)
        lines.append(f"co-distill in two phases, with the LLM alone in memory: {takes}; with the SLM less")
    lines += _travel(found)
    lines += [
        f"{one.name}: {one.passes} passes over each batch, for the attack on prompts"
        for one in found.stages
        if one.passes > 1
    ]
    if any(stage.answers and not stage.rows for stage in found.stages):
        lines.append("?: no rows here to count; the batch is of rows of max_length, or as --length says")
    if found.is_to_be_dealt:
        lines.append(f"rows: as `{Command('prepare')}` will deal them; it has not been given yet")
    lines += [texts.lines([f"missing here: {one.what}", f"  mend  {one.mend}"]) for one in found.missing] or [
        "nothing is missing here"
    ]
    return Group(models, *names, stages, _memory(found), *lines)


def _range(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return "?"
    return f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} to {counts[1]:,}"


def _batch(stage: StagePlan) -> str:
    return "" if stage.batch is None else f"{stage.batch} x {stage.length} tokens"


def _memory(found: Plan) -> Table:
    """A column for each stage, a row for each part of its memory."""
    known = [stage for stage in found.stages if stage.memory]
    if len(known) > MOST_COLUMNS:
        return _memory_in_rows(known, found.device)
    table = _table(
        f"on {found.device}", *(texts.lines(stage.name.split(" ")) for stage in known), left=(f"on {found.device}",)
    )
    for part in dict.fromkeys(part for stage in known for part in stage.memory):
        table.add_row(part, *(shown(stage.memory[part]) if part in stage.memory else "" for stage in known))
    table.add_section()
    table.add_row("together", *(shown(sum(stage.memory.values())) for stage in known))
    return table


def _memory_in_rows(known: list[StagePlan], device: str) -> Table:
    """A row for each stage, its parts summed up: with a model for each client there are many. --json has each part."""
    table = _table(f"on {device}", "weights", "training", "logits", "working", "together", left=(f"on {device}",))
    for stage in known:
        weights, logits = (stage.memory.get(part, 0) for part in ("weights", "logits"))
        working = sum(stage.memory.get(part, 0) for part in ("activations", "transient"))
        together = sum(stage.memory.values())
        sizes = [weights, together - weights - logits - working, logits, working, together]
        table.add_row(stage.name, *map(shown, sizes))
    return table


def _travel(found: Plan) -> list[str]:
    lines = []
    if found.sent and "client" not in found.sent:
        told = ", ".join(f"{name} {shown(size_bytes)}" for name, size_bytes in found.sent.items())
        lines.append("training: adapters, gradients and optimiser; working: activations and what is transient")
        lines.append(f"a round: {told}; once: before round 1, by align, which loads no weights")
    elif found.sent:
        client, server = found.sent["client"], found.sent["server"]
        received, sent, all_of_them = shown(server // found.clients), shown(client), shown(client * found.clients)
        to_all = "as much" if client * found.clients == server else all_of_them
        lines.append(
            f"a round: each client receives {received} and sends {sent}, the server sends {shown(server)} and receives "
            f"{to_all}"
        )
        if beneath := found.sent.get("residual"):
            each = shown(beneath // found.clients)
            lines.append(f"beside the adapter each client receives a residual, which grows: {each} in the last round")
            if beneath // found.clients > LARGEST_ADAPTER_BYTES:
                most = shown(LARGEST_ADAPTER_BYTES)
                lines.append(f"nobody reads more than {most} of it: agree on fewer rounds")
    if found.disk:
        parts = ", ".join(f"{name} {shown(size)}" for name, size in found.disk.items())
        whole = f"{found.rounds} rounds of {found.clients} clients"
        lines.append(f"disk, {whole} in one folder: {parts}; together {shown(sum(found.disk.values()))}")
    return lines


def cost_of(found: CommCost) -> Group:
    """The bytes that each party sent and received, and what the full model would have taken."""
    parts: list[Table | str] = []
    if found.totals:
        parts.append(travelled(found.rounds, found.totals))
    else:
        parts.append("nothing has travelled yet; of what a round will send:")
    if found.full:
        table = _table("per client and round", found.full.model, left=("per client and round",))
        _compare(table, [found.full], {})
        parts.append(table)
    else:
        fetch = Command("prefetch", model="slm")
        parts.append(f"the SLM's configuration is not here: `{fetch}` for the full model's size")
    return Group(*parts)


def travelled(rounds: list[Sent], totals: list[Sent], before: str = "keys") -> Table:
    """The bytes that each party sent and received. before: what travels before round 1."""
    table = _table("round", "party", "sends", "receives", left=("party",))
    for round in dict.fromkeys(one.round for one in rounds):
        _add(table, [one for one in rounds if one.round == round], before)
    _add(table, totals, before)
    if not all(one.is_whole for one in totals):
        table.caption = "?: nothing of that party is here; what the server receives, and all sums, are of what is here"
    return table


def _add(table: Table, sent: list[Sent], before: str) -> None:
    """The rows of one round, or of the totals: the server, then the clients, summed up if they are many."""
    server, *clients = sent
    label = {None: "all", 0: before}.get(server.round, str(server.round))
    rows = {server.party: [server]}
    listed = len(clients) <= MOST_LISTED
    rows |= {one.party: [one] for one in clients} if listed else {f"{len(clients)} clients": clients}
    for name, parties in rows.items():
        is_whole = all(one.is_whole for one in parties)
        ways = sum(one.sent_bytes for one in parties), sum(one.received_bytes for one in parties)
        table.add_row(label, name, *(f"{size_bytes:,}" if size_bytes or is_whole else "?" for size_bytes in ways))
    table.add_section()


def _compare(table: Table, columns: list[Full], said: dict[str, list[str]]) -> None:
    """A column for each model: its adapter against the whole of it. said: the paper's figures, below ours."""

    def row(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)
        if name in said:
            table.add_row("  the paper", *said[name])

    row("full model, parameters", [f"{one.parameters:,}" for one in columns])
    row("sent, parameters", [f"{one.update_parameters:,}" for one in columns])
    row("sent, %", [f"{100 * one.update_parameters / one.parameters:.2f}" for one in columns])
    to_server = [(one, one.update_bytes) for one in columns]
    both = [(one, one.update_bytes + one.adapter_bytes + one.residual_mean_bytes) for one in columns]
    if any(one.residual_bytes for one in columns):
        row("received beside it, bytes, last round", [f"{one.residual_bytes:,}" for one in columns])
        row("  on average over all rounds", [f"{one.residual_mean_bytes:,}" for one in columns])
    for times, way, sent in ((1, "one way", to_server), (2, "there and back", both)):
        table.add_section()
        row(f"{way}, bytes", [f"{size_bytes:,}" for _, size_bytes in sent])
        row("  full, float32", [_share(own, times, one.float32_bytes) for one, own in sent])
        row("  full, as stored", [_share(own, times, one.stored_bytes, one.stored_dtype) for one, own in sent])


def _share(sent_bytes: int, times: int, size_bytes: int | None, dtype: str | None = None) -> str:
    """The full model's bytes, so many times, and the share of them that is sent."""
    if size_bytes is None:
        return "?"
    share = f"{shown(times * size_bytes)}: {100 * sent_bytes / (times * size_bytes):.2f} %"
    return texts.lines([share, f"({dtype})"]) if dtype else share


def drawn_table_3(rows: list[Table3]) -> Group:
    """Table 3 of the paper, from configurations alone."""
    table = _table("per client and round", *(row.setting for row in rows), left=("per client and round",))
    table.add_row("SLM", *(row.full.model.rpartition("/")[2] for row in rows))
    said = {
        "full model, parameters": [f"{row.paper.full_millions:g} M" for row in rows],
        "sent, parameters": [f"{row.paper.sent_millions:g} M" for row in rows],
        "sent, %": [f"{row.paper.percent:g}" for row in rows],
    }
    _compare(table, [row.full for row in rows], said)
    return Group(table, "the paper: Table 3 of arXiv 2411.11707, which counts parameters, one way")
