"""lm-eval's own tasks, groups and tags by name, without its index of them all.

lm-eval parses its 14,000 task files, and what each includes, before it knows one name: that takes a quarter of a minute
and more. Here all files are searched as text, and only those are parsed that have a name in them, or include one that
has. What is found is what lm-eval's own index says of that name, and of all that it stands for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime import quiet
from stages.workspace import task_files
from stages.workspace.task_files import IGNORED

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

INCLUDES = re.compile(rb"^include[ \t]*:(.*(?:\n[ \t]*-.*)*)", re.MULTILINE)
"""The files that a task file takes in: one after the key, or a list."""

MOST_NAMES = 300
"""A name that stands for more is looked up in lm-eval's own index: by then that is quicker."""


def manager_of(name: str) -> TaskManager | None:
    """A manager that knows one of lm-eval's tasks, groups or tags, and all that it stands for; None if there is none.

    A new one each time: loading tasks writes into a manager's index.
    """
    from lm_eval.tasks import TaskManager

    found = _entries(name)
    if name not in found:
        return None
    manager = TaskManager(include_defaults=False)
    manager.task_index.update(found)
    return manager


def missing(tasks: Path, names: Iterable[str]) -> list[str]:
    """Which of these tasks neither a file of this folder nor lm-eval defines."""
    elsewhere = task_files.undefined(tasks, names)
    if not elsewhere:
        return []
    with quiet.libraries():
        return [name for name in elsewhere if manager_of(name) is None]


def names() -> list[str]:
    """All names, by lm-eval's own index, which takes long: to tell of similar ones."""
    from lm_eval.tasks import TaskManager

    return list(TaskManager().all_tasks)


@functools.cache
def _entries(name: str) -> dict[str, Entry]:
    import lm_eval.tasks

    found = entries(name, Path(lm_eval.tasks.__file__).parent)
    return lm_eval.tasks.TaskManager().task_index if found is None else found


def entries(name: str, root: Path) -> dict[str, Entry] | None:
    """What TaskIndex.build([root]) says of a name and of all that it stands for; None for one that stands for many.

    Of a name that is not there, empty.
    """
    asked: dict[str, None] = {}
    index: dict[str, Entry] = {}
    waiting, files = [name], set[str]()
    while waiting:
        new = [one for one in dict.fromkeys(waiting) if one not in asked]
        asked |= dict.fromkeys(new)
        if len(asked) > MOST_NAMES:
            return None
        before = len(files)
        files |= {path for one in new for path in _mentioning(one, root)}
        index = _indexed(files) if len(files) > before else index
        waiting = [other for one in new if one in index for other in _meant(index[one])]
    return {one: index[one] for one in asked if one in index}


def _meant(entry: Entry) -> list[str]:
    """The names that a group or a tag stands for, those in groups within a group too."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    return list(_members((entry.cfg or {}).get("task"))) if entry.kind.name == "GROUP" else []


def _members(listed: Any) -> Iterator[str]:
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from (one[key] for key in ("group", "task") if isinstance(one.get(key), str))
            yield from _members(one.get("task"))


def _indexed(files: set[str]) -> dict[str, Entry]:
    """As TaskIndex.build makes it of these files: of two that define a name the first in order counts."""
    from lm_eval.tasks._index import TaskIndex

    index: dict[str, Entry] = {}
    for path in sorted(files):
        with contextlib.suppress(Exception):  # lm-eval passes over whatever it cannot read
            TaskIndex.process_cfg(_config(path), Path(path), index)
    return index


@functools.cache
def _config(path: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Any] = load_yaml(path, resolve_func=False)
    return found


# --- the files as text


def _mentioning(name: str, root: Path) -> Iterator[str]:
    """The task files that have a name in them, or in a file that they include, whatever it means there."""
    texts, users = _texts(root)
    waiting = [path for path, text in texts.items() if name.encode() in text]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if path.endswith(".yaml"):
            yield path
        fresh = users.get(path, set()) - seen
        seen |= fresh
        waiting += fresh


@functools.cache
def _texts(root: Path) -> tuple[dict[str, bytes], dict[str, set[str]]]:
    """Every task file, and every file that one includes; and of each that is included, those that include it."""
    texts, users = dict[str, bytes](), dict[str, set[str]]()
    waiting = list(_task_files(root))
    while waiting:
        path = waiting.pop()
        if path in texts or not os.path.isfile(path):  # noqa: PTH113 (14,000 times)
            continue
        with open(path, "rb") as file:  # noqa: PTH123
            texts[path] = file.read()
        for found in INCLUDES.findall(texts[path]):
            for word in re.findall(rb"[^\s,\[\]\"']+", found):
                included = os.path.normpath(os.path.join(os.path.dirname(path), word.decode(errors="replace")))  # noqa: PTH118, PTH120
                users.setdefault(included, set()).add(path)
                waiting.append(included)
    return texts, users


def _task_files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in IGNORED]
        yield from (os.path.join(folder, name) for name in files if name.endswith(".yaml"))  # noqa: PTH118
