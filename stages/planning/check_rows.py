"""check-rows: all that is wrong or odd in rows of one's own, at once, and a mended copy of them.

Reads files of rows and, where they are here, the SLM's tokenizer and the questions that are scored; loads no weights.
With fix it writes NAME.mended.jsonl beside a file, and never the file itself. Of a row's text nothing is told but its
answer, where a file has few different ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.bases import base_folders
from stages.data.rows import Row, is_doubly_spaced, is_unspaced, parsed_lines
from stages.files import reading, writing
from stages.planning import row_checks
from stages.planning.row_checks import MARK, Lengths, Opened, Remark, Source
from stages.runtime.errors import NotReady, Problem, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.models.tuned import Outline

DAMAGED = 4
"""The exit code where training would refuse a file."""


@dataclass(frozen=True)
class Checked:
    """What was found in one file.

    rows: how many can be read. lengths: None without a tokenizer. answers: how often each stands there, None where they
    are many. mended: the copy, and mends: what was done for it.
    """

    path: Path
    rows: int
    remarks: list[Remark]
    lengths: Lengths | None = None
    answers: dict[str, int] | None = None
    mended: Path | None = None
    mends: list[str] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether training would refuse it."""
        return any(one.level == "FAIL" for one in self.remarks)

    def as_json(self, workspace: Workspace) -> dict[str, Any]:
        """For JSON; paths from the workspace."""
        said = asdict(self) | {"path": workspace.shown(self.path), "is_refused": self.is_refused}
        return said | {"mended": workspace.shown(self.mended) if self.mended else None}


def check_rows(
    workspace: Workspace,
    *,
    files: Sequence[Path] = (),
    client: int | None = None,
    fix: bool = False,
    report: Report = ignore,
) -> list[Checked]:
    """Every file of rows that is here, or these files, or those of one client, each with all that was found.

    Raises NotReady where there is none, and Refused where a mended copy would replace another one.
    """
    report(Event("stage", "check-rows"))
    each = [_open(source) for source in _sources(workspace, files, client)]
    opened = [one for one in each if isinstance(one, Opened)]
    prompts = _questions(workspace, report)
    readers = {client: _reader(workspace, client, report) for client in {one.source.client for one in opened}}
    found = []
    for one in each:
        if isinstance(one, Checked):
            found.append(one)
            continue
        made = _checked(workspace, one, opened, prompts, readers[one.source.client])
        found.append(_mend(made, one) if fix else made)
    return found


def _sources(workspace: Workspace, files: Sequence[Path], client: int | None) -> list[Source]:
    agreement = workspace.agreement
    own, public = agreement.client_training.max_length, agreement.distillation.max_length
    if client is not None:
        workspace.check_client(client)
    for path in files:
        require(path, f"{path.name} is not there", "name a file of JSON lines")
    if files:
        return [Source(path, client, own) for path in files]
    clients = workspace.clients if client is None else [client]
    places = [Source(workspace.client_data(k), k, own) for k in clients]
    if agreement.federation.learns_in_public:
        places += [Source(workspace.public_data(k), k, public, unlabelled=True) for k in clients]
    if client is None:
        places += [Source(workspace.auxiliary_data, None, public, unlabelled=True)]
        places += [Source(workspace.held_out_data, None, public)]
    here = [source for source in places if source.path.exists()]
    if not here:
        raise NotReady("there are no rows here", where=places[0].path, mend="put JSONL rows there, or name a file")
    return here


def _open(source: Source) -> Opened | Checked:
    """A file's lines, or all that can be said of one that is no text."""
    try:
        content = reading.read_own(source.path)
        return Opened(source, content, parsed_lines(content, source.path, unlabelled=source.unlabelled))
    except Problem as problem:
        return Checked(source.path, 0, [Remark("FAIL", f"{problem.message}; {problem.mend}")])


def _questions(workspace: Workspace, report: Report) -> set[str]:
    """The prompts that are scored; none, with a note, where their data is not here."""
    from stages.data import tasks

    names = workspace.agreement.evaluation.tasks or workspace.agreement.data.tasks
    try:
        with base_folders.offline():
            return {prompt for task in tasks.load(workspace, names) for prompt in tasks.test_prompts(task)}
    except (Problem, OSError, *tasks.MISTAKES):  # evaluate says it
        report(Event("note", "not compared with the questions that are scored: these cannot be read here"))
        return set()


def _reader(workspace: Workspace, client: int | None, report: Report) -> Outline | None:
    """The tokenizer that reads a party's rows, and the longest sequence that its model takes; None if not here."""
    from stages.models.loading import Models

    at = workspace if client is None else workspace.of_client(client)
    try:
        with base_folders.offline():
            return Models(at).outline("slm")
    except Problem as problem:
        whose = "the server's rows" if client is None else f"client {client}'s rows"
        report(Event("note", f"{whose} are not counted in tokens: {problem.message}"))
        return None


def _checked(
    workspace: Workspace, one: Opened, every: Sequence[Opened], prompts: set[str], reader: Outline | None
) -> Checked:
    lengths, remarks = None, [*row_checks.of_lines(one)]
    if reader:
        is_skipped = workspace.agreement.data.too_long == "skip"
        lengths, too_long = row_checks.of_lengths(one, reader, is_skipped=is_skipped)
        remarks += too_long
    remarks += [*row_checks.of_repeats(one), *row_checks.of_spacing(one), *row_checks.of_tests(one, prompts)]
    public = [workspace.auxiliary_data, *map(workspace.public_data, workspace.clients)]  # the same rows by design
    for other in every:
        if other is not one and not (one.source.path in public and other.source.path in public):
            remarks += row_checks.of_others(one, other, workspace.shown(other.source.path))
    return Checked(one.source.path, len(one.rows), remarks, lengths, row_checks.answers_of(one))


# --- mending


def _mend(made: Checked, one: Opened) -> Checked:
    """Write a mended copy, if there is anything that can be mended without knowing what was meant."""
    repeats = set(row_checks.repeated(one.rows))
    mends, kept = dict[str, int](), list[str]()

    def count(what: str) -> None:
        mends[what] = mends.get(what, 0) + 1

    if one.content.startswith(MARK):
        count("byte order mark taken out")
    for number, (line, row) in enumerate(one.lines, 1):
        plain = line.removesuffix("\r")
        if plain != line:
            count("line ends made Unix's")
        if not plain.strip():
            count("empty lines taken out")
        elif number in repeats:
            count("repeated rows taken out")
        elif isinstance(row, Row) and row.completion is not None and is_unspaced(row.prompt, row.completion):
            count("spaces put before completions")
            kept.append(_respaced(plain, row.prompt, f" {row.completion}"))
        elif isinstance(row, Row) and row.completion is not None and is_doubly_spaced(row.prompt, row.completion):
            count("spaces before completions made one")
            kept.append(_respaced(plain, row.prompt.rstrip(" "), f" {row.completion.lstrip(' ')}"))
        else:
            kept.append(plain)
    if not mends:
        return made
    copy = made.path.with_name(f"{made.path.stem}.mended.jsonl")
    content = "".join(f"{line}\n" for line in kept).encode()
    if copy.exists() and reading.read_own(copy) != content:
        raise Refused(f"{copy.name} is there already, with other rows", where=copy, mend="move it away")
    writing.write(copy, content)
    return replace(made, mended=copy, mends=[f"{what} ({many})" for what, many in mends.items()])


def _respaced(line: str, prompt: str, completion: str) -> str:
    """A row's line with these texts; its other keys stay."""
    return json.dumps(json.loads(line) | {"prompt": prompt, "completion": completion}, ensure_ascii=False)
