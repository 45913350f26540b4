"""Whatever stands in a file of another party: no command prints or writes it as more than one harmless line."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from builders import Outcome, rewrite
from stages.artefacts.reading import read_artefact
from stages.export.model_card import model_card
from stages.report.charts import Chart
from stages.runtime.texts import in_cell, in_code
from stages.workspace.paths import Workspace

Fedcollm = Callable[..., Outcome]

FORGED = "FORGED"
PIECES = ["\n", "\r", "\x85", "\u2028", "\x0b", "\x1b[2J", "\x1b]0;x\x07", "\u202e", "\t", "\x00", "é", " ", "[red]"]
PIECES += ["|", "<b>", "</td>", "&lt;", "'", '"', "`", "```", "$(id)", "*", "![x](http://x)", "{{x}}", "{x}", "\\"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(lambda found: f"=a{''.join(found)}\n{FORGED}<i>")
HOSTILE = "=a\n\x1b[2J\u202e|`<b>$(id)\"'[red]\r"
some = settings(
    max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)

EXCHANGED = "exchange/round-0002/client-2"


def claiming(claim: Callable[[dict[str, Any], str], object]) -> Callable[[Path, str], None]:
    """A client's manifest, or a file beside it, that holds a text."""

    def plant(folder: Path, text: str) -> None:
        path = folder / EXCHANGED / "manifest.json"
        said = json.loads(path.read_text())
        claim(said, text)
        path.write_text(json.dumps(said))

    return plant


def in_settings(folder: Path, text: str) -> None:
    path = folder / EXCHANGED / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": text, text: text}))


def in_name(folder: Path, text: str) -> None:
    (folder / EXCHANGED / text.replace("/", ":").replace("\0", ":")).write_text("x")


def in_log(folder: Path, text: str) -> None:
    path = folder / "private/client-2/round-0002/client-train.jsonl"
    path.write_text(json.dumps({"inputs": {text: text}}) + "\n" + path.read_text())


def in_results(folder: Path, text: str) -> None:
    for path in [*folder.glob("results/*/*.json"), *folder.glob("baselines/*/results/*/*.json")]:
        result = json.loads(path.read_text())
        result["tasks"][text] = result["tasks"].pop("colours")
        result["tasks"][text]["metrics"][text] = 0.5
        result["subject"] = text
        rewrite(path, result)


def in_split(folder: Path, text: str) -> None:
    parties = {"client-1": {"rows": 3, "labels": {text: 3}, "sources": {text: 3}}}
    split = {"agreement_sha256": Workspace(folder).agreement_sha256, "parties": parties}
    (folder / "private/split.json").write_text(json.dumps(split))


def in_roster(folder: Path, text: str) -> None:
    (folder / "exchange/federation.json").write_text(json.dumps({"federation": text, text: text}))


PLANTS = {
    "federation": claiming(lambda said, text: said.update(federation=text)),
    "architecture": claiming(lambda said, text: said["base"].update(architecture=text)),
    "version": claiming(lambda said, text: said["versions"].update({text: text})),
    "parent": claiming(lambda said, text: said["parents"].update({text: "0" * 64})),
    "file": claiming(lambda said, text: said["files"].update({text: said["files"]["adapter_config.json"]})),
    "metric": claiming(lambda said, text: said["metrics"].update({text: 1.0})),
    "target": claiming(lambda said, text: said["lora"].update(target_modules=[text])),
    "key": claiming(lambda said, text: said.update({text: text})),
    "stage": claiming(lambda said, text: said.update(stage=text)),
    "settings": in_settings,
    "name": in_name,
    "log": in_log,
    "results": in_results,
    "split": in_split,
    "roster": in_roster,
}
IN_EXCHANGE = [
    "status",
    "status --verify --json",
    "verify",
    "audit",
    f"audit {EXCHANGED} --json",
    f"diff exchange/round-0002/client-1 {EXCHANGED}",
    f"diff exchange/round-0002/client-1 {EXCHANGED} --json",
    "aggregate --round 2 --overwrite",
    "pack --client 2 --round 2 --output x.fedcollm",
    "next --client 2",
]
ELSEWHERE = [
    "status",
    "audit",
    "compare",
    "compare --json",
    "compare --markdown",
    "compare --csv",
    "compare --latex",
    "evaluate --round 2",
    "next --client 2",
    "slurm --jobs",
]
COMMANDS = dict.fromkeys(PLANTS, IN_EXCHANGE) | dict.fromkeys(["log", "results", "roster"], ELSEWHERE)
QUIET = {"architecture", "version", "metric", "stage", "log", "roster"}
"""What is told of without its text, or not at all."""
del COMMANDS["split"]  # which only a page and a card tell of


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory, reported_once: Path) -> Path:
    return shutil.copytree(reported_once, tmp_path_factory.mktemp("hostile") / "study", symlinks=True)


