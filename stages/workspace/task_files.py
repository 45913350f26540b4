"""Task files as data: what they may hold unless a user trusts them with code, and which local files they name.

They come from whoever made the agreement, so they are read here first, by a reader that knows no code.
"""

from __future__ import annotations

import glob
import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from stages.files import reading
from stages.runtime.errors import Refused, UsageProblem

BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""Readers of local files that only read; others of `datasets` unpickle, or ask a database."""
CODE_KEYS = ("class", "custom_dataset", "unsafe_code", "use_prompt", "hf_evaluate", "trust_remote_code")
GENERATION_CODE_KEYS = ("custom_generate", "assistant_model")
IGNORED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders of caches, which lm-eval passes over too."""
MOST_VALUES = 1_000_000
"""A task file that is larger, with everything that it refers to, is none."""
DEEPEST = 100
"""Lists within lists, or mappings, that a task file may have."""
MOST_FILES = 100_000
"""A task that names more local files names a disk."""
TRUST = "read them; if they are your own, or you trust them with this machine, set run_task_code = true in machine.toml"


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # lm-eval's own
    """Plain YAML, and every !function in it by name, also of a key that is given twice: lm-eval would import each."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.functions: list[str] = []

    def note(self, node: Any) -> str:
        """What stands after !function."""
        self.functions.append(str(node.value))
        return self.functions[-1]


Loader.add_constructor("!function", Loader.note)


def loaded(content: bytes) -> tuple[Any, list[str]]:
    """What YAML bytes hold, and the functions that they name. Raises yaml.YAMLError or RecursionError, among others.

    Nothing deep is built: the reader in C would end the process where its stack does.
    """
    depth = 0
    for event in yaml.parse(content, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} levels of lists in lists")
    loader = Loader(content)
    return loader.get_single_data(), loader.functions


def check_are_data(tasks: Path, home: Path, *, trusted: bool = False) -> None:
    """Raise Refused for what in a task file would run code of its author's choice, naming the file and the key.

    trusted: whether it may; then they are read all the same, since whatever is no YAML is told of here.
    """
    for path in _task_files(tasks):
        shown = path.relative_to(home) if path.is_relative_to(home) else path
        value, functions = _read(path)
        for name in texts_in(value.get("include")) if isinstance(value, dict) else []:
            if not (path.resolve().parent / name).is_file():
                message = f"{shown} includes {name}, which is not there"
                raise UsageProblem(message, where=path, mend="name a task file, from the folder that this one lies in")
        entries = [(str(key), value) for mapping in mappings_in(value) for key, value in mapping.items()]
        found = [f"!function {name}" for name in functions] + [one for entry in entries if (one := _code(*entry))]
        if found and not trusted:
            raise Refused(f"{shown} would run code: {found[0]}", where=path, mend=TRUST)


def _read(path: Path) -> tuple[Any, list[str]]:
    """What a YAML file holds, and the functions that it names. Raises UsageProblem where it is none."""
    try:
        value, functions = loaded(reading.read_own(path))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        raise UsageProblem(f"{path.name} is not YAML: {error}", where=path, mend="correct that line") from error
    waiting, count = [value], 0
    while waiting:
        one, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            message = f"{path.name} refers to itself, or holds more than {MOST_VALUES} values"
            raise UsageProblem(message, where=path, mend="write it without references")
        waiting += [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
    return value, functions


def own_files(tasks: Path) -> list[tuple[str, Path]]:
    """Whatever lies in tasks/, and what task files include from elsewhere, each with the name it goes by.

    The same whether the workspace is named by an absolute path, by a relative one or by one with links.
    """
    own = [path for path in tasks.rglob("*") if path.is_file() and not IGNORED.intersection(path.parts)]
    known = {path.resolve() for path in own}
    included = {(path.name, path) for path in _task_files(tasks) if path.resolve() not in known}
    return sorted({(path.relative_to(tasks).as_posix(), path) for path in own} | included)


def spare_files(tasks: Path, names: Iterable[str], *, is_local: bool = False) -> list[str]:
    """What lies in tasks/ and none of these tasks needs, nor what they include, group or call; of two, the deeper.

    is_local: none is spare where a task is meant that is not defined here, since lm-eval's own may lead back here.
    """
    found = {path: _read_if_sound(path) for path in _task_files(tasks)}
    defined: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        for name in _names(found[path][0]):
            defined.setdefault(name, path)
    asked, needed = set(names), set[Path]()
    waiting, elsewhere = [defined[name] for name in asked if name in defined], asked - {*defined}
    waiting += [path for path, (value, _) in found.items() if isinstance(value, dict) and asked & _tags(value)]
    while waiting:
        path = waiting.pop()
        if path in needed:
            continue
        needed.add(path)
        value, functions = found.get(path, (None, []))
        waiting += [path.parent / f"{function.split('.')[0]}.py" for function in functions]
        for one in mappings_in(value):
            waiting += [path.resolve().parent / name for name in texts_in(one.get("include"))]
            waiting += [defined[name] for name in texts_in(one.get("task")) if name in defined]
            elsewhere |= {*texts_in(one.get("task"))} - {*defined}
    if is_local and elsewhere:
        return []
    needed |= {path.resolve() for path in needed}
    return [name for name, path in own_files(tasks) if not {path, path.resolve()} & needed]


def undefined(tasks: Path, names: Iterable[str]) -> list[str]:
    """Which of these tasks no file here defines: lm-eval's own, or missing."""
    values = [_read_if_sound(path)[0] for path in _task_files(tasks)]
    known = {name for value in values for name in (*_names(value), *(_tags(value) if isinstance(value, dict) else ()))}
    return [name for name in dict.fromkeys(names) if name not in known]


