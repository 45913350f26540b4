"""A setting and its values as a sweep is given them, `--set KEY=VALUE,VALUE`: read, and written as a word to paste."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

import tomlkit

from stages.runtime.errors import UsageProblem


def in_words(key: str, values: Sequence[Any]) -> str:
    """What parse_setting reads: as short as may be, or else as TOML."""
    plain = f"{key}={','.join(map(str, values))}"
    if parse_setting(plain) == (key, list(values)):
        return plain
    return f"{key}={','.join(map(_literal, values))}"


def _literal(value: Any) -> str:
    """A value on one line of TOML."""
    if not isinstance(value, dict):
        return str(tomlkit.item(value).as_string())
    table = tomlkit.inline_table()
    table.update(value)
    return str(table.as_string())


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """The key and the values of "key=a,b", each as TOML would read it; what TOML would not is text."""
    key, equals, values = text.partition("=")
    if not equals or not key.strip():
        raise UsageProblem(
            f"--set {text!r} is not KEY=VALUE,VALUE", mend="such as --set distillation.lambda_slm=0,0.5,1"
        )
    try:
        return key.strip(), tomllib.loads(f"values = [{values}]")["values"]
    except tomllib.TOMLDecodeError:
        return key.strip(), [_value(one) for one in values.split(",")]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
