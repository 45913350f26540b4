"""A study of FedMKT: its baselines at equal budgets, and figures of each client's own model."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import Outcome, edit, make_study, write_rows
from stages.artefacts.reading import read_manifest
from stages.data.row_files import read_rows
from stages.federation.compare import compare
from stages.federation.run import run
from stages.federation.sweep import sweep
from stages.runtime.errors import BadNumbers, Refused, UsageProblem
from stages.runtime.events import ignore
from stages.study import budgets, variants
from stages.study.budgets import Spent
from stages.study.comparison import Comparison
from stages.study.paper_beside import beside
from stages.study.table_rows import Row, methods_of
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

METHODS = ["standalone", "centralized", "fedmkt", "llm2slm", "standalone-public"]
OWN = ["zero-shot", "standalone", "standalone-public", "llm2slm", "fedmkt"]


@pytest.fixture(scope="module")
def compared(unlike_studied_once: Path) -> Comparison:
    return compare(Workspace(unlike_studied_once))


def accuracy(folder: Path, method: str, place: str) -> float:
    home = folder if method == "fedmkt" else folder / "baselines" / method
    found: float = json.loads((home / f"results/{place}.json").read_text())["tasks"]["arc_easy"]["metrics"]["acc"]
    return found


def changed(folder: Path, method: Any) -> dict[str, Any]:
    """The settings of a method's workspace, which is made."""
    parent = Workspace(folder)
    made_by = Command("run", method=method)
    place, changes = variants.baseline(parent, method)
    made = variants.make_variant(parent, place, changes, made_by=made_by)
    return tomllib.loads((made.root / "fedcollm.toml").read_text())


# --- baselines


def test_each_client_keeps_its_own_model_by_every_method_that_averages_nothing(unlike_folder: Path) -> None:
    for method in ("standalone", "standalone-public", "llm2slm"):
        found = changed(unlike_folder, method)
        assert [found["clients"][client]["slm"]["model"] for client in ("2", "3")] == ["models/slm-2", "models/slm-3"]
    found = changed(unlike_folder, "centralized")
    assert "clients" not in found
    assert found["slm"]["model"] == "models/llm"


