"""Changing single keys of a settings file's text, whose other lines, comments and order stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomlkit

from stages.runtime.errors import UsageProblem

OFF = "off"
"""The value None in words."""


def in_words(value: object) -> str:
    """A value as people give it; None, which takes a key out, is off."""
    return OFF if value is None else str(value)


def changed(text: str, changes: Mapping[str, Any]) -> str:
    """A TOML file's text with these settings, by dotted key; None takes a key out, which means off."""
    document = tomlkit.parse(text)
    for key, value in changes.items():
        set_key(document, key.split("."), value)
    return tomlkit.dumps(document)


def set_key(table: Any, key: list[str], value: Any) -> None:
    """Set one key, making the tables it stands in. Raises UsageProblem where what it stands in is no table."""
    for name in key[:-1]:
        table = table.setdefault(name, tomlkit.table())
        if not isinstance(table, dict):
            raise UsageProblem(f"there is no setting {'.'.join(key)}: {name} has no keys", mend=f"leave .{key[-1]} out")
    if isinstance(value, dict):
        table.pop(key[-1], None)
        for name, item in value.items():
            set_key(table, [key[-1], name], item)
    elif value is None:
        table.pop(key[-1], None)
    else:
        table[key[-1]] = value
