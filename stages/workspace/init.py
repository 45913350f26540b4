"""init: a new workspace from the template that comes with the program.

Writes fedcollm.toml, machine.toml, README.md, run_rounds.sh, Snakefile, profiles/ and tasks/ into a new folder.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from stages.files import writing
from stages.paper.reported import PRESETS, Preset
from stages.runtime import quiet
from stages.runtime.errors import Refused, UsageProblem
from stages.workspace.agreement import Agreement
from stages.workspace.changing import changed, in_words
from stages.workspace.names import AGREEMENT, EXCHANGE, MACHINE, PRIVATE
from stages.workspace.paths import Workspace
from stages.workspace.settings import parse

DEMOS = ("demo", "demo-fedmkt")
"""Folders of workspace_template: whole workspaces on data that `fedcollm demo` makes."""
TEMPLATES = (*DEMOS, *PRESETS)
MKT = "mkt"
"""The folder with the agreement of clients that have models of their own."""
ELSEWHERE = (*(f"{name}/" for name in DEMOS), "slurm/", f"{MKT}/")
"""What of workspace_template is not in a workspace from the start."""
TASKS = ("arc_easy",)
"""The templates' task, but for the demo's."""
ANY = ("README.md", MACHINE, "run_rounds.sh", "Snakefile", "profiles/")
"""What every workspace has, a demo's too: settings of the machine, and what chains the commands."""


def init(
    folder: Path,
    *,
    template: str = "blank",
    tasks: Sequence[str] = (),
    seed: int = 1,
    clients: int = 4,
    rounds: int = 5,
    settings: Mapping[str, Any] | None = None,
) -> Workspace:
    """Make folder a workspace.

    tasks: lm-eval tasks to train and score on, instead of the template's. settings: by dotted key, over the template's.
    Raises UsageProblem for an unknown template, task or setting, Refused rather than replace a file or make a workspace
    inside another.
    """
    source = importlib.resources.files("workspace_template")
    _check(template, tasks)
    if (folder / AGREEMENT).exists():
        raise Refused("there is a workspace already", where=folder / AGREEMENT, mend="choose another folder")
    check_outside(folder)
    values = {"name": _name(folder), "seed": str(seed), "clients": str(clients), "rounds": str(rounds)}
    whole = contents_of(source, "")
    _check_known([name for name in tasks if f"tasks/{name}.yaml" not in whole])
    if template in DEMOS:
        contents = {name: whole[name] for name in whole if name.startswith(ANY)} | contents_of(source / template, "")
    else:
        preset = PRESETS[template]
        contents = {name: data for name, data in whole.items() if not name.startswith(ELSEWHERE)}
        values |= {"slm": preset.slm, "llm": preset.llm, "rank": str(preset.rank), "alpha": str(2 * preset.rank)}
        values |= {"target_modules": json.dumps(preset.target_modules), "tasks": json.dumps(list(tasks or TASKS))}
        if preset.own:
            contents[AGREEMENT] = whole[f"{MKT}/{AGREEMENT}"]
            values["own_models"] = _own_models(preset, clients)
    contents[AGREEMENT] = _agreement(_filled(contents[AGREEMENT].decode(), values), settings or {}, folder)
    for name, content in contents.items():
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            mend = "choose another folder, or move that file away"
            raise Refused(f"{name} is there already, and is not the template's", where=folder / name, mend=mend)
    for name in sorted(contents, key=lambda name: name == AGREEMENT):  # the file that makes it a workspace comes last
        writing.write(folder / name, contents[name])
        if name.endswith(".sh"):
            (folder / name).chmod(0o755)
    return Workspace(folder)


def _agreement(text: str, settings: Mapping[str, Any], folder: Path) -> bytes:
    """The agreement with these settings. Raises UsageProblem naming every mistake."""
    place, content = folder / AGREEMENT, changed(text, settings).encode() if settings else text.encode()
    try:
        parse(Agreement, content, place)
    except UsageProblem as problem:
        said = ", ".join(f"{key} = {in_words(value)}" for key, value in settings.items())
        problem.where = f"{place}, which would be made with {said}" if settings else place
        raise
    return content


def _check(template: str, tasks: Sequence[str]) -> None:
    if template not in TEMPLATES:
        raise UsageProblem(f"no template {template!r}", mend=f"there are: {', '.join(TEMPLATES)}")
    if tasks and template in DEMOS:
        mend = "leave --task out, or take another template"
        raise UsageProblem("the demo has tasks of its own", mend=mend)
    for name in tasks:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
            mend = "such as --task arc_easy: letters, digits and _ . + - ; several tasks are several --task"
            raise UsageProblem(f"{name!r} is not a task's name", mend=mend)


def check_outside(folder: Path, *, received: Path | None = None) -> None:
    """Raise Refused for a folder inside a workspace, where commands would take the one or the other for theirs.

    received: an agreement that may lie above, by itself: what somebody has sent is no workspace yet.
    """
    for above in folder.absolute().parents:
        is_alone = not any((above / name).exists() for name in (MACHINE, PRIVATE, EXCHANGE))
        if received and is_alone and above / AGREEMENT == received.absolute():
            continue
        if (above / AGREEMENT).is_file():
            message = f"{folder.name} would lie inside another workspace"
            mend = "choose a folder outside of it; other methods, seeds and settings of that study: run --method, sweep"
            raise Refused(message, where=above / AGREEMENT, mend=mend)


def _check_known(names: Sequence[str]) -> None:
    """Raise UsageProblem for a name that no task of lm-eval's has."""
    if not names:
        return
    from stages.workspace import shipped_tasks

    for name in names:
        with quiet.libraries():
            known = [] if shipped_tasks.manager_of(name) else shipped_tasks.names()
        if known:
            like = difflib.get_close_matches(name, known, n=3)
            mend = (f"one of {', '.join(like)}? " if like else "") + (
                f"for a task of your own: leave --task out, write tasks/{name}.yaml and name it in {AGREEMENT}"
            )
            raise UsageProblem(f"lm-eval has no task named {name!r}", mend=mend)


def _own_models(preset: Preset, clients: int) -> str:
    """The tables of those clients that there are."""
    return "\n".join(
        f"""[clients.{client}]
learning_rate = {f"{rate:.0e}".replace("e-0", "e-")}     # eta_theta: of both client-train and client-distill

[clients.{client}.slm]          # the same keys as [slm]
model = "{model}"

[clients.{client}.slm.lora]
r = {preset.rank}
alpha = {2 * preset.rank}
dropout = 0.05
"""
        for client, (model, rate) in enumerate(preset.own[:clients], 1)
    )


def _name(folder: Path) -> str:
    """The federation's name: the folder's, with what a name may not hold replaced."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in folder.absolute().name)
    return kept.lstrip("._-")[:64] or "study"


def _filled(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def contents_of(folder: Traversable, prefix: str) -> dict[str, bytes]:
    """Every file of the template, by its path in the workspace."""
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            found |= contents_of(entry, f"{prefix}{entry.name}/")
        elif entry.is_file() and entry.name != "__init__.py":
            found[prefix + entry.name] = entry.read_bytes()
    return found
