"""Templates of model cards: Markdown with the front matter that the hub reads, safe whatever a text in it holds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from stages.runtime.texts import in_code, in_line, in_markdown

PLAIN_NAME = re.compile(r"[A-Za-z][\w.-]*(/[\w.-]+)?", re.ASCII)
NO_TEXTS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
"""What needs no quotes in YAML, unless it means something else there."""


def template(path: Path) -> Template:
    """A card's template. Filters: quoted, in_shell, marked (in Markdown), front (in the front matter)."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_told,
    )
    environment.filters |= {"quoted": in_code, "in_shell": lambda text: shlex.quote(in_line(text))}
    environment.filters |= {"marked": in_markdown, "front": _in_front_matter}
    return environment.get_template(path.name)


def _in_front_matter(name: str) -> str:
    """A text of the YAML at the card's head."""
    is_plain = PLAIN_NAME.fullmatch(name) and name.lower() not in NO_TEXTS
    return name if is_plain else in_code(name)


def _told(value: Any) -> Any:
    """What the template prints of its own accord or of others': each on one line."""
    return in_line(value) if type(value) is str else value
