"""paper: the figures are the paper's, and the shipped shapes are those of the published models."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from builders import ROOT
from stages.paper import reported

FEDMKT = ROOT.parent / "shared" / "paper" / "fedmkt-notes.md"
PAPER = ROOT.parent / "shared" / "paper" / "fedcollm-paper.txt"
TASKS = {"CQA": "commonsense_qa", "OBQA": "openbookqa", "ARC-C": "arc_challenge", "ARC-E": "arc_easy"}
FEDMKT_TASKS = {
    **{"RTE": "rte", "WiC": "wic", "BoolQ": "boolq"},
    **{name: TASKS[name] for name in ("CQA", "ARC-E", "ARC-C")},
    **{"S-NI": "super_natural_instructions", "DialogSum": "dialogsum"},
}
SAME_SLM: dict[reported.Setting, str] = {
    **{"mkt-s1": "fedavg", "mkt-s2": "fedavg"},
    **{"mkt-one-to-one-s1": "llm2slm", "mkt-one-to-one-s2": "llm2slm"},
}
"""The method beside Standalone and FedMKT where all clients have the same SLM."""


def test_the_figures_that_everyone_compares_with() -> None:
    assert [reported.accuracy("s2", "slm", method, "arc_easy") for method in ("standalone", "fedavg", "fedcollm")] == [
        59.93,
        59.97,
        60.01,
    ]
    assert [reported.accuracy(setting, "llm", "fedcollm", "commonsense_qa") for setting in reported.SETTINGS] == [
        53.5,
        68.1,
        67.1,
    ]
    assert reported.accuracy("s1", "slm", "centralized", "arc_easy") is None
    assert reported.accuracy("s1", "llm", "fedcollm", "another_task") is None
    assert reported.tables()["source"]["arxiv"] == "2411.11707"


def test_the_data_hold_84_accuracies_three_methods_of_the_llm_and_four_of_the_slm() -> None:
    found = [
        reported.accuracy(setting, model, method, task)
        for setting in reported.SETTINGS
        for model, tasks in reported.tables()["accuracy"].items()
        for task, methods in tasks.items()
        for method in methods
    ]
    assert len(found) == 3 * 4 * (3 + 4)
    assert all(value is not None and 15 < value < 77 for value in found)


@pytest.mark.real
@pytest.mark.skipif(not PAPER.exists(), reason="the paper's text is not beside the checkout")
def test_every_figure_stands_in_the_papers_text() -> None:
    tables = PAPER.read_text().split("Table 1: We evaluate")
    llm, slm = tables[0].split("Task Method S1: Server")[1], tables[1].split("Task Method S1: Clients")[1]
    for model, text in (("llm", llm), ("slm", slm.split("Table 2: We evaluate")[0])):
        task, lines = "", 0
        for line in text.splitlines()[1:]:
            found = re.fullmatch(r"(?:(\S+) )?(\S+) ([\d.]+) ([\d.]+) ([\d.]+)", line)
            assert found, line
            task, lines = TASKS.get(found[1], task), lines + 1
            given = [reported.accuracy(setting, model, found[2].lower(), task) for setting in reported.SETTINGS]
            assert given == [float(found[i]) for i in (3, 4, 5)]
        assert lines == {"llm": 12, "slm": 16}[model]


# --- FedMKT's


def test_each_of_fedmkts_settings_has_its_figures_by_model_method_and_task() -> None:
    opt, own = "facebook/opt-1.3b", ("zero-shot", "standalone", "fedmkt")
    assert [reported.accuracy("mkt-heterogeneous", opt, row, "rte") for row in own] == [52.7, 62.5, 65.7]  # Table 2
    assert reported.accuracy("mkt-heterogeneous", "llm", "centralized", "dialogsum") == 27.7
    assert [reported.accuracy("mkt-s1", "slm", row, "arc_easy") for row in ("fedavg", "fedmkt")] == [60.6, 61.7]
    assert reported.accuracy("mkt-one-to-one-s2", "slm", "llm2slm", "commonsense_qa") == 59.1  # Table 4


def test_fedmkts_unlike_clients_have_no_mean_and_its_homogeneous_ones_no_figure_each() -> None:
    assert reported.accuracy("mkt-heterogeneous", "slm", "fedmkt", "rte") is None
    assert reported.accuracy("mkt-s2", "facebook/opt-1.3b", "fedmkt", "arc_easy") is None


@pytest.mark.parametrize("setting", get_args(reported.Setting))
def test_every_setting_says_its_source_and_has_figures_of_the_models_that_it_names(setting: reported.Setting) -> None:
    found = reported.accuracies(setting)
    assert found.accuracy.keys() - {"llm", "slm"} <= set(found.slms)
    assert {"slm", *found.slms} & found.accuracy.keys()
    assert found.source["arxiv"] == ("2406.02224" if setting.startswith("mkt-") else "2411.11707")
    for tasks in found.accuracy.values():
        assert list(tasks) == found.tasks
        assert all(
            0 < figure < 100 and row in reported.LABELS for rows in tasks.values() for row, figure in rows.items()
        )


def test_fedmkts_tables_hold_120_figures_of_unlike_slms_and_60_of_equal_ones() -> None:
    counts = {
        setting: sum(len(rows) for tasks in reported.accuracies(setting).accuracy.values() for rows in tasks.values())
        for setting in get_args(reported.Setting)
        if setting.startswith("mkt-")
    }
    # Table 2: 8 tasks, 5 models, 3 methods. Tables 3 and 4: in each setting 3 tasks, 3 methods of SLMs, 2 of the LLM.
    assert counts.pop("mkt-heterogeneous") == 8 * 5 * 3
    assert set(counts.values()) == {3 * (3 + 2)}
    assert len(counts) == 4


@pytest.mark.real
@pytest.mark.skipif(not FEDMKT.exists(), reason="a transcript of FedMKT's tables is not beside the checkout")
def test_every_figure_of_fedmkt_stands_in_the_transcript() -> None:
    unlike, llm = reported.accuracies("mkt-heterogeneous").slms, ("zero-shot", "fedmkt", "centralized")
    by_cells: dict[int, list[tuple[reported.Setting, str, tuple[str, ...]]]] = {
        5: [("mkt-heterogeneous", slm, ("zero-shot", "standalone", "fedmkt")) for slm in unlike],
        8: [],
    }
    by_cells[5].append(("mkt-heterogeneous", "llm", llm))
    for setting, other in SAME_SLM.items():
        by_cells[8] += [(setting, "slm", ("standalone", other, "fedmkt")), (setting, "llm", llm[1:])]
    lines = 0
    for line in FEDMKT.read_text().splitlines():
        name, *cells = [cell.strip() for cell in re.split(r"[|;]", line.strip("|"))]
        if task := FEDMKT_TASKS.get(name):
            lines += 1
            for cell, (setting, model, rows) in zip(cells, by_cells[len(cells)], strict=True):
                assert [reported.accuracy(setting, model, row, task) for row in rows] == [*map(float, cell.split())]
    assert lines == 8 + 3


# --- shapes


def test_every_setting_names_models_whose_shapes_are_shipped() -> None:
    for preset in reported.PRESETS.values():
        assert {preset.slm, preset.llm, *(model for model, _ in preset.own)} <= reported.checkpoints().keys()
    assert len(reported.checkpoints()) == 8


@pytest.mark.parametrize(
    ("model", "parameters", "stored"),
    [
        ("gpt2", 124_439_808, "float32"),
        ("gpt2-large", 774_030_080, "float32"),
        ("facebook/opt-1.3b", 1_315_758_080, "float16"),
        ("facebook/opt-6.7b", 6_658_473_984, "float16"),
        ("princeton-nlp/Sheared-LLaMA-1.3B", 1_345_423_360, "float32"),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, "float16"),
        ("gpt2-xl", 1_557_611_200, "float32"),
        ("bigscience/bloom-1b1", 1_065_314_304, "float16"),
    ],
)
def test_a_shipped_configuration_gives_the_published_number_of_parameters(
    model: str, parameters: int, stored: str
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = reported.checkpoints()[model]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config))
    assert sum(parameter.numel() for parameter in base.parameters()) == parameters
    assert checkpoint.stored_dtype == stored