@pytest.fixture
def planted(module_folder: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """A study in which one file holds a text: planted("federation", text); the one before is gone."""
    numbers = iter(range(1000))

    def plant(place: str, text: str) -> Path:
        folder = shutil.copytree(module_folder, tmp_path / f"study-{next(numbers)}", symlinks=True)
        PLANTS[place](folder, text)
        return folder

    return plant


def check(text: str, words: object) -> None:
    """No character that a terminal obeys, and no line that another party began."""
    for line in text.split("\n"):
        assert all(c.isprintable() for c in line), (words, line)
        assert not line.lstrip().startswith(FORGED), (words, line)


@pytest.mark.parametrize("place", COMMANDS)
def test_no_command_prints_it_as_more_than_a_line(
    place: str, planted: Callable[[str, str], Path], fedcollm: Fedcollm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100000")

    @some
    @given(TEXTS)
    def prints(text: str) -> None:
        folder = planted(place, text)
        monkeypatch.chdir(folder)
        said = ""
        for words in COMMANDS[place]:
            outcome = fedcollm(*words.split())
            assert "Traceback" not in outcome.err, words
            check(outcome.out + outcome.err, words)
            said += outcome.out + outcome.err
            if outcome.out and "--json" in words:
                json.loads(outcome.out)
        assert "=a" in said or place in QUIET, "no command told of it"

    prints()


# --- what is written


class Elements(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attributes)}


def elements(page: str) -> set[str]:
    parser = Elements()
    parser.feed(page)
    return parser.found


@pytest.mark.parametrize("place", ["results", "split", "log", "federation", "name"])
def test_a_page_has_no_element_of_theirs(place: str, planted: Callable[[str, str], Path], fedcollm: Fedcollm) -> None:
    pages = []
    for text in ("harmless", f"{HOSTILE}</td></title><script>x</script><i onclick=x>"):
        folder = planted(place, text)
        assert fedcollm("report", "-w", folder).code == 0
        report = folder / "results/report"
        pages.append((report / "index.html").read_text())
        for path in report.glob("*.csv"):
            for line in csv.reader(io.StringIO(path.read_text())):
                assert all(not cell.startswith("=") and cell.isprintable() for cell in line)
    assert elements(pages[1]) <= elements(pages[0])
    check(re.sub(r"base64,[^\"]*", "", pages[1]), "report")
    for data in re.findall(r"base64,([^\"]+)", pages[1]):
        check(base64.b64decode(data).decode(), "csv")


def test_a_chart_s_labels_are_texts(planted: Callable[[str, str], Path]) -> None:
    text = "</text><script>x</script>&\"'"
    rows = [{"x": text, "y": 1.0, "s": text}]
    spec = {
        "data": {"values": rows},
        "mark": "bar",
        "encoding": {
            "x": {"field": "x", "type": "nominal", "title": text},
            "y": {"field": "y", "type": "quantitative"},
            "color": {"field": "s", "type": "nominal"},
        },
    }
    assert not {"script", "i"} & elements(Chart("x", "x", "x", rows, spec).svg())


@given(st.text(max_size=30) | TEXTS)
def test_a_cell_is_no_formula_and_a_number_stays_one(text: str) -> None:
    cell = in_cell(text)
    assert cell.isprintable()
    assert cell.strip()[:1] not in tuple("=+@-＝＋＠－") or re.fullmatch(r"[+-]?([0-9.]+(e[+-]?[0-9]+)?)?", cell)
    assert in_cell(-0.5) == -0.5
    assert in_cell("-0.5") == "-0.5"


@given(st.text(max_size=30) | TEXTS)
def test_a_string_in_code_is_that_string(text: str) -> None:
    for read in (json.loads, yaml.safe_load):
        assert read(in_code(text)).isprintable()
    assert "\n" not in in_code(text)
    if text.isprintable():
        assert json.loads(in_code(text)) == yaml.safe_load(in_code(text)) == text


@some
@given(text=st.sampled_from(["null", "yes", "a: b", "🙂", "- x", "#", "gpt2", "org/gpt2"]) | TEXTS)
def test_a_card_says_of_them_what_they_are_and_nothing_else(text: str, finished_once: Path) -> None:
    workspace = Workspace(finished_once)
    adapter = read_artefact(workspace.slm(2))
    base = adapter.manifest.base.model_copy(update={"architecture": text})
    lora = adapter.manifest.lora.model_copy(update={"target_modules": [text]})
    manifest = adapter.manifest.model_copy(update={"base": base, "federation": text, "lora": lora})
    adapter = type(adapter)(adapter.path, manifest, adapter.signed, adapter.sha256, adapter.contents)
    plain = model_card(workspace, adapter, "slm", merged=False, base_model="org/model", revision="main")
    card = model_card(workspace, adapter, "slm", merged=False, base_model=text, revision=text)
    check(card, "card")
    assert len(card.split("\n")) == len(plain.split("\n"))
    _, front, body = card.split("---\n", 2)
    said = yaml.safe_load(front)
    assert isinstance(said["base_model"], str)
    assert said["base_model"] == text or not text.isprintable()
    without_code = re.sub(r"^```\w*\n.*?^```\n", "", body, flags=re.M | re.S)
    for mark in ("<b>", "</td>", "![x]", "$(id)", "<i>"):
        assert not re.search(rf"(?<!\\){re.escape(mark)}", without_code)
    code = re.findall(r"^```python\n(.*?)^```\n", body, flags=re.M | re.S)[0]
    compile(code, "card", "exec")
