"""init: a new workspace from the template that comes with the program.

Writes fedcollm.toml, machine.toml, README.md, run_rounds.sh, Snakefile, profiles/ and tasks/ into a new folder.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

from stages.parts import files
from stages.parts.config import Agreement, parse
from stages.parts.errors import Refused, UsageProblem
from stages.parts.paper import PRESETS
from stages.parts.workspace import AGREEMENT, Workspace

TEMPLATES = ("demo", *PRESETS)
ELSEWHERE = ("demo/", "slurm/")
"""What of workspace_template is not in a workspace from the start."""
TASKS = ("arc_easy",)
"""The templates' task, but for the demo's."""
CHAINS = ("run_rounds.sh", "Snakefile", "profiles/")
"""What chains the commands."""


def init(
    folder: Path,
    *,
    template: str = "blank",
    tasks: Sequence[str] = (),
    seed: int = 1,
    clients: int = 4,
    rounds: int = 5,
) -> Workspace:
    """Make folder a workspace.

    tasks: lm-eval tasks to train and score on, instead of the template's; their names are looked up by `prepare`.
    Raises UsageProblem for an unknown template or what is no name, Refused rather than replace a file.
    """
    _check(template, tasks)
    if (folder / AGREEMENT).exists():
        raise Refused("there is a workspace already", where=folder / AGREEMENT, mend="choose another folder")
    source = importlib.resources.files("workspace_template")
    values = {"name": _name(folder), "seed": str(seed), "clients": str(clients), "rounds": str(rounds)}
    whole = _contents(source, "")
    if template == "demo":
        chains = {name: whole[name] for name in whole if name.startswith(CHAINS)}
        contents = _contents(source / "demo", "") | chains
    else:
        preset = PRESETS[template]
        contents = {name: data for name, data in whole.items() if not name.startswith(ELSEWHERE)}
        values |= {"slm": preset.slm, "llm": preset.llm, "rank": str(preset.rank), "alpha": str(2 * preset.rank)}
        values |= {"target_modules": json.dumps(preset.target_modules), "tasks": json.dumps(list(tasks or TASKS))}
    contents[AGREEMENT] = _filled(contents[AGREEMENT].decode(), values).encode()
    parse(Agreement, contents[AGREEMENT], folder / AGREEMENT)
    for name, content in contents.items():
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            mend = "choose another folder, or move that file away"
            raise Refused(f"{name} is there already, and is not the template's", where=folder / name, mend=mend)
    for name in sorted(contents, key=lambda name: name == AGREEMENT):  # the file that makes it a workspace comes last
        files.write(folder / name, contents[name])
        if name.endswith(".sh"):
            (folder / name).chmod(0o755)
    return Workspace(folder)


def _check(template: str, tasks: Sequence[str]) -> None:
    if template not in TEMPLATES:
        raise UsageProblem(f"no template {template!r}", mend=f"there are: {', '.join(TEMPLATES)}")
    if tasks and template == "demo":
        mend = "leave --task out, or take another template"
        raise UsageProblem("the demo has tasks of its own", mend=mend)
    for name in tasks:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
            mend = "such as --task arc_easy: letters, digits and _ . + - ; several tasks are several --task"
            raise UsageProblem(f"{name!r} is not a task's name", mend=mend)


def _name(folder: Path) -> str:
    """The federation's name: the folder's, with what a name may not hold replaced."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in folder.absolute().name)
    return kept.lstrip("._-")[:64] or "study"


def _filled(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def _contents(folder: Traversable, prefix: str) -> dict[str, bytes]:
    """Every file of the template, by its path in the workspace."""
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            found |= _contents(entry, f"{prefix}{entry.name}/")
        elif entry.is_file() and entry.name != "__init__.py":
            found[prefix + entry.name] = entry.read_bytes()
    return found
