"""The report of FedMKT: who taught whom, how well vocabularies fit, and each client's own accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit
from stages.artefacts.reading import read_manifest
from stages.distillation.lessons import chosen
from stages.report import findings, knowledge_findings
from stages.report.charts import Chart
from stages.report.drawing import draw
from stages.report.knowledge_figures import figures_of
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


def names_of(folder: Path) -> list[str]:
    return [figure.name for figure in figures_of(Workspace(folder), "acc")]


def test_what_the_llm_chose_is_what_the_losses_that_were_told_say(unlike_once: Path) -> None:
    from safetensors.numpy import load_file

    workspace = Workspace(unlike_once)
    rows = knowledge_findings.choices_of_clients(workspace)
    assert len(rows) == 3 * 2
    for row in rows:
        client, round = int(row["client"].removeprefix("client ")), row["round"]
        places = workspace.knowledge(round, None), workspace.knowledge(round, client)
        told, own = (load_file(place / "knowledge.safetensors")["losses"] for place in places)
        assert row["rows"] == (chosen(own, {"server": told}, "min-ce")["server"] > 0).sum()
    of_llm = knowledge_findings.choices_of_llm(workspace)
    assert [(row["teacher"], row["round"]) for row in of_llm] == [(f"client {k}", t) for t in (1, 2) for k in (1, 2, 3)]
    for row in of_llm:
        name = row["teacher"].replace(" ", "-")
        assert row["rows"] == read_manifest(workspace.llm(row["round"]))[0].metrics[f"rows_from_{name}"]


def test_how_far_a_teacher_reaches_is_counted_in_align_s_report(unlike_once: Path) -> None:
    rows = {(row["client"], row["teacher"]): row for row in knowledge_findings.fits(Workspace(unlike_once))}
    assert len(rows) == 6
    for client in (1, 2, 3):
        report = json.loads((unlike_once / f"private/client-{client}/alignment/report.json").read_text())
        for one in report["directions"]:
            found = rows[f"client {client}", "LLM teaches" if one["teacher"] == "llm" else "client teaches"]
            measured = one["measured"]
            assert found["coverage_percent"] == pytest.approx(100 * measured["matched"] / measured["positions"])
            reached = measured["agreeing"][one["method"]] / measured["positions"]
            assert found["reached_percent"] == pytest.approx(100 * reached)


def test_losses_on_public_rows_are_the_log_s(unlike_once: Path) -> None:
    workspace = Workspace(unlike_once)
    log = [json.loads(line) for line in workspace.log("client-distill", 2, 3).read_text().splitlines()]
    steps = [line for line in log if "step" in line]
    for term in ("ft", "kd"):
        rows = [
            row
            for row in knowledge_findings.public_losses(workspace, term)
            if (row["client"], row["round"]) == ("client 3", 2)
        ]
        assert [row["loss"] for row in rows] == pytest.approx([line[f"slm_{term}"] for line in steps])
        assert [row["step"] for row in rows] == [5 + line["step"] for line in steps]  # after round 1's five


@pytest.mark.parametrize("client", [1, 2])
def test_accuracies_are_of_each_client_s_own_model_by_every_method(client: int, unlike_studied_once: Path) -> None:
    rows = findings.accuracies(Workspace(unlike_studied_once), f"client-{client}", "acc")
    assert [(row["method"], row["round"]) for row in rows] == [
        ("zero-shot", 0),
        *((method, 1) for method in ("standalone", "fedmkt", "llm2slm", "standalone-public")),
    ]
    for row in rows:
        home = unlike_studied_once / {"zero-shot": "", "fedmkt": ""}.get(row["method"], f"baselines/{row['method']}")
        base = "slm" if client == 1 else f"client-{client}"  # client 1 tunes the model in [slm]
        place = f"round-0001/client-{client}" if row["round"] else f"zero-shot/{base}"
        result = json.loads((home / f"results/{place}.json").read_text())
        assert row["accuracy_percent"] == pytest.approx(100 * result["tasks"]["arc_easy"]["metrics"]["acc"])


def test_charts_that_do_not_apply_are_left_out(unlike_folder: Path, workspace_folder: Path) -> None:
    toml = unlike_folder / "fedcollm.toml"
    all_of_it = names_of(unlike_folder)
    assert len(set(all_of_it)) == len(all_of_it)
    assert not {"accuracy-slm", "accuracy-clients", "loss-co-distill-slm", "lost-by-averaging", "drift-norm"} & set(
        all_of_it
    )
    edit(toml, '"fedmkt"', '"llm2slm"')
    untaught = {"accuracy-llm", "loss-co-distill-llm", "choices-llm"}
    assert set(all_of_it) - set(names_of(unlike_folder)) == untaught
    edit(toml, '"llm2slm"', '"standalone-public"')
    alone = {"loss-client-distill-kd", "choices-clients", "alignment"}
    assert set(all_of_it) - set(names_of(unlike_folder)) == untaught | alone
    edit(toml, '"standalone-public"', '"standalone"')
    assert set(all_of_it) - set(names_of(unlike_folder)) == untaught | alone | {"loss-client-distill-ft"}
    assert "choices-llm" not in names_of(workspace_folder)
    edit(workspace_folder / "fedcollm.toml", "seed = 7\n", 'seed = 7\nmethod = "fedmkt"\n')
    assert "accuracy-clients" in names_of(workspace_folder)  # one SLM for all


def test_a_caption_says_who_was_never_chosen(unlike: Path) -> None:
    workspace = Workspace(unlike)
    [figure] = [one for one in figures_of(workspace, "acc") if one.name == "choices-llm"]
    rows = [{"teacher": f"client {k}", "round": t, "rows": 3 * (k == 2)} for k in (1, 2, 3) for t in (1, 2)]
    assert figure.caption(rows).endswith("Client 1, client 3 taught it nothing.")
    drawn = draw(figure, workspace)
    assert isinstance(drawn, Chart)
    assert "<svg" in drawn.svg()


def test_the_page_shows_who_teaches_whom_and_the_digests_of_every_client_s_base(
    unlike_studied: Path, fedcollm: Callable[..., Outcome]
) -> None:
    assert fedcollm("report", "-w", unlike_studied).code == 0
    page = (unlike_studied / "results/report/index.html").read_text()
    for words in (
        "Who teaches whom",
        "Who teaches the LLM",
        "What the LLM teaches",
        "Client 3&#39;s SLM, models/slm-3",
    ):
        assert words in page
    for words in ("Drift between clients", "The server&#39;s SLM", "Left out. None"):
        assert words not in page
    workspace = Workspace(unlike_studied)
    role: Role = "slm"
    for client, whose in {1: "SLM base", 2: "client 2&#39;s SLM base", 3: "client 3&#39;s SLM base"}.items():
        base = read_manifest(workspace.client_adapter(1, client))[0].base
        assert f"<td>{whose}, {base.architecture}</td><td>{base.weights_sha256}</td>" in page
        assert workspace.of_client(client).agreement.model_of(role).model == f"models/slm-{client}"
