"""The pages of docs/ that are made from the program: `python tests/generate_docs.py` writes them again.

commands.md is what `--help` prints; settings.md is the template's two files, a row for each key, with its type and
range and what holds where it is absent. A test compares the pages with what this makes.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's program, whatever is installed

import typer  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from fedcollm_cli.main import app  # noqa: E402
from stages.workspace.agreement import Agreement  # noqa: E402
from stages.workspace.init import init  # noqa: E402
from stages.workspace.machine import Machine  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
WIDTH = 100
"""Columns of a help text, whatever terminal asks for it."""
MADE = "<!-- Made by tests/generate_docs.py; change the program's text instead. -->"

COMMANDS_HEAD = f"""# Commands

{MADE}

What `fedcollm COMMAND --help` prints. [Exit codes](exit-codes.md) are the same for all commands.
"""
SETTINGS_HEAD = f"""# Settings

{MADE}

`fedcollm init` writes two files, with these keys and these comments in them:

- [`fedcollm.toml`](#fedcollmtoml) is the agreement. Every party has the same bytes of it.
- [`machine.toml`](#machinetoml) is about one machine. It never travels.

A key that neither file knows is refused, and so is a value of the wrong type. All mistakes of a file are told at once.
The first column shows a line as a new workspace has it; a line with `#` in front is switched off there. Where the third
column has –, there is no value then, and the last column says what holds instead.
"""


def pages() -> dict[Path, str]:
    """Each page's path, and what it should hold."""
    return {REFERENCE / "commands.md": commands_page(), REFERENCE / "settings.md": settings_page()}


# --- commands


def commands_page() -> str:
    """One heading for each command, and its help."""
    group: Any = typer.main.get_command(app)
    texts = [COMMANDS_HEAD, _fenced(_help(group, "fedcollm", None))]
    parent = group.context_class(group, info_name="fedcollm", terminal_width=WIDTH, **group.context_settings)
    for name in group.list_commands(parent):
        texts += [f"## {name}\n", _fenced(_help(group.get_command(parent, name), name, parent))]
    return "\n".join(texts)


def _help(command: Any, name: str, parent: Any) -> str:
    settings = dict(command.context_settings, info_name=name, parent=parent, terminal_width=WIDTH)
    context = command.context_class(command, **settings)
    return "\n".join(line.rstrip() for line in str(command.get_help(context)).splitlines())


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```\n"


# --- settings

TABLE = re.compile(r"(?:# )?\[(?P<table>[a-z_.0-9]+)\]\s*(?:#\s*(?P<comment>.*))?")
KEY = re.compile(r"(?P<line>(?:# )?(?P<key>[a-z_0-9]+) = (?:\"[^\"]*\"|\[[^\]]*\]|[^\s#]+))\s*(?:#\s*(?P<comment>.*))?")
MORE = re.compile(r"#?\s+#\s*(?P<comment>.*)")


def settings_page() -> str:
    """Both files of a new workspace, a section for each table."""
    with TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        init(study)
        sections = [
            *_sections("fedcollm.toml", (study / "fedcollm.toml").read_text(encoding="utf-8"), Agreement),
            *_sections("machine.toml", (study / "machine.toml").read_text(encoding="utf-8"), Machine),
        ]
    return "\n".join([SETTINGS_HEAD, *sections])


def _sections(name: str, text: str, kind: type[BaseModel]) -> Iterator[str]:
    seen: set[tuple[str, ...]] = set()
    said: dict[str, str] = {}  # of a key that two tables have, the file explains the first
    yield f"## {name}\n"
    for table, comment, rows in _tables(text):
        place = tuple(table.split(".")) if table else ()
        model = _model(kind, place) if rows else kind
        if table:
            yield f"### [{table}]\n"
        if comment:
            yield f"{comment.removesuffix('.')}.\n"
        if rows:
            yield "| key | takes | if absent | meaning |\n|---|---|---|---|"
        for key, line, meaning in rows:
            field = model.model_fields[key]
            seen.add((*place, key))
            meaning = meaning or said.get(key, "")
            said.setdefault(key, meaning)
            yield f"| `{line}` | {_takes(field)} | {_default(field)} | {_cell(meaning)} |"
        if rows:
            yield ""
    missing = sorted(".".join(key) for key in set(keys(kind)) - seen)
    if missing:
        raise SystemExit(f"the template's {name} does not name: {', '.join(missing)}")


def _tables(text: str) -> Iterator[tuple[str, str, list[tuple[str, str, str]]]]:
    """Each table's name, what its line says, and its keys: name, line and comment."""
    table, comment, rows = "", "", []
    for line in text.splitlines():
        if found := TABLE.fullmatch(line):
            yield table, comment, rows
            table, comment, rows = found["table"], found["comment"] or "", []
        elif found := KEY.fullmatch(line):
            rows.append((found["key"], found["line"], found["comment"] or ""))
        elif (found := MORE.fullmatch(line)) and rows:
            rows[-1] = (*rows[-1][:2], f"{rows[-1][2]} {found['comment']}".strip())
        elif found:
            comment += f" {found['comment']}"
        elif line.startswith("# ") and not line.startswith("# ---") and not table:
            comment = f"{comment} {line.removeprefix('# ')}".strip()
    yield table, comment, rows


def _model(kind: type[BaseModel], place: tuple[str, ...]) -> type[BaseModel]:
    for part in place:
        kind = kind.model_fields[part].annotation
    return kind


def keys(kind: type[BaseModel], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a file that is not itself a table."""
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys(inner, (*place, name))
        elif get_origin(inner) is not dict:  # of which a table stands in the file as an example, commented out
            yield (*place, name)


def _takes(field: FieldInfo) -> str:
    """A field's type and range in words."""
    return _cell(_type(field.annotation, field.metadata))


def _type(kind: Any, limits: list[Any]) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0], [*limits, *getattr(inner[1], "metadata", inner[1:])])
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one, limits) for one in inner if one is not type(None))
    if origin is list:
        one = _type(inner[0], limits)
        return "a list of texts" if one == "text" else f"a list of {one}"
    word = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}[kind]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    held = [(sign, getattr(one, name)) for one in limits for name, sign in signs.items() if hasattr(one, name)]
    bounds = [f"{sign} {limit:,.10g}" for sign, limit in held]
    return f"{word} {', '.join(bounds)}" if bounds else word


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be there"
    if field.default is None:
        return "–"
    if isinstance(field.default, str):
        return f'`"{field.default}"`'
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for path, content in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
