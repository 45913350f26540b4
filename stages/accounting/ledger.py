"""The ledger of what was spent: each line holds the digest of the one before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.accounting.accountant import Charge
from stages.artefacts.manifest import Sha256
from stages.files import locks, reading, writing
from stages.runtime.errors import Damaged
from stages.workspace.commands import Command

LARGEST_LEDGER_BYTES = 64 << 20
BEGINNING = "0" * 64

Round = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Reserved(_Entry):
    """One run's steps, and the epsilon that the ledger comes to with them. attempt: which run, by a random number."""

    kind: Literal["reserved"] = "reserved"
    round: Round
    attempt: str
    noise_multiplier: Annotated[float, Field(gt=0)]
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: Annotated[float, Field(ge=0)]

    @property
    def charge(self) -> Charge:
        """What it costs."""
        return Charge(self.noise_multiplier, self.sample_rate, self.steps)


class Resumed(_Entry):
    """A reserved run that was stopped goes on after this step."""

    kind: Literal["resumed"] = "resumed"
    round: Round
    attempt: str
    step: Annotated[int, Field(ge=0)]


class Finished(_Entry):
    """A reserved run has ended with this adapter, and publishes no other."""

    kind: Literal["finished"] = "finished"
    round: Round
    attempt: str
    adapter_sha256: Sha256


class Reset(_Entry):
    """Somebody chose to count from zero again: which rounds had been published, and the file that was given up.

    anchors: the lines, of what was given up, that adapters and logs name.
    """

    kind: Literal["reset"] = "reset"
    rounds: list[Round]
    replaced_sha256: Sha256 | None
    anchors: list[Sha256] = []


Entry = Reserved | Resumed | Finished | Reset


class Line(_Entry):
    """One line: the entry, the sha256 of the line before, and that of this one without it, as JSON in one line."""

    entry: Annotated[Entry, Field(discriminator="kind")]
    previous: Sha256
    sha256: Sha256

    @staticmethod
    def after(lines: Sequence[Line], entry: Entry) -> Line:
        """The line that follows these."""
        previous = lines[-1].sha256 if lines else BEGINNING
        return Line(entry=entry, previous=previous, sha256=digest(entry, previous))


def digest(entry: _Entry, previous: str) -> str:
    """The sha256 of an entry and of the line before it."""
    said = entry.model_dump()
    if not said.get("anchors", True):  # as an earlier version wrote it, which had none
        del said["anchors"]
    return reading.sha256(json.dumps({"entry": said, "previous": previous}, sort_keys=True).encode())


def read_ledger(path: Path) -> list[Line]:
    """The lines of a ledger; none if there is no file. Raises Damaged if it is not as it was written."""
    if not path.exists() and not path.is_symlink():
        return []
    content = reading.read(path, limit_bytes=LARGEST_LEDGER_BYTES)
    lines: list[Line] = []
    for number, text in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        try:
            reading.parse_json(text)  # refuses what pydantic does not: a key that appears twice
            line = Line.model_validate_json(text)
        except (ValueError, ValidationError, RecursionError):
            raise damaged(path, f"line {number} of {path.name} is not a line of a privacy ledger") from None
        if line != Line.after(lines, line.entry):
            raise damaged(path, f"line {number} of {path.name} has been changed, or does not follow the line before")
        lines.append(line)
    if not content.endswith(b"\n"):  # each line was put there in one piece
        raise damaged(path, f"{path.name} ends in the middle of a line")
    return lines


def damaged(path: Path, message: str) -> Damaged:
    """What is said of a ledger that is not as it was written."""
    anew = Command("client-train", ..., i_understand_reset=True)
    mend = f"put it back from a backup; if there is none, `{anew}` begins anew"
    return Damaged(message, where=path, mend=mend)


def charges(lines: Sequence[Line]) -> list[Charge]:
    """Everything that was spent since the last reset."""
    found: list[Charge] = []
    for line in lines:
        if isinstance(line.entry, Reset):
            found = []
        elif isinstance(line.entry, Reserved):
            found.append(line.entry.charge)
    return found


def rounds_of(lines: Sequence[Line]) -> set[int]:
    """The rounds that a ledger knows of, those before a reset too."""
    known: set[int] = set()
    for line in lines:
        known |= set(line.entry.rounds) if isinstance(line.entry, Reset) else {line.entry.round}
    return known


def alone(path: Path) -> AbstractContextManager[None]:
    """A ledger, for this process alone: of two lines that follow the same one, one would be lost."""
    return locks.held(path.with_suffix(".lock"), without="move the workspace to a file system with locks")


def append(path: Path, lines: Sequence[Line], entry: Entry) -> None:
    """Put the ledger with one line more in its place, synced: no crash leaves half a line."""
    whole = [*lines, Line.after(lines, entry)]
    writing.write(path, "".join(json.dumps(line.model_dump(), sort_keys=True) + "\n" for line in whole).encode())
