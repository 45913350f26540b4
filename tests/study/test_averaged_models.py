"""A study of FedMKT whose clients are averaged: baselines without that, a table for the average, and the report."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Once

from builders import Outcome, ask, edit, make_equal_workspace
from stages.export.export import export
from stages.federation.compare import compare, run_all
from stages.federation.sweep import sweep
from stages.report.charts import Chart
from stages.report.drawing import draw
from stages.report.knowledge_figures import figures_of
from stages.runtime.errors import NotReady, UsageProblem
from stages.study import variants
from stages.study.comparison import Comparison
from stages.study.results import check_finished, open_study
from stages.workspace.commands import Command
from stages.workspace.methods import Method
from stages.workspace.paths import Workspace

METHODS: list[Method] = ["fedmkt", "fedavg", "standalone-public"]


def make_equal_study(folder: Path, unlike_models: Path) -> Path:
    """One round, counted in passes, and questions on which a little training changes answers."""
    make_equal_workspace(folder, unlike_models)
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text().replace("1e-2", "0.1"))
    edit(toml, "rounds = 2", "rounds = 1")
    edit(toml, "steps = 5", "epochs = 1.0")
    ask(folder)
    return folder


@pytest.fixture(scope="module")
def studied(once: Once, unlike_models: Path) -> Path:
    def fill(top: Path) -> None:
        run_all(Workspace(make_equal_study(top / "study", unlike_models)), seeds=[7], methods=METHODS)

    return once("equal-studied", fill) / "study"


@pytest.fixture(scope="module")
def compared(studied: Path) -> Comparison:
    return compare(Workspace(studied))


def accuracy(home: Path, name: str) -> float:
    found: float = json.loads((home / f"results/{name}.json").read_text())["tasks"]["colours"]["metrics"]["acc"]
    return found


@pytest.mark.parametrize(
    "method", ["fedavg", "standalone", "standalone-public", "llm2slm", "centralized", "fedcollm", "fedavg-aux"]
)
def test_no_other_method_has_the_key_and_all_else_is_theirs(method: Method, equal_folder: Path) -> None:
    parent = Workspace(equal_folder)
    place, changes = variants.baseline(parent, method)
    made = variants.make_variant(parent, place, changes, made_by=Command("run", method=method))
    found = tomllib.loads((made.root / "fedcollm.toml").read_text())["aggregation"]
    assert found == {"weighting": "samples"}
    assert made.agreement.averages == (method in ("fedavg", "fedcollm", "fedavg-aux"))


def test_the_average_has_a_table_beside_the_clients_means(studied: Path, compared: Comparison) -> None:
    assert set(compared.tables) == {"llm", "clients", "aggregate"}
    found = {row: by_task["all tasks"].mean for row, by_task in compared.tables["aggregate"].items()}
    expected = {method: studied / place for method, place in (("fedmkt", ""), ("fedavg", "baselines/fedavg"))}
    assert found == pytest.approx(
        {method: accuracy(home, "round-0001/aggregate") for method, home in expected.items()}
        | {"zero-shot": accuracy(studied, "zero-shot/slm")}
    )
    own = [accuracy(studied, f"round-0001/client-{k}") for k in (1, 2, 3)]
    assert compared.tables["clients"]["fedmkt"]["all tasks"].mean == pytest.approx(sum(own) / 3)
    assert compared.compared == "fedmkt"
    assert compared.differences["aggregate"]["fedavg"]["all tasks"].mean == pytest.approx(
        found["fedmkt"] - found["fedavg"]
    )


def test_clients_are_given_as_much_whether_they_are_averaged_or_not(compared: Comparison) -> None:
    for client, rows in ((1, 12), (2, 24), (3, 8)):
        examples = {method: compared.budgets[method][f"client-{client}"].examples for method in METHODS}
        assert examples == {"fedavg": rows, "fedmkt": rows + 12, "standalone-public": rows + 12}


def test_a_servers_own_machine_compares_nothing(
    studied: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    server = shutil.copytree(studied, tmp_path / "server", symlinks=True)
    shutil.rmtree(server / "baselines")
    assert fedcollm("compare", "-w", server).code == 0
    for client in (1, 2, 3):
        shutil.rmtree(server / f"private/client-{client}")
    refused = fedcollm("compare", "-w", server)
    assert refused.code == 2
    assert "compare needs the models of all parties in one workspace; client 1's are not here" in refused.err
    assert "fedcollm evaluate scores what a party alone has" in refused.err


def test_words_say_that_it_averages(studied: Path, fedcollm: Callable[..., Outcome]) -> None:
    said = fedcollm("compare", "-w", studied).out
    assert "the average of the clients' SLMs, which they would go on with" in said
    assert "FedMKT averages the clients' adapters after each round: aggregation.average" in said
    assert "what distillation and averaging bought beyond that" in said


def test_a_round_without_its_average_is_not_finished(equal: Path) -> None:
    study = open_study(Workspace(equal), [7], ["fedmkt"])
    check_finished(study)
    (equal / "private/server/round-0002/aggregate").rename(equal / "private/server/aggregate")
    with pytest.raises(NotReady, match="private/server/round-0002/aggregate is not there"):
        check_finished(study)


def test_a_sweep_compares_averaging_with_none_by_what_both_have(equal_folder: Path) -> None:
    edit(equal_folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    found = sweep(Workspace(equal_folder), grid={"aggregation.average": [True, False]})
    assert [row.settings for row in found.rows] == [{"aggregation.average": True}, {"aggregation.average": False}]
    assert all(set(row.scores) == {"llm", "clients"} for row in found.rows)
    places = [equal_folder / f"sweeps/average={value}" for value in (True, False)]
    assert [(place / "private/server/round-0001/aggregate").exists() for place in places] == [True, False]


def test_the_report_shows_the_average_and_what_averaging_loses(studied: Path, equal: Path, unlike_once: Path) -> None:
    figures = {one.name: one for one in figures_of(Workspace(studied), "acc")}
    drawn = {
        name: draw(figures[name], Workspace(studied)) for name in ("accuracy-aggregate", "lost-by-averaging", "bytes")
    }
    for chart in drawn.values():
        assert isinstance(chart, Chart)
    rows = drawn["accuracy-aggregate"].rows  # type: ignore[union-attr]
    assert {row["method"] for row in rows} == {"Zero-Shot", "FedAvg", "FedMKT"}
    drift = draw({one.name: one for one in figures_of(Workspace(equal), "acc")}["drift-norm"], Workspace(equal))
    assert isinstance(drift, Chart)
    assert len(drift.rows) == 3 * 2
    assert "Adapters, which are averaged, have 256 numbers each." in drawn["bytes"].caption  # type: ignore[union-attr]
    assert not {"accuracy-aggregate", "lost-by-averaging", "drift-norm"} & {
        one.name for one in figures_of(Workspace(unlike_once), "acc")
    }


@pytest.mark.parametrize("client", [None, 2])
def test_the_average_and_a_clients_adapter_are_exported_and_their_cards_say_it(client: int | None, equal: Path) -> None:
    export(Workspace(equal), round=2, model="aggregate" if client is None else "slm", client=client)
    name = "aggregate" if client is None else "client-2"
    card = (equal / "exports" / f"{name}-round-0002/README.md").read_text()
    assert "After each round a server averages the clients' adapters" in card
    assert ("The average of the clients' small models" in card) == (client is None)


def test_the_server_has_an_average_and_no_slm(equal: Path) -> None:
    with pytest.raises(UsageProblem, match="makes no SLM at the server") as refused:
        export(Workspace(equal), round=2, model="slm")
    assert "--model aggregate" in str(refused.value.mend)
