"""A7, leaks: what exchanged files say of a person, a machine or a place; and words that people ask for."""

from __future__ import annotations

import functools
import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from re import Pattern
from typing import Any

from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import READ, Folder, Scope, every_file, kind_of
from stages.files import reading
from stages.runtime.errors import Problem
from stages.workspace.names import MANIFEST

A7 = Check("A7", "leaks")

ABSOLUTE_PATH = re.compile(r"(?:^|[\s\"'=(,:])(?:file://|~?/[\w.-]+/|[A-Za-z]:[\\/]|\\\\\w)")
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+\.[A-Za-z]{2,}")  # from where a word begins: long words are read once
UUID = re.compile(r"(?<![0-9A-Fa-f])[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}(?![0-9A-Fa-f])")
ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]*:[0-9A-Fa-f:]+)(?![\w.:])")
ED25519 = re.compile(r"[A-Za-z0-9+/]{86}==")  # 64 random bytes, which may look like anything
COUNTS = ("examples", "tokens", "sample_count")
SHORTEST_NAME = 2


@dataclass(frozen=True)
class Words:
    """What to look for beside patterns: the names of this machine and its user, and words that people gave.

    harmless: strings that were searched and tell nothing: most of a folder's are in every other folder too.
    """

    user: str = ""
    host: str = ""
    canaries: tuple[str, ...] = ()
    harmless: set[str] = field(default_factory=set, compare=False)

    @functools.cached_property
    def kinds(self) -> Mapping[str, Pattern[str]]:
        """What a string may tell, and by what one knows it."""
        named = {"this user's name": self.user, "this machine's name": self.host}
        return {"an absolute path": ABSOLUTE_PATH, "an e-mail address": EMAIL} | {
            name: re.compile(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", re.IGNORECASE)
            for name, word in named.items()
            if len(word) >= SHORTEST_NAME
        }


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def leaks_of(folder: Folder, words: Words) -> Iterator[Finding]:
    """Of one folder that travels."""
    if reading.below(folder.path / MANIFEST, folder.scope.exchanged) is None:
        return
    agreement = folder.scope.agreement
    is_secure = agreement is not None and agreement.aggregation.is_hidden and folder.path.name.startswith("client-")
    for name, content in folder.contents.items():
        value = _json_in(content, name)
        yield from _leaks(content, value, folder.path / name, folder.scope, words)
        for count in COUNTS if is_secure and value else ():
            if value and value.get(count):
                yield A7.fail(folder.file(name), f"tells {count}", "nothing of a client's data, in secure mode")


def leaks_between(folders: list[Folder], scopes: list[Scope], client: int | None, words: Words) -> Iterator[Finding]:
    """Of whatever else travels, in those folders or outside them; and how much was looked at."""
    done = {f"{folder.path}/{name}" for folder in folders for name in folder.names if name.endswith(READ)}
    tops = [f"{scope.exchanged}".rstrip("/") + "/" for scope in scopes]
    total = sum(place.startswith(top) for top in tops for place in done)
    for scope in scopes:
        for place in every_file(scope.exchanged) if scope.exchanged.is_dir() else ():
            if place in done:
                continue
            path = Path(place)
            status = path.lstat()
            if kind_of(status) or not scope.concerns(path, client):
                continue
            total += 1
            if status.st_size > reading.READ_AT_ONCE_BYTES:
                found = f"has {status.st_size} bytes that no manifest names, and is not searched"
                yield A7.warn(scope.shown(path), found, f"{reading.READ_AT_ONCE_BYTES} bytes at most, or none at all")
                continue
            try:
                content = reading.read(path, limit_bytes=reading.READ_AT_ONCE_BYTES)
            except (Problem, OSError):  # A2 says why
                continue
            yield from _leaks(content, _json_in(content, path.name), path, scope, words)
    if not total:
        yield A7.skip("nothing that travels is here")
        return
    asked = f"; {number_of(len(words.canaries), 'canary string')} searched in every byte" if words.canaries else ""
    yield A7.ok(f"{number_of(total, 'file')}: no path, name or address of a machine or a person{asked}")


def _leaks(content: bytes, value: dict[str, Any] | None, path: Path, scope: Scope, words: Words) -> Iterator[Finding]:
    shown, name = scope.shown(path), reading.below(path, scope.exchanged) or path.name
    for number, canary in enumerate(words.canaries, 1):
        forms = {canary.encode(), json.dumps(canary)[1:-1].encode(), canary.encode("utf-16-le")}
        if canary in name or any(form in content for form in forms):
            yield A7.fail(shown, f"holds canary string {number}")
    new = {name, *_texts(value)} - words.harmless
    if not _may_tell("\n".join(new), words):
        words.harmless.update(new)
        return
    for place, text in [("its name", name), *_strings(value)]:
        certain = [kind for kind, pattern in words.kinds.items() if pattern.search(text)]
        if certain:
            yield A7.fail(shown, f"{place} tells {' and '.join(certain)}")
        if UUID.search(text):
            yield A7.warn(shown, f"{place} holds a UUID")
        if any(_is_address(found[0]) for found in ADDRESS.finditer(text)):
            yield A7.warn(shown, f"{place} holds what may be an IP address")


def _may_tell(text: str, words: Words) -> bool:
    """Whether one of these lines may tell something. To a pattern a line's ends are what a string's are."""
    patterns = (*words.kinds.values(), UUID)
    return any(pattern.search(text) for pattern in patterns) or any(
        _is_address(found[0]) for found in ADDRESS.finditer(text)
    )


def _json_in(content: bytes, name: str) -> dict[str, Any] | None:
    """A JSON file, or the header of a safetensors file, if it can be read at all."""
    if name.endswith(".safetensors"):
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    elif not name.endswith((".json", ".sig")):
        return None
    if len(content) > reading.LARGEST_JSON_BYTES:
        return None
    try:
        return reading.parse_json(content)
    except (ValueError, RecursionError):
        return None


def _texts(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys too. No depth is too deep."""
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict):
            yield from inner
            left.extend(inner.values())
        elif isinstance(inner, list):
            left.extend(inner)


def _strings(value: object) -> Iterator[tuple[str, str]]:
    """The same with the keys that lead to each, but for signatures."""
    left = [("", value)]
    while left:
        place, inner = left.pop()
        if isinstance(inner, str) and not ED25519.fullmatch(inner):
            yield place, inner
        elif isinstance(inner, dict):
            for key, under in inner.items():
                yield f"a key in {place}" if place else "a key", key
                left.append((f"{place}.{key}" if place else key, under))
        elif isinstance(inner, list):
            left.extend((place, under) for under in inner)
