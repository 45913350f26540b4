"""Tables for papers: LaTeX that a strict reader takes, and CSV with one figure a row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from rich.console import Group
from rich.table import Table

from builders import Outcome
from fedcollm_cli.console import Console
from fedcollm_cli.views import progress
from fedcollm_cli.views.sheets import Sheet, Tables, in_latex
from stages.artefacts.records import Result

MACROS = {"textbackslash", "textasciicircum", "textasciitilde", "textbar", "textless", "textgreater", "textquotedbl"}
N = r"[-+]?\d+(\.\d+)?"
MATHS = re.compile(rf"D\^a|D_p|\\pm|{N}( \\pm {N})?(\\ \[{N}, {N}\])?(\^{{\*}})?")
RULES = ["toprule", "midrule", "bottomrule"]


def cells(line: str) -> list[str]:
    """A row's cells: it ends by two backslashes, and & stands between them."""
    assert line.endswith(r" \\")
    return re.split(r"(?<!\\)&", line.removesuffix(r" \\"))


def check_text(text: str) -> None:
    """Of what one cell or caption holds: known macros, balanced braces and dollars, nothing special unescaped."""
    for maths in re.findall(r"(?<!\\)\$(.*?)(?<!\\)\$", text):
        assert MATHS.fullmatch(maths), maths
    text = re.sub(r"(?<!\\)\$.*?(?<!\\)\$", "", text)
    names = re.findall(r"\\([a-z]+)\{\}", text)
    assert set(names) <= MACROS, names
    text = re.sub(r"\\[a-z]+\{\}", "", text)
    text = re.sub(r"\\[%_&$#{}]", "", text)
    assert not re.search(r"[\\%_&$#{}^~<>|]", text.removeprefix("{}")), text


def check_latex(text: str, rows: list[int]) -> None:
    """Tables alone, each with the rules of booktabs, and as many cells in each row as columns. rows: of each table."""
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == r"% needs \usepackage{booktabs}"
    found = []
    lines = [line for line in lines if line and not line.startswith("%")]
    while lines:
        assert [lines.pop(0), lines.pop(0)] == [r"\begin{table}", r"\centering"]
        if caption := re.fullmatch(r"\\caption\{(.*)\}", lines[0]):
            check_text(caption[1])
            lines.pop(0)
        kinds = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines.pop(0))
        assert kinds
        end = lines.index(r"\end{tabular}")
        inside, rest = lines[:end], lines[end + 1 :]
        assert [line[1:] for line in inside if line[1:] in RULES] == RULES
        assert (inside[0], inside[2], inside[-1]) == tuple(f"\\{rule}" for rule in RULES)
        for line in (inside[1], *inside[3:-1]):
            assert len(cells(line)) == len(kinds[1])
            for cell in cells(line):
                check_text(cell.strip())
        found.append(len(inside) - 4)
        assert rest.pop(0) == r"\end{table}"
        lines = rest
    assert found == rows


def test_a_table_of_the_oddest_names_is_latex() -> None:
    odd = r"50 % of a_b & {c} #1 $x$ \n ^ ~ <d> | \textbf{e}"
    sheet = Sheet(odd, ["method", odd], [["[1, 2]", "-"], ["*", odd], [odd, "71.1 ± 0.4"]])
    text = Tables([sheet], [f"a note with % and\n{odd}"], [], []).latex()
    check_latex(text, [3])
    assert r"{}[1, 2] & -- \\" in text
    assert len([line for line in text.splitlines() if line.startswith("% a note")]) == 1


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("71.1", "$71.1$"),
        ("71.1 ± 0.4", r"$71.1 \pm 0.4$"),
        ("+95.0 [85.2, 104.8]*", r"$+95.0\ [85.2, 104.8]^{*}$"),
        ("-0.5 [-1.2, 0.2]", r"$-0.5\ [-1.2, 0.2]$"),
        ("-", "--"),
        ("FedAvg + D^a", "FedAvg + $D^a$"),
        ("Standalone + D_p", "Standalone + $D_p$"),
        ("arc_easy", r"arc\_easy"),
        ("a^b", r"a\textasciicircum{}b"),
    ],
)
def test_figures_are_mathematics_and_names_are_text(cell: str, shown: str) -> None:
    text = Tables([Sheet("", ["a"], [[cell]])], [], [], []).latex()
    assert f"    {shown} \\\\" in text.splitlines()