def absent_data(tasks: Path, home: Path) -> list[str]:
    """The local files of data that task files name and that are not here, as they are named."""
    values = [_read_if_sound(path)[0] for path in _task_files(tasks)]
    named = [text for value in values for one in mappings_in(value) for text in texts_in(one.get("data_files"))]
    return [name for name in dict.fromkeys(named) if "://" not in name and not matches(name, home)]


def _read_if_sound(path: Path) -> tuple[Any, list[str]]:
    try:
        return _read(path)
    except UsageProblem:
        return None, []


def _names(value: Any) -> list[str]:
    """What a task file defines: a task, or a group."""
    found = [value.get("task"), value.get("group")] if isinstance(value, dict) else []
    return [name for name in found if isinstance(name, str)]


def _tags(value: dict[Any, Any]) -> set[str]:
    return set(texts_in([value.get("tag")]))


def local_files(tasks: Path, home: Path, names: Iterable[str] | None = None) -> list[tuple[str, Path]]:
    """The task files and the local data they name, however it is called, each with the name it goes by.

    names: of these tasks alone, if they need no other.
    """
    spare = spare_files(tasks, names, is_local=True) if names is not None else []
    found = {(name, path) for name, path in own_files(tasks) if name not in spare}
    kept = {path.resolve() for _, path in found}
    for path in [one for one in _task_files(tasks) if one.resolve() in kept]:
        try:
            mappings = list(mappings_in(_read(path)[0]))
        except UsageProblem:
            continue  # told where the task is loaded
        for mapping in mappings:
            for key in ("data_files", "data_dir", "dataset_path"):
                for name in texts_in(mapping.get(key)):
                    found.update((f"{name}/{one.name}", one) for one in matches(name, home))
        if len(found) > MOST_FILES:
            message = f"{path.name} names more than {MOST_FILES} local files"
            raise UsageProblem(
                message, where=path, mend="name its data_files one by one, or the folder that they lie in"
            )
    return sorted(found)


def data_files(config: Any) -> list[Path]:
    """The local files of data that a configuration from the workspace names."""
    names = [name for mapping in mappings_in(config) for name in texts_in(mapping.get("data_files"))]
    return [path for name in names for path in matches(name, Path())]


def digest(tasks: Path, home: Path, names: Iterable[str] | None = None) -> str:
    """The digest of task files and their local data: other ones give other rows and other scores. names: of these."""
    return digest_of(local_files(tasks, home, names))


def own_digest(tasks: Path) -> str:
    """The digest of task files without their data, which need not lie with every party."""
    return digest_of(own_files(tasks))


def digest_of(found: list[tuple[str, Path]]) -> str:
    """The digest of files and of the names they go by."""
    lines = [f"{name}\0{reading.sha256(reading.read_own(path))}\n" for name, path in found]
    return reading.sha256("".join(lines).encode())


def _code(key: str, value: Any) -> str | None:
    """What would be run, or None."""
    if (key in CODE_KEYS or key in GENERATION_CODE_KEYS) and value not in (False, None):
        return f"{key}: {value}"
    if key == "dataset_path" and isinstance(value, str) and value not in BUILDERS and _is_builder(value):
        return f"dataset_path: {value}, a reader that is more than a reader of rows"
    if key == "metric" and not (isinstance(value, str) and _is_metric(value)):
        return f"metric: {value}, which lm-eval does not know and would fetch as a program"
    return None


def _is_builder(name: str) -> bool:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as PACKAGED

    return name in PACKAGED or name.endswith(".py")


def _is_metric(name: str) -> bool:
    import lm_eval.api.metrics  # noqa: F401 (which fills the registry)
    from lm_eval.api.registry import metric_registry

    return name in metric_registry


def _task_files(tasks: Path) -> list[Path]:
    """The YAML files of a folder, and those that they include, lm-eval's own left out: they came with it."""
    spec = importlib.util.find_spec("lm_eval")
    theirs = [Path(place).resolve() for place in (spec and spec.submodule_search_locations) or []]
    waiting, found = [path for path in sorted(tasks.rglob("*.yaml")) if path.is_file()], dict[Path, None]()
    while waiting:
        path = waiting.pop(0)
        if path in found or any(path.resolve().is_relative_to(place) for place in theirs):
            continue
        found[path] = None
        try:
            config = _read(path)[0]
        except UsageProblem:
            continue  # told by who needs it
        if isinstance(config, dict):
            included = [path.resolve().parent / name for name in texts_in(config.get("include"))]
            waiting += [one for one in included if one.is_file()]
    return list(found)


def mappings_in(value: Any) -> Iterator[dict[Any, Any]]:
    """Every mapping in a value, each once, whatever refers to whatever."""
    waiting, seen = [value], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or not isinstance(one, dict | list):
            continue
        seen.add(id(one))
        waiting += one.values() if isinstance(one, dict) else one
        if isinstance(one, dict):
            yield one


def texts_in(value: Any) -> list[str]:
    """Every text in a value of data_files: one, or a list, or by split."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in texts_in(one)] if isinstance(value, list) else []


def matches(name: str, home: Path) -> list[Path]:
    """The local files that a name, a pattern or a folder stands for."""
    place = home / name
    if place.is_file():
        return [place]
    found = place.rglob("*") if place.is_dir() else map(Path, glob.iglob(str(place), recursive=True))  # noqa: PTH207
    return sorted(path for path in itertools.islice(found, MOST_FILES + 1) if path.is_file())