@pytest.mark.parametrize("method", ["fedavg", "fedavg-aux", "fedcollm"])
def test_unlike_models_are_not_averaged(method: str, unlike_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("run", "--method", method, "-w", unlike_folder)
    assert outcome.code == 2
    assert f"{method} averages adapters of one model: client 2 has a model of its own, models/slm-2" in outcome.err
    assert "standalone, standalone-public, llm2slm, fedmkt and centralized" in outcome.err
    assert not (unlike_folder / "baselines").exists()


def test_tables_that_say_what_holds_for_all_are_dropped_where_adapters_are_averaged(unlike_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    text = toml.read_text().replace("models/slm-2", "models/slm-1").replace("models/slm-3", "models/slm-1")
    toml.write_text(text.replace("r = 2\n", "r = 4\nalpha = 8\n"))
    assert "clients" not in changed(unlike_folder, "fedavg")
    toml.write_text(toml.read_text() + "[clients.1]\nlearning_rate = 0.5\n")
    with pytest.raises(UsageProblem, match="client 1 has a learning rate of its own"):
        variants.baseline(Workspace(unlike_folder), "fedavg")


def test_settings_that_another_method_does_not_have_are_taken_back(unlike_folder: Path, workspace_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    edit(toml, 'select = "min-ce"', 'select = "none"\ndivergence = "spans"')
    for method in ("standalone", "standalone-public", "centralized"):
        assert not {"select", "divergence"} & changed(unlike_folder, method)["distillation"].keys()
    assert changed(unlike_folder, "llm2slm")["distillation"]["divergence"] == "spans"
    edit(workspace_folder / "fedcollm.toml", "[distillation]", '[distillation]\norder = "alternating"')
    assert "order" not in changed(workspace_folder, "fedmkt")["distillation"]


def test_fedmkt_beside_fedcollm_has_the_auxiliary_rows_as_public_ones_at_each_client(workspace_folder: Path) -> None:
    changed(workspace_folder, "fedmkt")
    made = Workspace(workspace_folder / "baselines/fedmkt")
    for client in (1, 2, 3):
        assert made.public_data(client).samefile(workspace_folder / "private/server/auxiliary.jsonl")
        assert made.client_data(client).samefile(Workspace(workspace_folder).client_data(client))


def test_in_a_workspace_of_fedcollm_fedmkt_runs_beside(tmp_path: Path, unlike_models: Path) -> None:
    folder = make_study(tmp_path / "study", unlike_models)
    edit(folder / "fedcollm.toml", "models/slm", "models/slm-2")
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    run(Workspace(folder), method="fedmkt", scores=False)
    made = Workspace(folder / "baselines/fedmkt")
    assert read_manifest(made.broadcast(1))[0].parameters == read_manifest(made.client_adapter(1, 2))[0].parameters
    assert read_manifest(made.llm(1))[0].metrics.keys() >= {"rows_from_client-1", "rows_from_client-2"}
    # An epoch of 11 and of 5 rows in steps of 4, then one of 7 public rows: 3 + 2 and 2 + 2 steps.
    steps = {party: done.steps for party, done in budgets.spent(made).items()}
    assert steps == {"client-1": 5, "client-2": 4, "server": 2}


@pytest.mark.parametrize("method", ["standalone", "standalone-public", "llm2slm"])
def test_every_method_begins_with_the_same_local_training(method: str, unlike_studied_once: Path) -> None:
    ours, theirs = Workspace(unlike_studied_once), Workspace(unlike_studied_once / "baselines" / method)
    for client in (1, 2, 3):
        weights = [(one.client_trained(1, client) / "adapter_model.safetensors").read_bytes() for one in (ours, theirs)]
        assert weights[0] == weights[1]


def test_other_public_rows_than_the_study_s_are_refused(unlike_studied: Path) -> None:
    copy = unlike_studied / "baselines/llm2slm/private/client-2/public.jsonl"
    copy.unlink()
    write_rows(copy, [{"prompt": "Q", "completion": " red"}])
    with pytest.raises(Refused, match=r"public\.jsonl is not what was trained on in round 1"):
        compare(Workspace(unlike_studied))


def test_without_distillation_there_is_no_fedmkt(unlike_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    for key in ("lambda_slm", "lambda_llm"):
        edit(toml, f"{key} = 1.0", f"{key} = 0.0")
    with pytest.raises(UsageProblem, match="llm2slm without distillation is standalone-public: both lambdas are 0"):
        variants.baseline(Workspace(unlike_folder), "llm2slm")


def test_one_slm_for_all_brings_the_methods_that_average_and_unlike_tokenizers_none_that_distils(
    unlike_folder: Path, workspace_folder: Path
) -> None:
    assert methods_of(Workspace(workspace_folder)) == ["fedcollm", "fedavg", "fedavg-aux", "standalone", "centralized"]
    assert methods_of(Workspace(unlike_folder)) == METHODS
    toml = unlike_folder / "fedcollm.toml"
    toml.write_text(toml.read_text().partition("[clients.2.slm]")[0])
    assert methods_of(Workspace(unlike_folder)) == ["fedavg", *METHODS]
    edit(workspace_folder / "fedcollm.toml", "seed = 7\n", 'seed = 7\nmethod = "fedmkt"\n')
    assert methods_of(Workspace(workspace_folder)) == ["fedcollm", "fedavg", *METHODS]


# --- budgets


def test_all_clients_train_alike_and_on_public_rows_alike(compared: Comparison, unlike_studied_once: Path) -> None:
    # 3 steps of 4 rows; an epoch of 12 public rows is 3 steps, at the client and at the server.
    for method in METHODS:
        home = unlike_studied_once if method == "fedmkt" else unlike_studied_once / "baselines" / method
        own, public = (budgets.spent(Workspace(home), kind) for kind in ("own", "public"))
        clients = ["client-1"] if method == "centralized" else ["client-1", "client-2", "client-3"]
        assert {party: (done.steps, done.examples) for party, done in own.items()} == dict.fromkeys(clients, (3, 12))
        told = clients if method in ("fedmkt", "llm2slm", "standalone-public") else []
        assert {party: (done.steps, done.examples) for party, done in public.items()} == dict.fromkeys(told, (3, 12))
        together = {party: own[party] + public.get(party, Spent()) for party in own}
        assert {party: compared.budgets[method][party] for party in own} == together
    assert compared.budgets["fedmkt"]["server"].steps == compared.budgets["centralized"]["client-1"].steps == 3


def test_centralized_has_every_party_s_rows_once(unlike_studied_once: Path) -> None:
    workspace = Workspace(unlike_studied_once)
    places = [*map(workspace.client_data, workspace.clients), workspace.auxiliary_data]
    pooled, _ = read_rows(unlike_studied_once / "baselines/centralized/private/client-1/train.jsonl")
    assert pooled == [row for place in places for row in read_rows(place)[0]]


def test_standalone_public_learns_from_nobody(unlike_studied_once: Path) -> None:
    workspace = Workspace(unlike_studied_once / "baselines/standalone-public")
    manifest, _ = read_manifest(workspace.client_adapter(1, 2))
    assert manifest.parents.keys() == {"trained"}
    assert manifest.examples == 12
    assert not any(workspace.exchange.glob("round-*/client-*"))


def test_unequal_training_on_public_rows_is_named(unlike_studied: Path) -> None:
    edited = unlike_studied / "baselines/standalone-public/private/client-2/round-0001/slm/manifest.json"
    manifest = json.loads(edited.read_text())
    edited.write_text(json.dumps(manifest | {"steps": 9}))
    with pytest.raises(BadNumbers, match=r"standalone-public gave client-2 9 steps.*fedmkt gave it 3 steps"):
        compare(Workspace(unlike_studied))


# --- tables


def test_every_client_has_a_table_of_its_own_model(compared: Comparison, unlike_studied_once: Path) -> None:
    assert list(compared.tables) == ["llm", "client-1", "client-2", "client-3"]
    for client in ("client-1", "client-2", "client-3"):
        assert list(compared.tables[client]) == OWN
        for method in OWN[1:]:
            [found] = compared.tables[client][method]["arc_easy"].by_seed  # type: ignore[index]
            assert found == pytest.approx(accuracy(unlike_studied_once, method, f"round-0001/{client}"))
        base = "slm" if client == "client-1" else client  # client 1 tunes the model in [slm]
        [found] = compared.tables[client]["zero-shot"]["arc_easy"].by_seed
        assert found == pytest.approx(accuracy(unlike_studied_once, "fedmkt", f"zero-shot/{base}"))
    assert list(compared.tables["llm"]) == ["zero-shot", "centralized", "fedmkt"]
    [found] = compared.tables["llm"]["fedmkt"]["arc_easy"].by_seed
    assert found == pytest.approx(accuracy(unlike_studied_once, "fedmkt", "round-0001/llm"))


def test_differences_are_fedmkt_s_and_their_mean_over_clients_stands_beside(compared: Comparison) -> None:
    clients = ["client-1", "client-2", "client-3"]
    assert list(compared.differences) == ["llm", *clients, "clients"]
    for row in OWN[:-1]:
        each = []
        for client in clients:
            ours, theirs = (compared.tables[client][one]["arc_easy"].mean for one in ("fedmkt", row))  # type: ignore[index]
            assert compared.differences[client][row]["arc_easy"].mean == pytest.approx(ours - theirs)  # type: ignore[index]
            each.append(ours - theirs)
        assert compared.differences["clients"][row]["arc_easy"].mean == pytest.approx(sum(each) / 3)  # type: ignore[index]


def test_the_table_in_words_has_a_line_for_each_client_and_method_and_says_what_is_left_out(
    unlike_studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    said = fedcollm("compare", "--markdown", "-w", unlike_studied_once).out
    lines = [line.split(" | ")[:2] for line in said.splitlines() if line.startswith("| client ")]
    labels = ["Zero-Shot", "Standalone", "Standalone + D_p", "LLM2SLM", "FedMKT"]
    models = [[f"| client {k}", label] for k in (1, 2, 3) for label in labels]
    assert [line for line in lines if line[1] in labels] == models
    assert "left out: FedCoLLM, FedAvg, since they average adapters of one model: client 2 has a model" in said
    assert "client 1: models/slm-1, client 2: models/slm-2" in said
    assert "| mean of clients |" in said
    found = csv.DictReader(io.StringIO(fedcollm("compare", "--csv", "-w", unlike_studied_once).out))
    assert {(line["table"], line["model"]) for line in found if line["method"] == "llm2slm"} == {
        (f"client-{k}", f"client-{k}") for k in (1, 2, 3)
    }


def test_the_paper_s_models_stand_beside_clients_by_name_and_the_rest_in_order(unlike_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    edit(toml, "models/slm-2", "gpt2-xl")
    edit(toml, 'model = "models/llm"', 'model = "meta-llama/Llama-2-7b-hf"')
    events: list[str] = []
    rows: dict[str, list[Row]] = {"llm": ["fedmkt"]} | {
        f"client-{k}": ["zero-shot", "standalone-public", "fedmkt"] for k in (1, 2, 3)
    }
    paper, sentences = beside(
        Workspace(unlike_folder), "mkt-heterogeneous", rows, ["arc_easy"], lambda event: events.append(event.text)
    )
    # Table 2, ARC-E: zero-shot and FedMKT; the paper has no row Standalone + D_p.
    figures = {"client-1": (57.0, 59.6), "client-2": (58.3, 59.8), "client-3": (51.5, 57.5)}
    for client, (zero_shot, fedmkt) in figures.items():
        expected = {"zero-shot": {"arc_easy": zero_shot}, "standalone-public": {}, "fedmkt": {"arc_easy": fedmkt}}
        assert paper.tables[client] == expected
    assert sentences == [
        "the paper's gpt2-xl stands beside client 2's gpt2-xl, by name",
        "the paper's facebook/opt-1.3b stands beside client 1's models/slm-1, in the order of both",
        "the paper's bigscience/bloom-1b1 stands beside client 3's models/slm-3, in the order of both",
    ]
    others = "facebook/opt-1.3b, not of client 1's models/slm-1; bigscience/bloom-1b1, not of client 3's models/slm-3"
    assert events == [f"the paper's figures of mkt-heterogeneous are of other models: {others}"]


def test_a_mean_over_equal_clients_stands_beside_a_client_of_that_model_alone(unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", "models/slm-3", "facebook/opt-1.3b")
    rows: dict[str, list[Row]] = {table: ["fedmkt"] for table in ("llm", "client-1", "client-2", "client-3")}
    paper, sentences = beside(Workspace(unlike_folder), "mkt-s2", rows, ["arc_easy"], ignore)
    assert paper.tables == {"llm": {"fedmkt": {"arc_easy": 74.8}}, "client-3": {"fedmkt": {"arc_easy": 60.1}}}
    assert sentences[1:] == ["no figure of the paper stands beside client 1, client 2"]


def test_the_paper_s_figures_are_columns_of_the_clients_table(
    unlike_studied_once: Path, fedcollm: Callable[..., Outcome]
) -> None:
    said = fedcollm("compare", "--paper", "mkt-heterogeneous", "--markdown", "-w", unlike_studied_once).out
    assert "| client | method | arc_easy | arc_easy, paper |" in said
    [line] = [line for line in said.splitlines() if line.startswith("| client 2 | FedMKT |")]
    assert line.endswith("| 59.6 |")  # OPT-1.3B's in Table 2
    assert "the paper's facebook/opt-1.3b stands beside client 2's models/slm-2, in the order of both" in said


# --- sweep


def test_a_sweep_scores_the_llm_and_each_client_s_own_model(unlike_studied: Path) -> None:
    found = sweep(Workspace(unlike_studied), grid={"clients.2.learning_rate": [0.01]})
    assert [list(row.scores) for row in found.rows] == [["llm", "client-1", "client-2", "client-3"]]
    place = unlike_studied / "sweeps/learning_rate=0.01"
    assert tomllib.loads((place / "fedcollm.toml").read_text())["clients"]["2"]["slm"]["model"] == "models/slm-2"
    own = Workspace(place).of_client(2).agreement
    assert own.client_training.learning_rate == own.distillation.slm_learning_rate == 0.01


def test_a_sweep_does_not_change_whose_models_there_are(unlike_folder: Path) -> None:
    with pytest.raises(UsageProblem, match=r"federation\.clients decides whose models there are"):
        sweep(Workspace(unlike_folder), grid={"federation.clients": [2, 3]})
