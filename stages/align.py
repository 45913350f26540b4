"""align: what two tokenizers have in common, byte for byte, before any model of theirs is loaded.

Reads the tokenizers and configurations of both bases, no weights, and rows that are here: the server's auxiliary.jsonl,
or else the clients' train.jsonl. Writes private/server/alignment: both vocabularies as bytes, a map each way, and
report.json; and the log private/server/align.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from stages.artefacts.steps import Over, Step
from stages.data.rows import Row, read_rows
from stages.files import reading, writing
from stages.parties.party import Party
from stages.runtime.errors import Damaged, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import ALIGNMENT_REPORT
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES, Role

if TYPE_CHECKING:
    from stages.artefacts.vocabulary_files import Vocabulary
    from stages.distillation.alignment import Alignment, Method
    from stages.distillation.alignment_figures import AlignmentReport, Direction
    from stages.models.tuned import Outline

MOST_ROWS = 1000
"""Rows that are measured on, the first of what is here: some thousand answer positions are enough for a share."""
WAYS: tuple[tuple[Role, Role], ...] = (("llm", "slm"), ("slm", "llm"))
"""Teacher and student."""


def align(
    workspace: Workspace, *, method: Method | None = None, overwrite: bool = False, report: Report = ignore
) -> AlignmentReport:
    """Map the two vocabularies of a workspace on each other, both ways, measure and publish the maps.

    method: of the maps; by default the one that measures best, each way. Raises UsageProblem for a tokenizer that
    cannot be aligned.
    """
    return Align(
        party=Party.server(workspace),
        publishes=[workspace.alignment],
        log=workspace.alignment.with_name("align.jsonl"),
        overwrite=overwrite,
        report=report,
        method=method,
    ).take()


class Opened(NamedTuple):
    """Both models without their weights, their vocabularies, and the rows to measure on."""

    outlines: Mapping[Role, Outline]
    vocabularies: Mapping[Role, Vocabulary]
    rows: list[Row]
    rows_sha256: str


class Aligned(NamedTuple):
    """The maps by teacher, and the figures of each way."""

    alignments: Mapping[Role, Alignment]
    directions: list[Direction]


@dataclass(frozen=True, kw_only=True)
class Align(Step[Opened, Aligned, "AlignmentReport"]):
    """Both ways between two vocabularies."""

    method: Method | None

    def open(self) -> Opened:
        """Read both vocabularies, and rows."""
        from stages.models.loading import Models
        from stages.models.token_bytes import vocabulary_of

        self.report(Event("stage", "align: read the vocabularies"))
        models = Models(self.workspace)
        outlines = {role: models.outline(role) for role in ROLES}
        vocabularies = {
            role: vocabulary_of(one.tokenizer, one.vocabulary, f"the {role.upper()}") for role, one in outlines.items()
        }
        return Opened(outlines, vocabularies, *_rows_here(self.workspace))

    def look(self, opened: Opened, again: bool) -> AlignmentReport | None:
        """The report on these vocabularies and rows, if all that it names is there and whole."""
        [folder] = self.publishes
        if again or not folder.exists():
            return None
        found = _read(folder)
        changed = [
            f"the {role.upper()}'s tokenizer"
            for role, one in opened.vocabularies.items()
            if role not in found.vocabularies or found.vocabularies[role].sha256 != one.sha256
        ]
        changed += ["the rows"] * (found.rows_sha256 != opened.rows_sha256)
        changed += ["--method"] * (found.asked != self.method)
        if changed:
            message = f"{self.workspace.shown(folder)} was made from other inputs; changed since: {', '.join(changed)}"
            raise Refused(message, where=folder, mend=Command("align", method=self.method, overwrite=True))
        return found

    def compute(self, opened: Opened, again: bool) -> Aligned:
        """Map each way by every method, and measure what that is worth."""
        from stages.distillation import alignment_figures as figures
        from stages.distillation.alignment import MAPPINGS

        self.report(Event("stage", f"align: read {len(opened.rows)} rows"))
        read = {
            role: figures.read_by(opened.vocabularies[role], one.tokenizer, opened.rows, self.report)
            for role, one in opened.outlines.items()
        }
        alignments, directions = {}, []
        for roles in WAYS:
            teacher, student = (opened.vocabularies[role] for role in roles)
            self.report(Event("stage", f"align: the {roles[0].upper()} to the {roles[1].upper()}"))
            mapped = {method: mapping(teacher, student, self.report) for method, mapping in MAPPINGS.items()}
            measured = figures.measure(read[roles[0]], read[roles[1]], mapped) if opened.rows else None
            directions.append(figures.direction_of(roles, (teacher, student), mapped, measured, self.method))
            alignments[roles[0]] = mapped[directions[-1].method]
        return Aligned(alignments, directions)

    def publish(self, opened: Opened, computed: Aligned, over: Over) -> AlignmentReport:
        """Write vocabularies, maps and report as one folder."""
        from stages.artefacts.vocabulary_files import vocabulary_bytes
        from stages.distillation import alignment_figures as figures
        from stages.distillation.alignment_files import alignment_bytes

        [folder] = self.publishes
        held = opened.vocabularies
        contents = {_vocabulary_name(role): vocabulary_bytes(held[role]) for role in ROLES}
        for teacher, student in WAYS:
            content = alignment_bytes(computed.alignments[teacher], held[teacher], held[student])
            contents[_map_name(teacher, student)] = content
        made = figures.AlignmentReport(
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
        return made

    def end(self, opened: Opened, made: AlignmentReport, again: bool) -> AlignmentReport:
        """Warn of what a teacher can hardly reach."""
        from stages.distillation.alignment_figures import USABLE

        for one in made.directions:
            if one.usable is not None and one.usable < USABLE:
                words = f"at {100 * one.usable:.0f} % of answer positions only, the {one.teacher.upper()} reaches"
                self.report(Event("warning", f"{words} what the {one.student.upper()} predicts: it can teach little"))
            if one.measured and one.measured.left_out:
                words = f"{one.measured.left_out} rows are left out: a tokenizer does not give them back byte for byte"
                self.report(Event("warning", words))
        return made


def _rows_here(workspace: Workspace) -> tuple[list[Row], str]:
    """The first labelled rows that are here, and the digest of the files; the server's, or else the clients'."""
    auxiliary = workspace.auxiliary_data
    paths = [auxiliary] if auxiliary.exists() else [workspace.client_data(k) for k in workspace.clients]
    found = [read_rows(path, unlabelled=path == auxiliary) for path in paths if path.exists()]
    rows = [row for rows, _ in found for row in rows if row.completion is not None]
    return rows[:MOST_ROWS], reading.sha256("".join(digest for _, digest in found).encode())


def _read(folder: Path) -> AlignmentReport:
    """The report in a folder. Raises Damaged unless it, and all that it names, is as it was written."""
    from stages.artefacts.sizes import LARGEST_VOCABULARY_BYTES
    from stages.distillation.alignment_figures import AlignmentReport

    path = folder / ALIGNMENT_REPORT
    told: dict[str, Any] = reading.read_json(path)[0]
    mend = Command("align", overwrite=True)
    try:
        found = AlignmentReport.model_validate(told)
    except ValidationError as error:
        raise Damaged(f"{path.name} is not a report of align", where=path, mend=mend) from error
    for name, digest in found.files.items():
        if reading.sha256(reading.read(folder / name, limit_bytes=LARGEST_VOCABULARY_BYTES)) != digest:
            raise Damaged(f"{name} has been changed since it was written", where=folder / name, mend=mend)
    return found


def _vocabulary_name(role: Role) -> str:
    return f"vocabulary-{role}.safetensors"


def _map_name(teacher: Role, student: Role) -> str:
    return f"map-{teacher}-to-{student}.safetensors"
