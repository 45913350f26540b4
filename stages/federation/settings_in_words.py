"""A setting and its values as a sweep is given them, `--set KEY=VALUE,VALUE`: read, and written as a word to paste.

The word off takes the key out, so that its default holds; "off" in quotes is text.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

import tomlkit

from stages.runtime.errors import UsageProblem
from stages.workspace import changing


def in_words(key: str, values: Sequence[Any]) -> str:
    """What parse_setting reads: as short as may be, or else as TOML."""
    plain = f"{key}={','.join(map(changing.in_words, values))}"
    if parse_setting(plain) == (key, list(values)):
        return plain
    return f"{key}={','.join(map(_literal, values))}"


def _literal(value: Any) -> str:
    """A value on one line of TOML, or off."""
    if value is None:
        return changing.OFF
    if not isinstance(value, dict):
        return str(tomlkit.item(value).as_string())
    table = tomlkit.inline_table()
    table.update(value)
    return str(table.as_string())


def parse_setting(text: str) -> tuple[str, list[Any]]:
    """The key and the values of "key=a,b", each as TOML reads it; off is None, and what else it does not read, text."""
    key, equals, values = text.partition("=")
    if not equals or not key.strip():
        raise UsageProblem(
            f"--set {text!r} is not KEY=VALUE,VALUE", mend="such as --set distillation.lambda_slm=0,0.5,1"
        )
    try:
        return key.strip(), tomllib.loads(f"values = [{values}]")["values"]
    except tomllib.TOMLDecodeError:
        return key.strip(), [_value(one) for one in values.split(",")]


def parse_settings(words: Sequence[str]) -> dict[str, object]:
    """One value for each key, of several "key=value". Raises UsageProblem for a key with more, and one given twice."""
    found: dict[str, object] = {}
    for text in words:
        key, values = parse_setting(text)
        if len(values) != 1:
            mend = f'one value; a list stands in brackets: --set {key}=\'["a", "b"]\''
            raise UsageProblem(f"--set {key} has {len(values)} values", mend=mend)
        if key in found:
            raise UsageProblem("--set names a key twice", mend=f"give {key} once")
        found[key] = values[0]
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return None if text.strip() == changing.OFF else text.strip()
