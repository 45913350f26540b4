"""The local data that a task names, made absolute, each content with a cache of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from stages.files import reading, seclusion
from stages.runtime.errors import Refused, UsageProblem
from stages.workspace.names import PRIVATE
from stages.workspace.task_files import BUILDERS, digest_of, loaded, mappings_in, matches, texts_in

LOCAL_SCHEMES = ("file:", "local:")
"""What else `datasets` takes for a path."""


def from_workspace(config: Any, home: Path) -> Any:
    """The configuration with its relative files and folders made absolute from the workspace."""
    if not isinstance(config, dict):
        return config
    changed = {}
    for key, value in config.items():
        if key in ("data_files", "data_dir"):
            changed[key] = _absolute(value, home)
        elif key == "dataset_path" and isinstance(value, str) and value not in BUILDERS and (home / value).is_dir():
            changed[key] = str(home / value)
            _check_card(home / value)
        else:
            changed[key] = from_workspace(value, home)
    if not (named := _named(changed)):
        return changed
    for name in named:
        reading.check_plain(Path(name))
    # A cache of its own for each content: `datasets` takes rows for unchanged by their path and time alone.
    found = [(name, path) for name in named for path in matches(name, home)]
    cache = _datasets_cache() / "fedcollm" / digest_of(found)[:16]
    if any(seclusion.is_private(Path(name)) for name in named):
        cache = home / PRIVATE / ".datasets" / cache.name  # a copy of these rows is private too
    if "data_files" not in changed and "data_dir" not in changed:
        changed["dataset_kwargs"] = (changed.get("dataset_kwargs") or {}) | {"cache_dir": str(cache)}
        return changed
    return changed | {"cache_dir": str(cache)}


def _named(changed: dict[Any, Any]) -> list[str]:
    """The local data that one mapping names by itself: its files, or a folder that is its dataset_path."""
    named = [name for key in ("data_files", "data_dir") for name in texts_in(changed.get(key))]
    path = changed.get("dataset_path")
    return [*named, *([path] if isinstance(path, str) and Path(path).is_absolute() else [])]


def _datasets_cache() -> Path:
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE)


def _check_card(folder: Path) -> None:
    """Raise Refused where the card of a folder of data names files elsewhere: what is scored is what lies in it."""
    card = folder / "README.md"
    if not card.is_file():
        return
    head = reading.read_own(card).decode(errors="replace").partition("---")[2].partition("\n---")[0]
    try:
        value, _ = loaded(head.encode())
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise UsageProblem(f"the head of {card.name} is not YAML: {error}", where=card, mend="remove it") from error
    for mapping in mappings_in(value):
        for name in [text for key in ("data_files", "data_dir", "path") for text in texts_in(mapping.get(key))]:
            if "://" in name or not (folder / name).resolve().is_relative_to(folder.resolve()):
                message = f"{card.name} names {name}, outside the folder {folder.name}"
                raise Refused(message, where=card, mend="name the data itself, as data_files in the task file")


def _absolute(value: Any, home: Path) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(item, home) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, home) for item in value]
    if isinstance(value, str) and (value.startswith(LOCAL_SCHEMES) or "::" in value):
        mend = "name the file itself: its path from the workspace"
        raise UsageProblem(f"data_files names {value}, whose contents are not seen here", mend=mend)
    return str(home / value) if isinstance(value, str) and "://" not in value else value
