"""comm-cost: sums that add up, both halves of the round trip, and Table 3."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit
from stages.exchange.transfers import transfers
from stages.planning.comm_cost import comm_cost, table_3
from stages.workspace.paths import Workspace


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_what_one_sends_others_receive_to_the_byte(finished: Path) -> None:
    found = comm_cost(Workspace(finished))
    for round in (1, 2):
        server, *clients = [one for one in found.rounds if one.round == round]
        folder = finished / f"exchange/round-000{round}"
        assert server.sent_bytes == 3 * bytes_of(folder / "broadcast") == sum(one.received_bytes for one in clients)
        assert [one.sent_bytes for one in clients] == [bytes_of(folder / f"client-{k}") for k in (1, 2, 3)]
        assert server.received_bytes == sum(one.sent_bytes for one in clients)
    assert sum(one.sent_bytes for one in found.totals) == sum(one.size_bytes for one in transfers(Workspace(finished)))
    assert [one.party for one in found.totals] == ["server", "client-1", "client-2", "client-3"]


def test_what_parties_elsewhere_sent_is_no_zero(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert all(one.is_whole for one in comm_cost(Workspace(finished)).totals)
    sent, broadcast = (bytes_of(finished / f"exchange/round-0001/{name}") for name in ("client-2", "broadcast"))
    for path in [*finished.glob("exchange/round-*/client-[13]"), finished / "exchange/round-0002"]:
        shutil.rmtree(path)
    at_server = fedcollm("comm-cost", "-w", finished).out
    assert "?:" not in at_server
    assert ["1", "client-1", "0", f"{broadcast:,}"] in cells(at_server)  # it would be here
    for party in ("client-1", "client-3", "server"):
        shutil.rmtree(finished / "private" / party)
    totals = comm_cost(Workspace(finished)).totals
    assert {one.party: one.is_whole for one in totals} == {
        "server": False,
        "client-1": False,
        "client-2": True,
        "client-3": False,
    }
    said = fedcollm("comm-cost", "-w", finished).out
    assert [row for row in cells(said) if row[0] == "1"] == [
        ["1", "server", f"{3 * broadcast:,}", f"{sent:,}"],
        ["1", "client-1", "?", f"{broadcast:,}"],
        ["1", "client-2", f"{sent:,}", f"{broadcast:,}"],
        ["1", "client-3", "?", f"{broadcast:,}"],
    ]
    assert "of what is here" in said


def cells(drawn: str) -> list[list[str]]:
    """The rows of a table, as words."""
    return [line.replace("│", " ").replace("┃", " ").split() for line in drawn.splitlines() if line.strip()]


def test_the_full_model_is_counted_in_float32_and_in_its_own_type(finished: Path) -> None:
    full = comm_cost(Workspace(finished)).full
    assert full is not None
    adapter = finished / "exchange/round-0001/broadcast/adapter_model.safetensors"
    assert full.adapter_bytes == adapter.stat().st_size
    assert full.stored_dtype == "float32"
    assert full.stored_bytes == full.float32_bytes == 4 * full.parameters


def test_before_anything_was_exchanged_the_figures_of_a_round_are_there(workspace_folder: Path) -> None:
    found = comm_cost(Workspace(workspace_folder))
    assert (found.rounds, found.totals) == ([], [])
    assert found.full is not None
    assert found.full.adapter_parameters == 4 * 16 + 48 * 4


def test_what_travelled_is_counted_even_where_the_model_is_not(finished: Path) -> None:
    edit(finished / "fedcollm.toml", 'model = "models/slm"', 'model = "nobody/nothing"')
    found = comm_cost(Workspace(finished))
    assert found.full is None
    assert len(found.rounds) == 8


@pytest.mark.parametrize(("setting", "percent"), [("s1", 0.24), ("s2", 0.24), ("s3", 0.23)])
def test_table_3_is_the_papers(setting: str, percent: float) -> None:
    (row,) = table_3([setting])
    assert round(row.percent, 2) == row.paper.percent == percent
    assert row.full.adapter_parameters == {"s1": 294_912}.get(setting, 3_145_728)
    assert round(row.full.adapter_parameters / 1e6, 2) == row.paper.sent_millions


def test_a_checkpoint_in_half_precision_is_half_as_large() -> None:
    opt = table_3(["s2"])[0].full
    assert (opt.stored_dtype, opt.stored_bytes) == ("float16", opt.float32_bytes / 2)
