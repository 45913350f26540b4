"""Aligning two vocabularies as a step: a map each way, what they are worth on rows, and all of it as one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from stages.artefacts.sizes import LARGEST_VOCABULARY_BYTES
from stages.artefacts.steps import Over, Step
from stages.artefacts.vocabulary_files import Vocabulary, vocabulary_bytes
from stages.data.rows import Row
from stages.distillation import alignment_figures as figures
from stages.distillation.alignment import MAPPINGS, Alignment, Method
from stages.distillation.alignment_figures import USABLE, AlignmentReport, Direction, Read
from stages.distillation.alignment_files import alignment_bytes, parse_alignment
from stages.files import reading, writing
from stages.runtime.errors import Damaged, Refused
from stages.runtime.events import Event
from stages.workspace.commands import Command
from stages.workspace.names import ALIGNMENT_REPORT
from stages.workspace.settings import ROLES, Role

WAYS: tuple[tuple[Role, Role], ...] = (("llm", "slm"), ("slm", "llm"))
"""Teacher and student."""


class Sides(NamedTuple):
    """Two vocabularies, and the rows to measure on as each side reads them, by whoever asks.

    read: None for a row that a side leaves out.
    """

    vocabularies: Mapping[Role, Vocabulary]
    read: Callable[[Role], Sequence[Read | None]]
    rows: Sequence[Row]
    rows_sha256: str


class Aligned(NamedTuple):
    """The maps by teacher, and the figures of each way."""

    alignments: Mapping[Role, Alignment]
    directions: list[Direction]


@dataclass(frozen=True, kw_only=True)
class Align(Step[Sides, Aligned, AlignmentReport]):
    """Both ways between two vocabularies.

    sides: reads them. method: of the maps; None: the one that measures best, each way. again_by: the command that makes
    it again. warns: when the maps are made, of a teacher that can hardly reach its student; whose: before each warning;
    by_map: whether models learn by the maps.
    """

    sides: Callable[[], Sides]
    method: Method | None
    again_by: Command
    whose: str = ""
    warns: bool = True
    by_map: bool = True

    def open(self) -> Sides:
        """Read both vocabularies, and rows."""
        return self.sides()

    def look(self, opened: Sides, again: bool) -> AlignmentReport | None:
        """The report on these vocabularies and rows, if all that it names is there and whole."""
        [folder] = self.publishes
        if again or not folder.exists():
            return None
        found = read_report(folder, self.again_by)
        changed = [
            f"the {role.upper()}'s tokenizer"
            for role, one in opened.vocabularies.items()
            if role not in found.vocabularies or found.vocabularies[role].sha256 != one.sha256
        ]
        changed += ["the rows"] * (found.rows_sha256 != opened.rows_sha256)
        changed += ["--method"] * (found.asked != self.method)
        if changed:
            message = f"{self.workspace.shown(folder)} was made from other inputs; changed since: {', '.join(changed)}"
            raise Refused(message, where=folder, mend=self.again_by)
        return found

    def compute(self, opened: Sides, again: bool) -> Aligned:
        """Map each way by every method, and measure what that is worth."""
        read = {role: opened.read(role) for role in ROLES}
        alignments, directions = {}, []
        for roles in WAYS:
            teacher, student = (opened.vocabularies[role] for role in roles)
            self.report(Event("stage", f"align: the {roles[0].upper()} to the {roles[1].upper()}"))
            mapped = {method: mapping(teacher, student, self.report) for method, mapping in MAPPINGS.items()}
            measured = figures.measure(read[roles[0]], read[roles[1]], mapped) if opened.rows else None
            directions.append(figures.direction_of(roles, (teacher, student), mapped, measured, self.method))
            alignments[roles[0]] = mapped[directions[-1].method]
        return Aligned(alignments, directions)

    def publish(self, opened: Sides, computed: Aligned, over: Over) -> AlignmentReport:
        """Write vocabularies, maps and report as one folder."""
        [folder] = self.publishes
        held = opened.vocabularies
        contents = {f"vocabulary-{role}.safetensors": vocabulary_bytes(held[role]) for role in ROLES}
        for teacher, student in WAYS:
            content = alignment_bytes(computed.alignments[teacher], held[teacher], held[student])
            contents[_map_name(teacher, student)] = content
        made = AlignmentReport(
            format=figures.FORMAT,
            asked=self.method,
            rows_sha256=opened.rows_sha256,
            vocabularies={role: figures.figures_of(held[role]) for role in ROLES},
            directions=computed.directions,
            files={name: reading.sha256(content) for name, content in contents.items()},
        )
        contents[ALIGNMENT_REPORT] = reading.json_bytes(made.model_dump())
        writing.publish(folder, contents, over=over[folder])
        writing.write_log(self.log, [{"inputs": {"rows": opened.rows_sha256}} | made.as_json()])
        if self.warns:
            self._warn(made)
        return made

    def _warn(self, made: AlignmentReport) -> None:
        """Of what a teacher can hardly reach."""
        for one in made.directions:
            reached = one.usable if self.by_map or one.measured is None else one.measured.coverage
            if reached is not None and reached < USABLE:
                words = (
                    f"{self.whose}at {100 * reached:.0f} % of answer positions only, the {one.teacher.upper()} reaches"
                )
                self.report(Event("warning", f"{words} what the {one.student.upper()} predicts: it can teach little"))
            if one.measured and one.measured.left_out:
                words = f"{one.measured.left_out} rows are left out: a tokenizer does not give them back byte for byte"
                self.report(Event("warning", f"{self.whose}{words}"))


def read_report(folder: Path, again_by: Command) -> AlignmentReport:
    """The report in a folder. Raises Damaged unless it, and all that it names, is as it was written."""
    path = folder / ALIGNMENT_REPORT
    told: dict[str, Any] = reading.read_json(path)[0]
    try:
        found = AlignmentReport.model_validate(told)
    except ValidationError as error:
        raise Damaged(f"{path.name} is not a report of align", where=path, mend=again_by) from error
    for name, digest in found.files.items():
        if reading.sha256(reading.read(folder / name, limit_bytes=LARGEST_VOCABULARY_BYTES)) != digest:
            raise Damaged(f"{name} has been changed since it was written", where=folder / name, mend=again_by)
    return found


def read_map(folder: Path, teacher: Role, vocabularies: Mapping[Role, Vocabulary]) -> Alignment:
    """The map by which the other model learns from a teacher. Raises Damaged as parse_alignment does."""
    student: Role = "slm" if teacher == "llm" else "llm"
    path = folder / _map_name(teacher, student)
    content = reading.read(path, limit_bytes=LARGEST_VOCABULARY_BYTES)
    return parse_alignment(content, path, vocabularies[teacher], vocabularies[student])


def _map_name(teacher: Role, student: Role) -> str:
    return f"map-{teacher}-to-{student}.safetensors"
