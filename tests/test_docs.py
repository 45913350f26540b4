"""The documentation is true: links, commands, options, settings and snippets, and the pages that are generated."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builders import ROOT, Outcome
from command_line import command_line
from generate_docs import keys, pages
from stages.workspace.agreement import Agreement, Client
from stages.workspace.machine import Machine

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "workspace_template" / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]

GENERATED = ["reference/commands.md", "reference/settings.md"]
NOT_RUN = {
    "README.md": "it trains base models from the hub",
    "docs/explanation/bad-updates.md": "it is one command in the middle of a round",
    "docs/explanation/what-distillation-bought.md": "it trains for an hour",
    "docs/how-to/between-organisations.md": "it is for several machines",
    "docs/how-to/big-models.md": "it is for a round in progress",
    "docs/how-to/compare-and-sweep.md": "it trains every method from many seeds",
    "docs/how-to/install.md": "it installs the program",
    "docs/how-to/hand-a-model-on.md": "it is for a finished round 5",
    "docs/how-to/shear.md": "it is for models of many layers",
    "docs/how-to/several-gpus.md": "it is for several GPUs",
    "docs/how-to/slurm.md": "it is for a cluster",
    "docs/how-to/snakemake.md": "it installs another program",
}
"""Pages whose snippets are only read: why. On the other pages each is run, or says itself why not."""
OF_OTHERS = {
    *("--cores", "--config", "--profile", "--dag", "--rulegraph", "--unlock", "--until"),  # snakemake's
    *("--apply_chat_template", "--num_fewshot", "--system_instruction"),  # lm_eval's
    *("--signals-to-handle", "--qos", "--constraint", "--gres", "--mem"),  # torchrun's and sbatch's
    *("--extra-index-url", "--pip-args", "--torch-backend", "--user", "--userns"),  # pip's, pipx's, uv's, docker's
}


class Fence(NamedTuple):
    """A block of code. mark: what the comment above it says."""

    kind: str
    text: str
    mark: str


FENCE = re.compile(r"(?:^<!-- (?P<mark>[^>\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


def fences(path: Path, *kinds: str) -> list[Fence]:
    found = [Fence(one["kind"], one["text"], one["mark"] or "") for one in FENCE.finditer(path.read_text())]
    return [fence for fence in found if not kinds or fence.kind in kinds]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


def inline_code(path: Path) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path))]


def unprompted(text: str) -> str:
    """Shell as a machine takes it: without the name of the machine in front."""
    return re.sub(r"^\w+\$ +", "", text, flags=re.M)


# --- what is generated, and what lists something


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_generated_page_is_current_whatever_the_terminal(
    name: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert (DOCS / name).read_text() == pages()[DOCS / name], "run `make docs`"


def test_every_exit_code_has_a_heading() -> None:
    from stages.audit import checks
    from stages.runtime import errors

    known = {0, 1, errors.NOTHING_LEFT_EXIT_CODE, errors.INTERRUPTED_EXIT_CODE, checks.WARNED}
    known |= {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    said = [int(heading.split(":")[0]) for heading in headings(DOCS / "reference/exit-codes.md")[1:]]
    assert said == sorted(known)


def test_every_check_of_the_audit_has_a_heading() -> None:
    from stages.audit.audit import CHECKS
    from stages.audit.checks import Check

    modules = [module for name, module in sys.modules.items() if name.startswith("stages.")]
    names = {one.id: one.name for module in modules for one in vars(module).values() if isinstance(one, Check)}
    assert headings(DOCS / "reference/audit-checks.md")[1:] == [f"{id}: {names[id]}" for id in CHECKS]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


# --- links


def headings(path: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(path), re.M)


def anchors(path: Path) -> Iterator[str]:
    """Of every heading, as GitHub makes them."""
    seen: dict[str, int] = {}
    for heading in headings(path):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        yield f"{slug}-{seen[slug]}" if slug in seen else slug
        seen[slug] = seen.get(slug, 0) + 1


def links(path: Path) -> list[str]:
    text = re.sub(r"`[^`]*`", "", prose(path))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    for link in links(ROOT / name):
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_found_from_the_first() -> None:
    assert {(DOCS / link).resolve() for link in links(DOCS / "README.md")} >= {*DOCS.rglob("*.md")} - {
        DOCS / "README.md"
    }


# --- commands, options and settings

COMMANDS: dict[str, Any] = command_line().commands
OPTIONS = {
    name: {word for one in command.params for word in one.opts + one.secondary_opts}
    for name, command in COMMANDS.items()
}
CALL = re.compile(r"(?<![\w./~-])fedcollm(?:_cli)? +(?=[\w-])([^\n#`|;&)]+)")


def calls(path: Path) -> Iterator[list[str]]:
    """The words after `fedcollm`, wherever code calls it; and after a command's name alone, in a sentence."""
    code = [unprompted(fence.text).replace("\\\n", " ") for fence in fences(path, "sh")] + inline_code(path)
    for text in code:
        yield from (found[1].split() for found in CALL.finditer(text))
    yield from (words for words in map(str.split, inline_code(path)) if words[0] in COMMANDS and len(words) > 1)


