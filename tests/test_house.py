"""The house: rooms in their order, steps above them, what each may load; modules and functions of a readable size."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from builders import AGREEMENT, ROOT
from stages.broadcast import broadcast
from stages.workspace import names
from stages.workspace.paths import Workspace

STAGES = ROOT / "stages"
GROUND = ("runtime", "paper", "files", "workspace", "parties", "bases", "data", "artefacts", "accounting")
ABOVE = (
    "exchange",
    "progress",
    "models",
    "secagg",
    "encryption",
    "study",
    "training",
    "evaluation",
    "aggregation",
    "distillation",
    "privacy",
    "export",
    "shearing",
)
STEPS = (
    "align",
    "align_party",
    "broadcast",
    "client_train",
    "share_knowledge",
    "reveal",
    "aggregate",
    "co_distill",
    "client_distill",
    "evaluate",
    "evaluate_rows",
)
TOP = ("planning", "audit", "report", "federation", "demo")
ORDER = (*GROUND, *ABOVE, *STEPS, *TOP)
"""Rooms and steps from the ground up: each imports only those before it."""

DRIVERS = ("federation", "demo")
"""The rooms that call steps; all others meet them on disk only."""

HEAVY = {"torch", "transformers", "peft", "datasets", "lm_eval", "accelerate"}
DRAWING = {"vl_convert", "jinja2"}
LIGHT = ("runtime", "paper", "files", "workspace", "parties", "bases", "accounting", "progress")
"""Rooms that load neither torch nor NumPy; parties loads cryptography."""

WITH_LIBRARIES = ("gate", "tasks", "noise")
"""Modules in light rooms that load a model, lm-eval or NumPy: they are imported where they are used."""

MOST_LINES, MOST_LINES_OF_FUNCTION = 300, 60
LONGEST_STEPS = {
    "align": 120,
    "align_party": 160,
    "client_train": 160,
    "co_distill": 110,
    "share_knowledge": 200,
    "client_distill": 170,
    "aggregate": 200,
    "broadcast": 200,
    "evaluate": 200,
    "evaluate_rows": 200,
    "reveal": 60,
}
"""Lines of each step: it reads like the algorithm, and all that is woven around it has a place of its own."""

WOVEN = {"is_secure", "is_hidden", "is_on", "is_first", "agree"}
"""Names of what stands around a step: the channel, the learner, the processes. A step never asks which it is."""

DOORS = {
    "secagg": ({"channel", "openings", "accepting"}, {"reveal", "audit"}),
    "encryption": ({"channel"}, {"reveal", "audit"}),
    "privacy": ({"local_training"}, {"audit"}),
}
"""By which modules a room is entered from outside, and who may enter by any."""

MODULES = sorted(STAGES.rglob("*.py"))
NAMES = {path: path.relative_to(ROOT).as_posix() for path in [*MODULES, *(ROOT / "fedcollm_cli").rglob("*.py")]}


def room_of(path: Path) -> str:
    """The room that a module stands in; a step is a room of its own."""
    return path.relative_to(STAGES).parts[0].removesuffix(".py")


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a module, as ast.walk gives them; read once."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, dotted; `from package import name` counts as both."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {path}"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("stages.")} & set(ORDER)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def loaded_after(code: str) -> set[str]:
    """The packages that a fresh Python holds after running code."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of(*rooms: str) -> list[str]:
    """Every module of these rooms, dotted."""
    paths = [path for path in MODULES if room_of(path) in rooms and path.stem not in ("__init__", *WITH_LIBRARIES)]
    return [dotted(path) for path in paths]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def loaded_by_importing(names: list[str]) -> set[str]:
    return loaded_after("\n".join(f"import {name}" for name in names))


# --- order


def test_every_room_and_every_step_stands_in_the_order() -> None:
    assert sorted({room_of(path) for path in MODULES if path.parent != STAGES or path.stem in STEPS}) == sorted(ORDER)
    assert {path.stem for path in STAGES.glob("*.py")} == {*STEPS, "__init__"}


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    before = {*ORDER[: ORDER.index(room)], room}
    for path in MODULES:
        if path.parent != STAGES or path.stem in STEPS:
            assert room_of(path) != room or rooms_imported(path) <= before, path