def test_a_text_in_latex_is_on_one_line() -> None:
    assert in_latex("a\nb") == r"a\textbackslash{}nb"


def test_compare_prints_latex(studied_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    text = fedcollm("compare", "--latex", "-w", studied_once).out
    # Table 1 has four rows, Table 2 five, the server's SLM four; FedCoLLM minus five others; five methods' budgets.
    check_latex(text, [4, 5, 4, 5, 5])
    found = json.loads(fedcollm("compare", "--json", "-w", studied_once).out)["tables"]["llm"]["fedcollm"]["colours"]
    assert rf"FedCoLLM & ${100 * found['mean']:.1f} \pm {100 * found['deviation']:.1f}$ \\" in text
    assert "% seeds 7, 8; ± is the standard deviation over seeds" in text


def test_evaluate_prints_a_table_and_its_figures(studied_once: Path, fedcollm: Callable[..., Outcome]) -> None:
    words = ("evaluate", "--round", 2, "--model", "llm", "-w", studied_once)
    written = json.loads((studied_once / "results/round-0002/llm.json").read_text())["tasks"]["colours"]
    metrics = written["metrics"]
    lines = list(csv.DictReader(io.StringIO(fedcollm(*words, "--csv").out)))
    place = {"model": "llm", "round": "2", "task": "colours", "questions": str(written["questions"])}
    assert {"metric": "acc", "figure": "mean", "value": str(metrics["acc"]), **place} in lines
    assert {"metric": "acc", "figure": "standard_error", "value": str(metrics["acc_stderr"]), **place} in lines
    assert len(lines) == len(metrics)
    check_latex(fedcollm(*words, "--latex").out, [1])
    head, rule, row = fedcollm(*words, "--markdown").out.splitlines()
    assert head.startswith("| model | task | round | questions | acc | stderr |")
    assert set(rule) == set("|-: ")
    assert row.startswith(f"| llm | colours | 2 | {written['questions']} | {metrics['acc']:.4f} |")


# --- on a terminal of 80 columns, and in a pipe

LONG = "commonsense_qa_with_a_name_that_is_longer_than_half_of_a_terminal"
WORDS = "a sentence of a dozen words that is far too long for one cell of a narrow table"


def printed(capfd: pytest.CaptureFixture[str], *parts: Table | str) -> list[str]:
    with Console(quiet=True, as_json=False) as console:
        console.result(None, Group(*parts))
    return capfd.readouterr().out.splitlines()


@pytest.fixture
def table() -> Table:
    made = Table()
    for name in ("task", "accuracy", "said", "interval"):
        made.add_column(name, justify="right")
    made.add_row(LONG, "0.1234", WORDS, "+95.0 [85.2, 104.8]*")
    return made


def test_a_pipe_gets_each_row_on_one_line(
    table: Table, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = printed(capfd, table, f"{WORDS}, {WORDS}")
    [row] = [line for line in lines if LONG in line]
    assert all(cell in row for cell in ("0.1234", WORDS, "+95.0 [85.2, 104.8]*"))
    assert lines[-1] == f"{WORDS}, {WORDS}"


def test_a_narrow_terminal_breaks_lines_and_no_word(
    table: Table, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capfd, table, WORDS)
    words = {word for line in lines for word in line.replace("│", " ").split()}
    assert {LONG, "0.1234", *WORDS.split(), "104.8]*"} <= words
    small = Table()
    small.add_column("task")
    small.add_column("said")
    small.add_row("arc_easy", f"{WORDS}, {WORDS}")
    assert max(map(len, printed(capfd, small))) <= 80


def test_a_score_of_25_digits_is_shown_with_four() -> None:
    scored = {"metrics": {"word_perplexity": 1.2345678e24, "acc": 0.5}, "questions": 3, "questions_in_all": 3, "cut": 0}
    result = cast(Result, {"subject": "slm", "round": 1, "tasks": {"wikitext": scored}})
    [row] = progress.scores([result]).sheets[0].rows
    assert row == ["slm", "wikitext", "1", "3", "0.5000", "", "1.235e+24"]