PLACE = re.compile(r"`((?:stages|fedcollm_cli|tests)/[\w/]+\.py)`")
NAMED_IN = re.compile(r"`([\w-]+)`(?: and `(\w+)`)?,? (?:in|of) `((?:stages|fedcollm_cli)/[\w/]+\.py)`")


def test_what_is_said_of_the_code_is_there() -> None:
    text = (DOCS / "architecture.md").read_text()
    places = PLACE.findall(text)
    assert len(places) > 15
    assert [place for place in places if not (ROOT / place).is_file()] == []
    named = [(name, place) for *names, place in NAMED_IN.findall(text) for name in names if name]
    assert len(named) > 10
    assert [(name, place) for name, place in named if name not in (ROOT / place).read_text()] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_exists(name: str) -> None:
    for command, *words in calls(ROOT / name):
        if command == "COMMAND":
            continue
        assert command in COMMANDS, (command, words)
        named = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert named <= OPTIONS[command] | {"--help"}, (command, words)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_in_a_sentence_is_some_commands(name: str) -> None:
    known = set.union(*OPTIONS.values(), OF_OTHERS, {"--help"})
    said = {re.split("[= ]", code)[0] for code in inline_code(ROOT / name) if code.startswith("--")}
    assert said <= known


KEYS = {*keys(Agreement), *keys(Machine)}


