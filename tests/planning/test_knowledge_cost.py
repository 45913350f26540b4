"""comm-cost with FedMKT: bytes of what was told, estimates that come true, and the paper's count beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit
from stages.exchange.transfers import transfers
from stages.planning.knowledge_cost import knowledge_cost
from stages.workspace.paths import Workspace

HEADER = 700
"""More bytes than the header of a file of knowledge has."""


def bytes_of(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def test_what_one_tells_others_receive_to_the_byte(unlike: Path) -> None:
    found = knowledge_cost(Workspace(unlike))
    for round, name in ((0, "vocabulary-"), (1, ""), (2, "")):
        server, *clients = [one for one in found.rounds if one.round == round]
        folder = unlike / f"exchange/round-000{max(round, 1)}"
        assert server.sent_bytes == 3 * bytes_of(folder / f"{name}server")
        assert [one.received_bytes for one in clients] == [bytes_of(folder / f"{name}server")] * 3
        assert [one.sent_bytes for one in clients] == [bytes_of(folder / f"{name}client-{k}") for k in (1, 2, 3)]
    assert sum(one.sent_bytes for one in found.totals) == sum(one.size_bytes for one in transfers(Workspace(unlike)))
    assert not any(one.parameters for one in transfers(Workspace(unlike)))


def test_knowledge_stands_beside_that_client_s_adapter_its_model_and_the_papers_count(unlike: Path) -> None:
    for client, one in enumerate(knowledge_cost(Workspace(unlike)).exchanges, 1):
        assert one.sends is not None
        assert one.full is not None
        place = unlike / f"exchange/round-0001/client-{client}"
        assert one.sends.round_bytes == bytes_of(place, "*.safetensors")
        assert one.sends.once_bytes == bytes_of(place.with_name(f"vocabulary-client-{client}"), "*.safetensors")
        assert one.sends.is_estimate is False
        adapter = unlike / f"private/client-{client}/round-0001/slm/adapter_model.safetensors"
        assert one.full.adapter_bytes == adapter.stat().st_size
        assert one.model == f"models/slm-{client}"
        assert one.paper_numbers == 12 * 512 * 32  # rows x max_length x top_k
        assert one.paper_bytes == 8 * 12 * 512 * 32


def test_before_anything_was_told_estimates_are_what_it_then_comes_to(unlike: Path, unlike_folder: Path) -> None:
    told, estimated = (knowledge_cost(Workspace(folder)).exchanges for folder in (unlike, unlike_folder))
    assert knowledge_cost(Workspace(unlike_folder)).totals == []
    for one, other in zip(told, estimated, strict=True):
        for real, guess in ((one.sends, other.sends), (one.receives, other.receives)):
            assert real is not None
            assert guess is not None
            assert (guess.is_estimate, guess.once_bytes) == (True, real.once_bytes)
            assert (guess.rows, guess.positions) == (real.rows, real.positions)
            assert guess.round_bytes is not None
            assert real.round_bytes is not None
            assert 0 < real.round_bytes - guess.round_bytes < HEADER


def test_without_rows_or_models_the_figures_are_not_known(unlike_folder: Path) -> None:
    shutil.rmtree(unlike_folder / "private")
    edit(unlike_folder / "fedcollm.toml", "models/slm-2", "nobody/nothing")
    first, second, _ = knowledge_cost(Workspace(unlike_folder)).exchanges
    assert first.sends is not None
    assert first.sends.once_bytes
    assert (first.sends.round_bytes, first.paper_numbers) == (None, None)
    assert second.sends is not None
    assert (second.sends.once_bytes, second.full) == (None, None)


@pytest.mark.parametrize("method", ["llm2slm", "standalone-public"])
def test_where_clients_tell_nothing_they_send_nothing(
    method: str, unlike_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(unlike_folder / "fedcollm.toml", '"fedmkt"', f'"{method}"')
    found = json.loads(fedcollm("comm-cost", "--json", "-w", unlike_folder).out)
    assert found["tells_once"] is (method == "llm2slm")
    assert [one["sends"]["round_bytes"] for one in found["exchanges"]] == ([0, 0, 0] if method == "llm2slm" else [])
    said = fedcollm("comm-cost", "-w", unlike_folder).out
    assert ("tells what it knows in round 1 alone" if method == "llm2slm" else "nothing travels") in said


def test_an_adapter_that_is_averaged_travels_beside_and_not_instead(
    equal: Path, fedcollm: Callable[..., Outcome]
) -> None:
    told = json.loads(fedcollm("comm-cost", "--json", "-w", equal).out)
    assert told["averages"] is True
    table = fedcollm("comm-cost", "-w", equal).out
    assert "its adapter, each way" in table
    assert "its adapter instead" not in table


def test_the_table_has_a_column_for_each_client(unlike: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("comm-cost", "-w", unlike)
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("client 3", "slm-3", "once", "N x S x K instead", "times", "its adapter instead"):
        assert words in outcome.out
    assert "~" not in outcome.out