@pytest.mark.parametrize("room", ORDER)
def test_steps_meet_on_disk_only_and_none_but_their_drivers_call_them(room: str) -> None:
    allowed = set(STEPS) if room in DRIVERS else {room}
    for path in MODULES:
        if room_of(path) == room:
            assert rooms_imported(path) & set(STEPS) <= allowed, path
            assert room == "demo" or "demo" not in rooms_imported(path), path


def test_a_room_s_own_file_is_a_docstring() -> None:
    for path in STAGES.glob("*/__init__.py"):
        (only,) = ast.parse(path.read_text()).body
        assert isinstance(only, ast.Expr), path


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_plain(step: str) -> None:
    path = STAGES / f"{step}.py"
    assert len(path.read_text().splitlines()) <= LONGEST_STEPS[step]
    nodes = nodes_of(path)
    assert not any(isinstance(node, ast.Nonlocal) for node in nodes)
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)}
    assert step == "reveal" or not names & WOVEN


@pytest.mark.parametrize("room", DOORS)
def test_a_room_is_entered_by_its_doors(room: str) -> None:
    doors, insiders = DOORS[room]
    for path in MODULES:
        if room_of(path) not in {room, *insiders}:
            entered = {name.split(".")[2] for name in imported(path) if name.startswith(f"stages.{room}.")}
            assert {name for name in entered if (STAGES / room / f"{name}.py").exists()} <= doors, path


def test_nothing_under_stages_knows_of_the_command_line() -> None:
    for path in MODULES:
        assert not packages(path) & {"typer", "rich", "click", "fedcollm_cli", "argparse"}, path


def test_the_command_line_knows_of_no_library_that_stages_stand_on() -> None:
    for path in (ROOT / "fedcollm_cli").rglob("*.py"):
        assert not packages(path) & (HEAVY | {"numpy", "safetensors"}), path


# --- what stages hand to views

UNTYPED = "dict[str, Any]"


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef)]


def test_no_function_of_a_stage_that_the_command_line_calls_returns_an_untyped_dict() -> None:
    called = {name for path in (ROOT / "fedcollm_cli").rglob("*.py") for name in imported(path)}
    returned = {
        f"{dotted(path)}.{function.name}": ast.unparse(function.returns)
        for path in MODULES
        for function in functions(path)
        if f"{dotted(path)}.{function.name}" in called and function.returns
    }
    assert len(returned) >= 30
    assert [name for name, type_ in returned.items() if UNTYPED in type_] == []


def test_the_options_that_open_a_session_are_spelled_once() -> None:
    spelled = {
        function.name
        for path in (ROOT / "fedcollm_cli" / "commands").glob("*.py")
        for function in functions(path)
        if "WorkspaceOption" in ast.unparse(function.args)
    }
    assert spelled == {"audit", "comm_cost"}, "which can do without a workspace; for others there is in_workspace"


def test_no_view_takes_or_returns_an_untyped_dict() -> None:
    for path in (ROOT / "fedcollm_cli" / "views").glob("*.py"):
        for function in functions(path):
            assert UNTYPED not in f"{ast.unparse(function.args)} {ast.unparse(function.returns)}", function.name


# --- size


@pytest.mark.parametrize("path", NAMES, ids=NAMES.values())
def test_no_module_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_no_function_is_too_long_to_read() -> None:
    """Commands are exempt: theirs is a list of options."""
    long = {
        f"{name}: {node.name}"
        for path, name in NAMES.items()
        for node in nodes_of(path)
        if isinstance(node, ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_FUNCTION
        and not name.startswith("fedcollm_cli/commands/")
    }
    assert long == set()


# --- one speller each

BY_HAND = {"fedcollm_cli/main.py"}
"""Its help names commands in prose."""


def texts(path: Path) -> list[str]:
    """Every string of a module that is no docstring; of f-strings the pieces."""
    nodes = nodes_of(path)
    alone = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in alone
    ]


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    """Every call of a function, or of a method, of this name."""
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == name:
            yield node


