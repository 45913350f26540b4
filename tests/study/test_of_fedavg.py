"""FedAvg with a part of another system, as rows of a comparison: what makes them, and where they are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit, make_study
from stages.federation.compare import run_all
from stages.federation.run import run
from stages.report.findings import accuracies
from stages.workspace.names import ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace

PARTS = {
    "fedprox": ("[client_training]", "proximal = 0.01"),
    "fedyogi": ("[distillation]", '[aggregation]\nserver = "fedyogi"\n'),
}


def by_hand(folder: Path, base_models: Path, method: str) -> Workspace:
    """FedAvg's own workspace of the same rows, with the part of a method."""
    toml = make_study(folder, base_models) / "fedcollm.toml"
    edit(toml, "seed = 7", 'seed = 7\nmethod = "fedavg"')
    head, lines = PARTS[method]
    edit(toml, head, f"{head}\n{lines}" if method == "fedprox" else f"{lines}\n{head}")
    return Workspace(folder)


@pytest.mark.parametrize("method", PARTS)
def test_a_row_is_fedavg_with_the_part_that_its_name_says(
    method: str, studied: Path, tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("run", "--method", method, "-w", studied)
    assert outcome.code == 0, outcome.err
    assert f"{method}, round 2 of 2" in outcome.err
    made = Workspace(studied / "baselines" / method)
    assert made.agreement.federation.method == "fedavg"
    expected = by_hand(tmp_path / "by-hand", base_models, method)
    run(expected, scores=False)
    weights, by_hand_weights, without = (
        (one.aggregate(2) / ADAPTER_WEIGHTS).read_bytes()
        for one in (made, expected, Workspace(studied / "baselines/fedavg"))
    )
    assert weights == by_hand_weights
    assert weights != without


def test_they_stand_in_the_tables_of_small_models_beside_fedavg(
    studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    asked = ["--methods", "fedadam,fedprox,fedavg,fedcollm"]
    outcome = fedcollm("compare", "--seeds", "7", *asked, "--json", "-w", studied)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["methods"] == ["fedcollm", "fedavg", "fedprox", "fedadam"]
    for table in ("clients", "slm"):
        assert found["tables"][table].keys() == {"zero-shot", "fedavg", "fedprox", "fedadam", "fedcollm"}
        assert {"fedprox", "fedadam"} < found["differences"][table].keys()
    assert not {"fedprox", "fedadam"} & found["tables"]["llm"].keys()
    assert found["budgets"]["fedprox"] == found["budgets"]["fedavg"]
    told = fedcollm("compare", "--seeds", "7", *asked, "--collect", "-w", studied).out
    assert re.search(r"FedProx\W+\d", told)
    assert re.search(r"FedAdam\W+\d", told)
    assert "FedProx, FedAdam: FedAvg with that part by its defaults" in " ".join(told.split())
    drawn = {row["method"] for row in accuracies(Workspace(studied), "slm", "acc")}
    assert {"fedprox", "fedadam", "fedavg", "fedcollm"} <= drawn


@pytest.mark.parametrize(
    ("head", "lines", "method", "message"),
    [
        (
            "[client_training]",
            "proximal = 0.5",
            "fedprox",
            "fedprox is fedavg here: client_training.proximal = 0.5 in this agreement is for every method",
        ),
        (
            "[aggregation]",
            'server = "fedadam"',
            "fedadam",
            "fedadam is fedavg here: aggregation.server = fedadam in this agreement is for every method",
        ),
        ("[privacy]", "epsilon = 8.0", "fedprox", "proximal is not for the training of differential privacy"),
    ],
)
def test_what_would_be_another_row_or_cannot_be_is_refused_before_anything_is_trained(
    head: str, lines: str, method: str, message: str, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    toml = workspace_folder / "fedcollm.toml"
    if head in toml.read_text():
        edit(toml, head, f"{head}\n{lines}")
    else:
        toml.write_text(f"{toml.read_text()}\n{head}\n{lines}\n")
    outcome = fedcollm("compare", "--seeds", "7,8", "--methods", f"fedcollm,{method}", "-w", workspace_folder)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert not (workspace_folder / "exchange").exists()
    assert not (workspace_folder / "baselines").exists()


@pytest.mark.parametrize(
    ("method", "part"), [("fedprox", "client_training.proximal"), ("fedadam", 'aggregation.server = "fedadam"')]
)
def test_in_an_agreement_it_is_said_by_its_keys(
    method: str, part: str, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(workspace_folder / "fedcollm.toml", "seed = 7", f'seed = 7\nmethod = "{method}"')
    outcome = fedcollm("status", "-w", workspace_folder)
    assert outcome.code == 2
    assert f'an agreement says it by method = "fedavg" and {part}' in " ".join(outcome.err.split())


def test_another_optimiser_than_the_agreements_takes_its_place_with_its_own_keys(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(
        f'{toml.read_text()}\n[aggregation]\nserver = "fedadam"\nbeta_2 = 0.5\nserver_learning_rate = 0.1\n'
    )
    run_all(Workspace(workspace_folder), seeds=[7], methods=["fedavgm"])
    made = Workspace(workspace_folder / "baselines/fedavgm").agreement.aggregation
    assert made.server_keys == {"server_learning_rate": 1.0, "server_momentum": 0.9}