def named(table: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Every key of a table that is not itself one."""
    for name, value in table.items():
        yield from ((name, *key) for key in named(value)) if isinstance(value, dict) else [(name,)]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_exists(name: str) -> None:
    tables = "|".join(sorted({key[0] for key in KEYS if len(key) > 1}))
    for code in inline_code(ROOT / name):
        found = re.match(rf"((?:{tables})(?:\.[a-z_]+)+)(?: = .*)?$", code)
        assert not found or code.endswith((".toml", ".json")) or tuple(found[1].split(".")) in KEYS, code
    for fence in fences(ROOT / name, "toml"):
        for table, inner in tomllib.loads(fence.text).items():
            if ("evaluation", table) in KEYS:  # of evaluation.toml
                assert not isinstance(inner, dict), fence.text
            elif table == "clients":  # whose keys are numbers
                assert all(one.keys() <= Client.model_fields.keys() for one in inner.values()), fence.text
            else:
                assert {(table, *key) for key in named(inner)} <= KEYS, fence.text


# --- snippets


def test_a_study_that_is_named_has_the_parts_that_are_named() -> None:
    page = DOCS / "explanation/really-pre-trained-models.md"
    called = re.findall(r"^python (tests/studies/\S+\.py) \S+ \S+ \S+ \S+ (.+)$", page.read_text(), re.M)
    assert called
    for script, parts in called:
        help = subprocess.run([sys.executable, ROOT / script, "--help"], check=True, capture_output=True, text=True)
        assert set(parts.split()) <= set(re.findall(r"^  ([\w-]+): ", help.stdout, re.M))


@pytest.mark.parametrize("name", NAMES)
def test_every_snippet_is_well_formed(name: str) -> None:
    for kind, text, _ in fences(ROOT / name):
        match kind:
            case "sh":
                done = subprocess.run(["bash", "-n"], input=unprompted(text), capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            case "json":
                assert all(json.loads(line) for line in text.splitlines())
            case "python":
                compile(text, name, "exec")
            case _:
                assert kind in ("", "text", "toml", "yaml"), kind


PLACES = {
    "a finished workspace": ["finished_once"],
    "a finished workspace of FedMKT": ["unlike_once"],
    "any finished workspace": ["finished_once", "unlike_once"],
    "an empty folder": ["tmp_path"],
}
"""What a mark says, and the fixtures in each of which the snippet runs."""
MARK = re.compile(rf"not run: \w.+|runs in: (?P<place>{'|'.join(PLACES)})|run by: (?P<test>tests/[\w/]+\.py)")


def snippets() -> Iterator[Any]:
    """Every snippet that is marked as one that runs: where it stands, its text and its place."""
    for name in NAMES:
        for number, (_, text, mark) in enumerate(fences(ROOT / name, "sh"), 1):
            if (found := MARK.fullmatch(mark)) and found["place"]:
                for place in PLACES[found["place"]]:
                    yield pytest.param(f"{name}, {number}", text, place, id=f"{name}, {number}, {place}")


@pytest.mark.parametrize("name", NAMES)
def test_a_snippet_is_run_or_says_why_not(name: str) -> None:
    marks = [mark for _, _, mark in fences(ROOT / name, "sh")]
    if name in NOT_RUN:
        assert "" in marks, "nothing is left there that is not run"
    elif name != "docs/tutorial.md":  # which is run whole
        assert all(MARK.fullmatch(mark) for mark in marks), marks
    tests = [found["test"] for mark in marks if (found := MARK.fullmatch(mark)) and found["test"]]
    assert all(Path(name).name in (ROOT / test).read_text() for test in tests)


@pytest.mark.parametrize(("where", "text", "place"), snippets())
def test_a_snippet_runs(where: str, text: str, place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(place)
    program = tmp_path / "bin" / "fedcollm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fedcollm_cli "$@"\n')
    program.chmod(0o755)
    path = f"export PATH={shlex.quote(f'{program.parent}:{Path(sys.executable).parent}')}:$PATH\n"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", path + text], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = said_in_public(where, folder) if place == "unlike_once" else said(where, folder)
    assert all(words in done.stdout for words in expected), done.stdout


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def said(where: str, folder: Path) -> list[str]:
    """What a snippet prints, in part."""
    if where.startswith("docs/how-to/plan-and-prefetch.md"):
        return ["s1-arc_easy"]
    broadcast = folder / "exchange/round-0001/broadcast/manifest.json"
    return {
        "docs/how-to/audit.md, 1": ["result: clean (exit 0)", "tensors: 2 differ, 0 identical"],
        "docs/how-to/audit.md, 3": ["adapter_config.json: OK", "adapter_model.safetensors: OK"],
        "docs/how-to/audit.md, 4": [f"{digest(broadcast)}  exchange", f'"broadcast": "{digest(broadcast)}"'],
        "docs/how-to/audit.md, 6": ["metadata {'format': 'pt'}", "lora_A.weight F32 [4, 16] largest 0."],
        "docs/how-to/audit.md, 7": ["nothing does"],
        "docs/how-to/audit.md, 8": [json.loads(broadcast.read_text())["base"]["weights_sha256"]],
    }[where]


def said_in_public(where: str, folder: Path) -> list[str]:
    """The same in a workspace of FedMKT."""
    exchange, own = folder / "exchange/round-0001", folder / "private/client-2"
    trained, reads = own / "round-0001/trained/manifest.json", exchange / "vocabulary-client-2/manifest.json"
    rows, tokens = digest(own / "public.jsonl"), digest(exchange / "vocabulary-client-2/vocabulary.safetensors")
    return {
        "docs/how-to/audit.md, 2": ["of 12 rows that both tell", "400 tokens in A, 500 in B\n"],
        "docs/how-to/audit.md, 3": ["knowledge.safetensors: OK"],
        "docs/how-to/audit.md, 5": [
            *(f'"agreement_sha256": "{digest(folder / "fedcollm.toml")}"', f'"trained": "{digest(trained)}"'),
            *(f'"vocabulary-client-2": "{digest(reads)}"', f"{digest(trained)}  private", f"{digest(reads)}  exchange"),
            *(
                f'data_sha256\\": \\"{rows}',
                f'vocabulary_sha256\\": \\"{tokens}',
                f"{rows}  private",
                f"{tokens}  exch",
            ),
        ],
        "docs/how-to/audit.md, 6": ["metadata {'knowledge': ", "losses F64 [12] largest "],
        "docs/how-to/audit.md, 7": ["nothing does"],
    }[where]


def test_numbers_by_hand_are_those_of_the_tensors_in_any_file_that_travels(
    finished_once: Path, unlike_once: Path, tmp_path: Path
) -> None:
    """The script of audit.md against NumPy; secure mode's files are of whole numbers, as those written here."""
    [script] = [fence.text for fence in fences(DOCS / "how-to/audit.md", "sh") if "data_offsets" in fence.text]
    drawn = np.random.default_rng(1)
    losses = np.array([2.5, np.nan, -7.25, np.nan])
    masked = drawn.integers(0, 2**32, 9, dtype=np.uint32)
    whole = {"y": masked, "s": drawn.integers(0, 256, (2, 5), dtype=np.uint8), "none": np.full(2, np.nan), "l": losses}
    save_file(whole, tmp_path / "whole.safetensors")
    told = unlike_once / "exchange/round-0001"
    files = [tmp_path / "whole.safetensors", finished_once / "exchange/round-0001/client-2/adapter_model.safetensors"]
    files += [*told.glob("*/*.safetensors")]
    assert len(files) == 2 + 4 * 3  # of each party vocabulary, cuts and knowledge
    for path in files:
        text = script.replace("exchange/round-0001/client-2/*.safetensors", shlex.quote(str(path)))
        assert text != script
        line = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n{text}"
        done = subprocess.run(["bash", "-euc", line], check=True, capture_output=True, text=True).stdout
        printed = re.findall(r"^(\S+) \S+ \[[\d, ]*\] largest (\S+) norm (\S+) NaN (\d+)$", done, re.M)
        tensors = load_file(path)
        assert sorted(name for name, *_ in printed) == sorted(tensors)
        for name, *numbers in printed:
            values = tensors[name].astype(np.float64).ravel()
            sound = values[~np.isnan(values)]
            expected = [np.abs(sound).max(initial=0.0), np.linalg.norm(sound), len(values) - len(sound)]
            assert [float(number) for number in numbers] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_the_tutorial_goes_from_nothing_to_a_report(
    fedcollm: Callable[..., Outcome], base_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line as it stands there, but that the base models are tiny ones in local folders."""
    monkeypatch.chdir(tmp_path)
    given = []
    for kind, text, mark in fences(DOCS / "tutorial.md"):
        if name := re.match(r"# (\S+\.(?:py|yaml))\n", text):
            Path(name[1]).write_text(text)
        for line in text.splitlines() if kind == "sh" and not mark else ():
            words = shlex.split(line, comments=True)
            given.append(words[1:2])
            if words[0] == "fedcollm":
                outcome = fedcollm(*words[1:])
                assert outcome.code == 0, (line, outcome.err)
            elif words[0] == "cd":
                monkeypatch.chdir(words[1])
                machine = Path("machine.toml").read_text()
                for role in ("slm", "llm"):
                    machine = re.sub(rf"# {role} = .*", f'{role} = "{base_models / role}"', machine)
                Path("machine.toml").write_text(machine)
            else:
                python = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
                subprocess.run(["bash", "-ec", python + line], check=True, capture_output=True)
    assert ["compare"] in given
    assert Path("results/report/index.html").exists()
    assert Path("exports/slm-round-0002/adapter_model.safetensors").exists()