def options_of(program: Any, verbs: Iterable[str]) -> dict[str, bool]:
    """By name in Python, every option of these commands, and whether it is a flag."""
    found = [one for verb in verbs for one in program.commands[verb].params if one.param_type_name == "option"]
    return {flag.removeprefix("--").replace("-", "_"): one.is_flag for one in found for flag in one.opts}


@pytest.fixture(scope="module")
def program() -> Any:
    from fedcollm_cli.main import app

    return typer.main.get_command(app)


def test_command_lines_are_values_and_spelled_in_one_place(program: Any) -> None:
    line = re.compile(rf"\bfedcollm ({'|'.join(program.commands)})\b|\bfedcollm $")
    for path, name in NAMES.items():
        if name not in BY_HAND:
            assert [text for text in texts(path) if line.search(text)] == [], name


def test_every_command_that_is_shown_is_one_that_the_program_takes(program: Any) -> None:
    shown = [(name, call) for path, name in NAMES.items() for call in calls(path, "Command")]
    assert len(shown) > 50
    for name, call in shown:
        said = ast.unparse(call)
        verb, *arguments = call.args
        verbs = [one.value for one in ast.walk(verb) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        assert set(verbs) <= set(program.commands), f"{name}: {said}"
        options = options_of(program, verbs or program.commands)
        for given in call.keywords:
            assert given.arg is None or given.arg in options, f"{name}: {said}"
            if given.arg and isinstance(given.value, ast.Constant) and given.value.value is not ...:
                assert options[given.arg] == (given.value.value is True), f"{name}: {said}"
        takes = sum(one.param_type_name == "argument" for verb in verbs for one in program.commands[verb].params)
        left_open = any(isinstance(one, ast.Constant) and one.value is ... for one in arguments)
        assert left_open or len(arguments) <= takes or not verbs, f"{name}: {said}"


def test_what_is_added_to_a_command_is_an_option_of_one(program: Any) -> None:
    options = options_of(program, program.commands)
    for path, name in NAMES.items():
        for call in calls(path, "also"):
            assert {given.arg for given in call.keywords if given.arg} <= set(options), f"{name}: {ast.unparse(call)}"


OF_ITS_OWN = {"stages/federation/slurm.py"}
"""Its templates lie in a folder that is called as the workspace's."""


def joined(path: Path) -> set[str]:
    """The words in paths that a module builds: folder / "name", folder.glob("name-*"), path.with_name("name")."""
    nodes = nodes_of(path)
    parts = [node.right for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
    for name in ("glob", "rglob", "with_name", "joinpath"):
        parts += [given for call in calls(path, name) for given in call.args]
    found = [one.value for part in parts for one in ast.walk(part) if isinstance(one, ast.Constant)]
    words = {word.strip("*") for one in found if isinstance(one, str) for word in one.split("/")}
    return {word for word in words if re.match("[a-z]", word)}


def test_names_on_disk_are_spelled_by_the_workspace_alone() -> None:
    files = {value for value in vars(names).values() if isinstance(value, str) and re.fullmatch(r"[\w.-]+\.\w+", value)}
    assert {"fedcollm.toml", "manifest.json"} <= files
    places = set.union(
        *(joined(STAGES / "workspace" / f"{name}.py") for name in ("layout", "derived_layout", "rows_layout"))
    )
    assert {"keys", "seed-", "broadcast", "train.jsonl"} <= places
    for path in MODULES:
        if room_of(path) != "workspace" and path != STAGES / "files" / "seclusion.py":
            assert not files & set(texts(path)), NAMES[path]
            assert NAMES[path] in OF_ITS_OWN or not joined(path) & (places | {"round-"}), NAMES[path]


# --- parties

OPENING = {"Party", "Party.client", "Party.server", "Party.of", "Onlooker", "all_of"}
OVER_ALL = ("parties", "audit", "progress")
"""Rooms that look at every party of a machine."""

WHO_LOOK = {
    "stages/aggregation/drift.py",
    "stages/artefacts/subjects.py",
    "stages/exchange/parcel_checks.py",
}
"""Modules that take no part in a round, and look for the roster in exchange/ themselves."""


def called(node: ast.AST) -> list[str]:
    """What is called, as it is written."""
    return [ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)]


@pytest.mark.parametrize("path", MODULES, ids=[NAMES[path] for path in MODULES])
def test_a_step_opens_its_party_once_and_hands_it_on(path: Path) -> None:
    found = called(ast.parse(path.read_text()))
    opened = [name for name in found if name in OPENING]
    room = room_of(path)
    assert room == "parties" or not any("Vault" in name.split(".") for name in found)
    if room in STEPS:
        assert len(opened) <= 1
    elif room not in OVER_ALL:
        assert opened == (["Onlooker"] if NAMES[path] in WHO_LOOK else [])


@pytest.mark.parametrize("path", NAMES, ids=NAMES.values())
def test_the_name_of_a_party_is_taken_apart_in_one_place(path: Path) -> None:
    cuts = {("partition", "-"), ("rpartition", "-"), ("split", "-"), ("replace", "-", " "), ("removeprefix", "client-")}
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            cut = (node.func.attr, *(one.value for one in node.args if isinstance(one, ast.Constant)))
            assert cut not in cuts or NAMES[path] in ("stages/parties/names.py", "stages/artefacts/checkpoints.py")


@pytest.mark.parametrize("path", MODULES, ids=[NAMES[path] for path in MODULES])
def test_what_is_received_is_asked_for_in_one_call(path: Path) -> None:
    """Whether a folder is there, what it holds and whose it is: received, with what to say where it is missing."""
    for function in nodes_of(path):
        if isinstance(function, ast.FunctionDef):
            asked: dict[str, set[str]] = {"require": set(), "received": set()}
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in asked:
                    asked[ast.unparse(node.func)].add(ast.unparse(node.args[0]))
            assert not asked["require"] & asked["received"], function.name


# --- what is loaded


@pytest.mark.parametrize(
    ("rooms", "forbidden"),
    [
        (LIGHT, HEAVY | {"numpy", "safetensors"}),
        (("data", "artefacts", "exchange", "secagg", "study", "aggregation", "audit"), HEAVY),
        (("report",), HEAVY | DRAWING),
    ],
    ids=["nothing", "NumPy", "the report"],
)
def test_the_lower_floors_load_nothing_heavy(rooms: tuple[str, ...], forbidden: set[str]) -> None:
    assert not loaded_by_importing(modules_of(*rooms)) & forbidden


def test_importing_every_step_and_its_drivers_loads_nothing_heavy() -> None:
    assert not loaded_by_importing([f"stages.{step}" for step in STEPS] + modules_of("federation")) & HEAVY


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


def test_training_imports_no_library_that_it_does_not_use(workspace_folder: Path) -> None:
    broadcast(Workspace(workspace_folder), round=1)
    found = loaded_by(["client-train", "--round", "1", "--client", "1", "-w", str(workspace_folder)])
    assert {"torch", "transformers", "peft", "accelerate"} <= found
    assert not found & {"bitsandbytes", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "lm_eval"}


def test_averaging_and_packing_need_no_torch(answered: Path) -> None:
    for words in (["aggregate", "--round", "1"], ["pack", "--server", "--round", "1", "--output", f"{answered}/b"]):
        assert not loaded_by([*words, "-w", str(answered)]) & HEAVY


def test_auditors_need_numpy_and_no_torch(finished_once: Path, unlike_once: Path) -> None:
    adapters = [str(finished_once / "exchange" / f"round-000{round}" / "broadcast") for round in (1, 2)]
    audits = [["audit", "--json", "-w", str(folder)] for folder in (finished_once, unlike_once)]
    for words in (*audits, ["diff", *adapters, "--json"]):
        found = loaded_by(words)
        assert "numpy" in found
        assert not found & (HEAVY | DRAWING)
