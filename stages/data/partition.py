"""How a public dataset becomes K private ones: IID, Dirichlet by label, or by task.

Every function deals each row to exactly one client, and none goes away empty-handed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from stages.data.rows import Row, unlabelled
from stages.runtime.errors import UsageProblem

Deal = list[list[Row]]


def iid(rows: Sequence[Row], clients: int, *, alpha: float, rng: np.random.Generator) -> Deal:
    """Rows dealt in turn from a shuffled pack: shares differ by one row at most."""
    order = rng.permutation(len(rows))
    return [[rows[i] for i in order[client::clients]] for client in range(clients)]


def dirichlet(rows: Sequence[Row], clients: int, *, alpha: float, rng: np.random.Generator) -> Deal:
    """Each label's rows divided in proportions drawn from Dirichlet(alpha): the smaller alpha, the more one-sided."""
    deal: Deal = [[] for _ in range(clients)]
    for label in sorted({row.label for row in rows}):
        of_label = [row for row in rows if row.label == label]
        order = rng.permutation(len(of_label))
        cuts = np.floor(np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(of_label)).astype(int)
        for client, share in enumerate(np.split(order, cuts)):
            deal[client] += [of_label[i] for i in share]
    return deal


def by_task(rows: Sequence[Row], clients: int, *, alpha: float, rng: np.random.Generator) -> Deal:
    """Whole tasks to clients in turn; where clients outnumber tasks, those that share a task share it IID."""
    tasks = sorted({row.source for row in rows})
    deal: Deal = [[] for _ in range(clients)]
    for number, task in enumerate(tasks):
        takers = list(range(number % clients, clients, len(tasks)))
        of_task = [row for row in rows if row.source == task]
        for client, share in zip(takers, iid(of_task, len(takers), alpha=alpha, rng=rng), strict=True):
            deal[client] += share
    return deal


SPLITS: dict[Literal["iid", "dirichlet", "by-task"], Callable[..., Deal]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "by-task": by_task,
}


def split(
    rows: Sequence[Row],
    clients: int,
    *,
    kind: Literal["iid", "dirichlet", "by-task"],
    alpha: float,
    auxiliary_share: float | None,
    auxiliary_sources: Sequence[str] = (),
    seed: int,
) -> tuple[Deal, list[Row]]:
    """Each client's rows, and the auxiliary rows: a share of the shuffled pack, set aside first; None: 1/(clients + 1).

    auxiliary_sources: the auxiliary rows are of these sources, a share of their rows, None: all; clients have no row of
    them. Raises UsageProblem for a source that no row is of, and if a party would be left without rows.
    """
    _check_sources(auxiliary_sources, rows)
    rng = np.random.default_rng(seed)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    if auxiliary_sources:
        public = [row for row in shuffled if row.source in auxiliary_sources]
        auxiliary = public[: round((auxiliary_share or 1) * len(public))]
        others = [row for row in shuffled if row.source not in auxiliary_sources]
    else:
        taken = round((auxiliary_share or 1 / (clients + 1)) * len(rows))
        auxiliary, others = shuffled[:taken], shuffled[taken:]
    deal = SPLITS[kind](others, clients, alpha=alpha, rng=rng)
    empty = [f"client {number}" for number, share in enumerate(deal, 1) if not share]
    empty += [] if auxiliary else ["the server (auxiliary)"]
    if empty:
        message = f"this split leaves {', '.join(empty)} without rows ({len(rows)} rows, {clients} clients, {kind})"
        mend = "use more data, fewer clients, another split or a larger dirichlet_alpha"
        if not auxiliary:
            mend = "use more data or a larger data.auxiliary_share"
        elif not others and auxiliary_sources:
            mend = "leave the clients rows that are in no source of data.auxiliary_sources"
        elif not others:
            mend = "use a smaller data.auxiliary_share"
        raise UsageProblem(message, mend=mend)
    return deal, auxiliary


def _check_sources(named: Sequence[str], rows: Sequence[Row]) -> None:
    there = sorted({row.source for row in rows})
    if unknown := [source for source in named if source not in there]:
        message = f"data.auxiliary_sources names {unknown[0]!r}, which no row is of"
        raise UsageProblem(message, mend=f"rows are of {', '.join(map(repr, there))}")


def hold_out(rows: Sequence[Row], share: float) -> tuple[list[Row], list[Row]]:
    """The rows but for the last of them, that share, which are kept from training. split has shuffled them.

    Raises UsageProblem if a share above 0 leaves either side without rows.
    """
    kept = len(rows) - round(share * len(rows))
    if share and not 0 < kept < len(rows):
        side = "to hold out" if kept else "to train on"
        message = f"data.held_out_share {share:g} of the server's {len(rows)} rows leaves none {side}"
        raise UsageProblem(message, mend="use more data, a larger auxiliary_share or another held_out_share")
    return list(rows[:kept]), list(rows[kept:])


def limited(rows: Sequence[Row], limit: int | None, *, seed: int) -> list[Row]:
    """So many of the rows, drawn at random, in their order; None: all."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    drawn = set(np.random.default_rng(seed).permutation(len(rows))[:limit].tolist())
    return [row for i, row in enumerate(rows) if i in drawn]


def unlabel(rows: Sequence[Row], share: float, *, seed: int) -> list[Row]:
    """The rows in their order, that share of them, drawn at random, without completion and label."""
    drawn = set(np.random.default_rng(seed).permutation(len(rows))[: round(share * len(rows))].tolist())
    return [unlabelled(row) if i in drawn else row for i, row in enumerate(rows)]
