"""Settings files: strict, unknown keys refused with the nearest known one, wrong types never converted."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.runtime.errors import UsageProblem
from stages.runtime.texts import lines
from stages.workspace.commands import Command

Dtype = Literal["auto", "float32", "bfloat16"]
Role = Literal["slm", "llm"]
Quantization = Literal["4bit", "8bit"]
ROLES: tuple[Role, ...] = ("slm", "llm")
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0)]
MOST_TOLD = 30
"""Mistakes of a file that a message names before it counts them."""
LONGEST_SHOWN = 200
"""Letters of a value that a message shows."""


class Settings(BaseModel):
    """Strict and frozen; the one place that says so."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


def parse(kind: type[S], text: bytes, path: Path, *, explained: str = "") -> S:
    """The settings in a TOML file. Raises UsageProblem naming every mistake with its key, and the nearest known key.

    explained: where every key is, if not in a file of the same name.
    """
    try:
        values = tomllib.loads(text.decode("utf-8-sig"))  # some editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise UsageProblem(f"not UTF-8: {error}", where=path, mend="save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise _no_toml(error, path, text.decode("utf-8-sig")) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or tables in tables in tables
        raise UsageProblem(f"not valid TOML: {error}", where=path, mend="write it plainly") from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        mistakes, all_of_them = mistakes_in(kind, error), error.error_count()
        count = "1 mistake" if all_of_them == 1 else f"{all_of_them} mistakes"
        mistakes += [f"and {more} more"] if (more := all_of_them - len(mistakes)) else []
        message = lines([f"{count} in the settings", *mistakes], "\n  - ")
        mend = f"every key is explained in the {explained or path.name} that `{Command('init', 'study')}` writes"
        raise UsageProblem(message, where=path, mend=mend) from error


def _no_toml(error: tomllib.TOMLDecodeError, path: Path, text: str) -> UsageProblem:
    """What a file that is no TOML is refused with: the line, and the mistake that is made most."""
    found = re.search(r"line (\d+)", str(error))
    number = int(found[1]) if found else 0
    [line] = text.splitlines()[number - 1 : number] or [""]
    is_value = str(error).startswith("Invalid value")
    mend = "correct that line" + ("; a text stands between quotes" if is_value else "")
    mend += "; it is in the file above already: write all its keys there" if "twice" in str(error) else ""
    shown = f": {clipped(line.strip())}" if line.strip() else ""
    return UsageProblem(f"not valid TOML: {error}{shown}", where=f"{path}:{number}" if found else path, mend=mend)


def mistakes_in(kind: type[Settings], error: ValidationError) -> list[str]:
    """Every mistake with its key, what was found, and the nearest known key; of very many the first."""
    return [_mistake(kind, found) for found in error.errors()[:MOST_TOLD]]


def _mistake(kind: type[Settings], found: object) -> str:
    """One line for one of pydantic's error dicts."""
    assert isinstance(found, dict)
    place = found["loc"]
    key = clipped(".".join(str(part) for part in place))
    if found["type"] == "extra_forbidden":
        known = _known_keys(kind, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5) or _elsewhere(kind, str(place[-1]))
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if found["type"] == "missing":
        return f"{key}: missing"
    value = "" if found["type"] == "value_error" else f", found {clipped(repr(found['input']))}"
    is_pattern = found["type"] == "string_pattern_mismatch"  # which few people read
    text = "not written as it has to be" if is_pattern else str(found["msg"]).removeprefix("Value error, ")
    return f"{key}: {text}{value}" if key else text


def clipped(text: str) -> str:
    """A text of a file, which may be another party's, as far as anybody wants to read it in a message."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _elsewhere(kind: type[BaseModel], key: str) -> list[str]:
    """Where in its tables a key of this name stands, such as distillation.lambda_slm; the first that is found."""
    for name, field in kind.model_fields.items():
        if get_origin(field.annotation) is not dict and key in _known_keys(kind, (name,)):
            return [f"{name}.{key}"]
    return []


def _known_keys(kind: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """The keys of the table at this place."""
    parts = iter(place)
    for part in parts:
        field = kind.model_fields[str(part)].annotation
        if get_origin(field) is dict:  # a table of tables, such as [clients.2.slm]: the next part is a key of it
            next(parts, None)
            field = get_args(field)[1]
        tables = [one for one in (field, *get_args(field)) if isinstance(one, type) and issubclass(one, BaseModel)]
        if not tables:
            return []
        kind = tables[0]
    return list(kind.model_fields)
