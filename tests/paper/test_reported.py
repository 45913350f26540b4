"""paper: the figures are the paper's, and the shipped shapes are those of the published models."""

from __future__ import annotations

import re

import pytest

from builders import ROOT
from stages.paper import reported

PAPER = ROOT.parent / "shared" / "paper" / "fedcollm-paper.txt"
TASKS = {"CQA": "commonsense_qa", "OBQA": "openbookqa", "ARC-C": "arc_challenge", "ARC-E": "arc_easy"}


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


def test_every_setting_names_models_whose_shapes_are_shipped() -> None:
    for preset in reported.PRESETS.values():
        assert {preset.slm, preset.llm} <= reported.checkpoints().keys()
    assert len(reported.checkpoints()) == 6


@pytest.mark.parametrize(
    ("model", "parameters", "stored"),
    [
        ("gpt2", 124_439_808, "float32"),
        ("gpt2-large", 774_030_080, "float32"),
        ("facebook/opt-1.3b", 1_315_758_080, "float16"),
        ("facebook/opt-6.7b", 6_658_473_984, "float16"),
        ("princeton-nlp/Sheared-LLaMA-1.3B", 1_345_423_360, "float32"),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616, "float16"),
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
