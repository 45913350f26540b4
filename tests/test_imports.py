"""The import rules: parts stand on earlier parts, stages on parts; what loads no model imports no torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stages.parts
from builders import AGREEMENT, ROOT

HEAVY = {"torch", "transformers", "peft", "datasets", "lm_eval", "accelerate"}
DRAWING = {"vl_convert", "jinja2"}
PARTS = sorted(path.stem for path in (ROOT / "stages" / "parts").glob("*.py") if path.stem != "__init__")
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py") if path.stem != "__init__")
CHAINS = {"run", "next", "demo", "compare", "sweep", "report"}


def floors() -> dict[str, list[str]]:
    """The parts in the order of the docstring of stages.parts, by floor."""
    text = re.sub(r",\n +", ", ", stages.parts.__doc__ or "")
    found = re.findall(r"(plain|with NumPy|the report's|with torch|with lm-eval|the demo's): ([\w, ]+)", text)
    return {floor: names.split(", ") for floor, names in found}


ORDER = [name for names in floors().values() for name in names]


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, dotted; `from package import name` counts as both."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {path}"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[2] for name in imported(path) if name.startswith("stages.parts.")} & set(PARTS)


def stages_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("stages.")} & set(STAGES)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def loaded_after(code: str) -> set[str]:
    """The packages that a fresh Python holds after running code."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_docstring_names_every_part_once() -> None:
    assert sorted(ORDER) == PARTS


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_parts_that_stand_before_it(part: str) -> None:
    before = set(ORDER[: ORDER.index(part)])
    assert parts_imported(ROOT / "stages" / "parts" / f"{part}.py") <= before


@pytest.mark.parametrize("part", PARTS)
def test_a_part_never_imports_a_stage(part: str) -> None:
    assert stages_imported(ROOT / "stages" / "parts" / f"{part}.py") == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_never_imports_a_stage_but_those_that_chain_them(stage: str) -> None:
    found = stages_imported(ROOT / "stages" / f"{stage}.py")
    assert found == set() or stage in CHAINS
    assert "demo" not in found


def test_nothing_under_stages_knows_of_the_command_line() -> None:
    for path in (ROOT / "stages").rglob("*.py"):
        assert not packages(path) & {"typer", "rich", "click", "fedcollm_cli", "argparse"}, path


def test_the_command_line_knows_of_no_library_that_stages_stand_on() -> None:
    for path in (ROOT / "fedcollm_cli").rglob("*.py"):
        assert not packages(path) & (HEAVY | {"numpy", "safetensors"}), path


@pytest.mark.parametrize(
    ("floor", "forbidden"),
    [("plain", HEAVY | {"numpy", "safetensors"}), ("with NumPy", HEAVY), ("the report's", HEAVY | DRAWING)],
    ids=["plain", "NumPy", "report"],
)
def test_the_lower_floors_load_nothing_heavy(floor: str, forbidden: set[str]) -> None:
    code = "\n".join(f"import stages.parts.{name}" for name in floors()[floor])
    assert not loaded_after(code) & forbidden


def test_importing_every_stage_loads_nothing_heavy() -> None:
    assert not loaded_after("\n".join(f"import stages.{name}" for name in STAGES)) & HEAVY


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    found = loaded_after("import fedcollm_cli.main")
    assert "typer" in found
    assert not found & (HEAVY | {"numpy", "safetensors"})


@pytest.mark.parametrize(
    "words", [["--help"], ["client-train", "--help"], ["--version"], ["status"], ["status", "--json"]]
)
def test_a_command_that_loads_no_model_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "fedcollm.toml").write_text(AGREEMENT)
    words = [*words, "--workspace", str(tmp_path)] if words[0] == "status" else words
    assert not loaded_by(words) & (HEAVY | {"numpy", "safetensors"})


def loaded_by(words: list[str]) -> set[str]:
    """The packages that a fresh Python holds after a command that ends well."""
    call = f"try:\n    app({words!r})\nexcept SystemExit as stop:\n    assert not stop.code"
    return loaded_after(f"from fedcollm_cli.main import app\n{call}")


def test_auditors_need_numpy_and_no_torch(finished_once: Path) -> None:
    adapters = [str(finished_once / "exchange" / f"round-000{round}" / "broadcast") for round in (1, 2)]
    for words in (["audit", "--json", "-w", str(finished_once)], ["diff", *adapters, "--json"]):
        found = loaded_by(words)
        assert "numpy" in found
        assert not found & (HEAVY | DRAWING)
