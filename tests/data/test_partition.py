"""partition: every row goes to exactly one party, and no party goes away empty-handed."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest

from stages.data.partition import SPLITS, Deal, by_task, dirichlet, iid, split
from stages.data.rows import Row
from stages.runtime.errors import UsageProblem
from stages.workspace.rows_and_scores import Data

KINDS = pytest.mark.parametrize("kind", SPLITS)


def dataset(count: int = 240, *, labels: int = 4, tasks: int = 3) -> list[Row]:
    """Rows that are all different, each label and each task equally often."""
    return [Row(f"Q{i}", f" A{i}", label=str(i % labels), source=f"task-{i // labels % tasks}") for i in range(count)]


def divided(rows: list[Row], clients: int, **changed: Any) -> tuple[Deal, list[Row]]:
    given: dict[str, Any] = {"kind": "iid", "alpha": 1.0, "auxiliary_share": 0.2, "seed": 3} | changed
    return split(rows, clients, **given)


def everything(deal: Deal, auxiliary: list[Row]) -> Counter[Row]:
    return Counter([row for share in deal for row in share] + auxiliary)


def test_every_split_that_the_settings_name_is_there() -> None:
    assert set(SPLITS) == set(get_args(Data.model_fields["split"].annotation))


@KINDS
@pytest.mark.parametrize("clients", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_in_two_places_and_none_is_lost(kind: str, clients: int, seed: int) -> None:
    deal, auxiliary = divided(dataset(), clients, kind=kind, seed=seed, alpha=5.0)
    assert len(deal) == clients
    assert everything(deal, auxiliary) == Counter(dataset())


@KINDS
def test_the_auxiliary_share_is_set_aside_first_and_at_random(kind: str) -> None:
    _, auxiliary = divided(dataset(), 4, kind=kind, auxiliary_share=0.25)
    assert len(auxiliary) == 60  # a quarter of 240
    labels = Counter(row.label for row in auxiliary)
    assert all(5 <= labels[label] <= 25 for label in "0123"), "15 of each are expected"


@KINDS
def test_a_split_is_drawn_from_its_seed(kind: str) -> None:
    first = divided(dataset(), 4, kind=kind, seed=1)
    assert divided(dataset(), 4, kind=kind, seed=1) == first
    assert divided(dataset(), 4, kind=kind, seed=2) != first


@pytest.mark.parametrize(("count", "clients", "sizes"), [(12, 4, [3, 3, 3, 3]), (14, 4, [4, 4, 3, 3])])
def test_iid_shares_differ_by_one_row_at_most(count: int, clients: int, sizes: list[int]) -> None:
    deal = iid(dataset(count), clients, alpha=1.0, rng=np.random.default_rng(1))
    assert [len(share) for share in deal] == sizes


def one_sidedness(deal: Deal) -> float:
    """The share of a label that its largest holder has, averaged over labels: 1/clients if even, 1 if one-sided."""
    held = [Counter(row.label for row in share) for share in deal]
    return float(np.mean([max(of[label] for of in held) / sum(of[label] for of in held) for label in "0123"]))


@pytest.mark.parametrize("seed", range(5))
def test_the_smaller_alpha_the_more_one_sided_the_clients(seed: int) -> None:
    small, middle, large = (
        one_sidedness(dirichlet(dataset(2000), 4, alpha=alpha, rng=np.random.default_rng(seed)))
        for alpha in (0.05, 1.0, 1000.0)
    )
    assert large < 0.3 < middle < small  # even shares of 4 clients are 0.25
    assert small > 0.7


def test_dirichlet_loses_nothing_however_extreme_alpha_is() -> None:
    for alpha in (1e-6, 1e6):
        deal = dirichlet(dataset(), 4, alpha=alpha, rng=np.random.default_rng(0))
        assert everything(deal, []) == Counter(dataset())


@pytest.mark.parametrize(
    ("tasks", "clients", "expected"),
    [
        (3, 3, [{0}, {1}, {2}]),
        (5, 2, [{0, 2, 4}, {1, 3}]),  # tasks in turn: 0 1 0 1 0
        (2, 5, [{0}, {1}, {0}, {1}, {0}]),  # clients in turn
        (3, 4, [{0}, {1}, {2}, {0}]),
        (1, 3, [{0}, {0}, {0}]),
    ],
)
def test_whole_tasks_go_to_clients_in_turn_and_are_shared_where_clients_outnumber_them(
    tasks: int, clients: int, expected: list[set[int]]
) -> None:
    rows = dataset(tasks=tasks)
    deal = by_task(rows, clients, alpha=1.0, rng=np.random.default_rng(1))
    assert [{row.source for row in share} for share in deal] == [{f"task-{i}" for i in of} for of in expected]
    assert everything(deal, []) == Counter(rows)
    for task in range(tasks):
        sizes = [len(share) for share, of in zip(deal, expected, strict=True) if of == {task}]
        assert max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize(
    ("rows", "changed", "empty"),
    [
        (dataset(4), {"clients": 4}, "client 4"),  # one of four rows is auxiliary
        (dataset(4), {"clients": 6}, "client 4, client 5, client 6"),
        (dataset(6), {"clients": 2, "auxiliary_share": 0.01}, r"the server \(auxiliary\)"),
        (dataset(60, labels=2), {"clients": 20, "kind": "dirichlet", "alpha": 1e-4}, "client"),
    ],
)
def test_a_split_that_leaves_a_party_with_nothing_is_refused_by_name(
    rows: list[Row], changed: dict[str, Any], empty: str
) -> None:
    with pytest.raises(UsageProblem, match=f"leaves .*{empty}.* without rows") as caught:
        divided(rows, changed.pop("clients"), **changed)
    assert "more data" in str(caught.value.mend)
