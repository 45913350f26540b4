"""The report's first lines, and its table of scores under attack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from builders import Outcome
from stages.artefacts.records import read_result
from stages.report import attacked
from stages.report.heading import listed, measured
from stages.workspace.paths import Workspace


def test_the_models_are_named(finished: Path) -> None:
    assert measured(Workspace(finished)) == "FedCoLLM: 3 clients, 2 rounds, seed 7. LLM: models/llm; SLM: models/slm."


def test_clients_models_of_their_own_are_named_with_who_has_them(unlike_once: Path) -> None:
    workspace = Workspace(unlike_once)
    said = measured(workspace)
    named = {k: workspace.of_client(k).agreement.slm.model for k in workspace.clients}
    assert all(Path(name).name in said for name in named.values())
    assert "client" in said.partition("LLM: ")[2]


def test_names_are_listed_as_people_do() -> None:
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_scores_under_attack_stand_beside_those_without(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    workspace = Workspace(finished)
    assert attacked.tables(workspace) == []
    for words in ("", "--attack 0.05 --attack-steps 2"):
        given = ["evaluate", "--round", 1 + bool(words), *words.split()]
        assert fedcollm(*given, "-w", finished).code == 0
    found = read_result(workspace.result(2, "slm"))["tasks"]["colours"]["metrics"]
    [table] = attacked.tables(workspace)
    shown = [f"{100 * found[name]:.1f}" for name in ("acc", "robust_acc")]
    assert table.rows == [["slm", "2", "colours", *shown, "radius 0.05, steps 2"]]
    assert fedcollm("report", "-w", finished).code == 0
    assert "<caption>Under attack</caption>" in (workspace.report / "index.html").read_text()
