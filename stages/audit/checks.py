"""What an audit says: findings, each of one check, at one place, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["OK", "WARN", "FAIL", "SKIP"]

FAILED, WARNED = 4, 10
"""Exit codes."""
NOUNS: dict[Level, str] = {"FAIL": "failure", "WARN": "warning"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    where: a file or folder; empty for what holds of all that was looked at.
    found, expected: of SKIP, found is what is missing to check it.
    measured: numbers, by name.
    """

    id: str
    level: Level
    check: str
    where: str
    found: str
    expected: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """In one sentence."""
        said = f"{self.where}: {self.found}" if self.where else self.found
        return f"{said}; expected {self.expected}" if self.expected else said

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        names = ("id", "level", "check", "where", "found", "expected", "text")
        said = {name: getattr(self, name) for name in names}
        return said | ({"measured": dict(self.measured)} if self.measured else {})


@dataclass(frozen=True)
class Check:
    """One of the audit's checks: its number, and its name."""

    id: str
    name: str

    def ok(self, found: str, *, where: str = "", measured: Mapping[str, float] | None = None) -> Finding:
        """As it should be."""
        return Finding(self.id, "OK", self.name, where, found, measured=measured or {})

    def warn(self, where: str, found: str, expected: str = "") -> Finding:
        """Worth a look; no proof of anything."""
        return Finding(self.id, "WARN", self.name, where, found, expected)

    def fail(self, where: str, found: str, expected: str = "") -> Finding:
        """Not to be used as it is."""
        return Finding(self.id, "FAIL", self.name, where, found, expected)

    def skip(self, missing: str, *, where: str = "") -> Finding:
        """Not looked at, and what is missing for that."""
        return Finding(self.id, "SKIP", self.name, where, missing)


def count(findings: Iterable[Finding], level: Level) -> int:
    """How many are of this level."""
    return sum(finding.level == level for finding in findings)


def exit_code(findings: list[Finding], *, strict: bool) -> int:
    """4 if anything failed, 10 for a warning where strict, else 0."""
    if count(findings, "FAIL"):
        return FAILED
    return WARNED if strict and count(findings, "WARN") else 0


def told(findings: list[Finding]) -> list[Finding]:
    """Of one check's findings, without a summary that says less than they do, or more than is so."""
    problems = count(findings, "FAIL") + count(findings, "WARN")
    single = sum(finding.level == "OK" and bool(finding.where) for finding in findings) == 1
    return [one for one in findings if one.level != "OK" or one.where or not (problems or single)]


def lines(findings: Iterable[Finding]) -> list[Finding]:
    """What people are shown: every problem and every gap, and of what is in order one line for each check."""
    every = list(findings)
    quiet = {one.id for one in every if one.level in ("FAIL", "WARN") or (one.level == "OK" and not one.where)}
    return [one for one in every if one.level != "OK" or not one.where or one.id not in quiet]


def result(findings: list[Finding], *, strict: bool) -> str:
    """The last line."""
    counts = [number_of(count(findings, level), noun) for level, noun in NOUNS.items() if count(findings, level)]
    return f"result: {', '.join(counts) or 'clean'} (exit {exit_code(findings, strict=strict)})"


def number_of(things: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{things} {noun}" if things == 1 else f"{things} {noun}s"
