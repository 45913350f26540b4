"""check-rows: all that is wrong or odd in rows of one's own, at once, and a mended copy of them.

Reads files of rows and, where they are here, the SLM's tokenizer and the questions that are scored; loads no weights.
With fix it writes NAME.mended.jsonl beside a file, and never the file itself. Of a row's text nothing is told but its
answer, where a file has few different ones.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.bases import base_folders
from stages.data.row_files import parsed_lines
from stages.data.rows import TEXT, Row
from stages.data.spacing import is_doubly_spaced, is_unspaced
from stages.files import reading, writing
from stages.planning import row_checks
from stages.planning.row_checks import MARK, Lengths, Opened, Remark, Source
from stages.runtime.errors import NotReady, Problem, Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.models.tuned import Outline
    from stages.workspace.settings import Role


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
    who = {(one.source.client, one.source.roles) for one in opened}
    readers = {(client, roles): _reader(workspace, client, roles, report) for client, roles in sorted(who, key=str)}
    found = []
    for one in each:
        if isinstance(one, Opened):
            reader = readers[one.source.client, one.source.roles]
            found.append(_checked(workspace, one, opened, prompts, reader))
        else:
            found.append(one)
    return _mended(found, each) if fix else found


def _sources(workspace: Workspace, files: Sequence[Path], client: int | None) -> list[Source]:
    if client is not None:
        workspace.check_client(client)
    for path in files:
        require(path, f"{path.name} is not there", "name a file of rows")
    places = [one for one in _places(workspace) if client is None or one.client == client]
    if files:
        known = {place.path.resolve(): place for place in places}
        other = Source(places[0].path, client, workspace.agreement.client_training.max_length)
        named = {path.resolve(): replace(other, path=path) for path in files}
        return [known.get(whole, one) for whole, one in named.items()]
    here = [source for source in places if source.path.exists()]
    if not here:
        raise NotReady("there are no rows here", where=places[0].path, mend="put rows there, or name a file")
    return here


def _places(workspace: Workspace) -> list[Source]:
    """Where rows of all parties lie, and what each party does with them."""
    federation, settings = workspace.agreement.federation, workspace.agreement.distillation
    own, public = workspace.agreement.client_training.max_length, settings.max_length
    places = [Source(workspace.client_data(k), k, own) for k in workspace.clients]
    is_enough = not workspace.agreement.needs_completions
    auxiliary = Source(workspace.auxiliary_data, None, public, unlabelled=True, is_enough=is_enough)
    if federation.learns_in_public:
        auxiliary = replace(auxiliary, roles=("llm",), is_left_out=True, texts=True)
        places += [
            replace(auxiliary, path=workspace.public_data(k), client=k, roles=("slm",)) for k in workspace.clients
        ]
    else:
        auxiliary = replace(auxiliary, roles=("slm", "llm"), is_left_out=settings.select == "min-ce")
    return [*places, auxiliary, Source(workspace.held_out_data, None, own)]


def _open(source: Source) -> Opened | Checked:
    """A file's lines, or all that can be said of one that is no text, or cannot be read."""
    try:
        content = reading.read_own(source.path)
        return Opened(
            source, content, parsed_lines(content, source.path, unlabelled=source.unlabelled, texts=source.texts)
        )
    except Problem as problem:
        return Checked(source.path, 0, [Remark("FAIL", f"{problem.message}; {problem.mend}")])
    except OSError as error:
        return Checked(source.path, 0, [Remark("FAIL", f"it cannot be read: {error.strerror or error}")])


def _questions(workspace: Workspace, report: Report) -> set[str]:
    """The prompts that are scored; none, with a note, where their data is not here."""
    from stages.data import tasks

    names = workspace.scored_tasks
    try:
        with base_folders.offline():
            return {prompt for task in tasks.load(workspace, names) for prompt in tasks.test_prompts(task)}
    except (Problem, OSError, *tasks.MISTAKES):  # evaluate says it
        report(Event("note", "not compared with the questions that are scored: these cannot be read here"))
        return set()


def _reader(workspace: Workspace, client: int | None, roles: tuple[Role, ...], report: Report) -> Outline | None:
    """The tokenizer that reads a party's rows, and the longest sequence that all its models take; None if not here."""
    from stages.models.loading import Models

    at = workspace if client is None else workspace.of_client(client)
    try:
        with base_folders.offline():
            outlines = [Models(at).outline(role) for role in roles]
    except Problem as problem:
        whose = "the server's rows" if client is None else f"client {client}'s rows"
        report(Event("note", f"{whose} are not counted in tokens: {problem.message}"))
        return None
    return replace(outlines[0], context=min(outline.context for outline in outlines))


def _checked(
    workspace: Workspace, one: Opened, every: Sequence[Opened], prompts: set[str], reader: Outline | None
) -> Checked:
    lengths, remarks = None, [*row_checks.of_lines(one)]
    if reader:
        is_skipped = workspace.agreement.data.too_long == "skip"
        lengths, too_long = row_checks.of_lengths(one, reader, is_skipped=is_skipped)
        remarks += too_long
    remarks += row_checks.of_unlabelled(one)
    remarks += [*row_checks.of_repeats(one), *row_checks.of_spacing(one), *row_checks.of_tests(one, prompts)]
    public = [workspace.auxiliary_data, *map(workspace.public_data, workspace.clients)]  # the same rows by design
    for other in every:
        if other is not one and not (one.source.path in public and other.source.path in public):
            remarks += row_checks.of_others(one, other, workspace.shown(other.source.path))
    return Checked(one.source.path, len(one.rows), remarks, lengths, row_checks.answers_of(one))


# --- mending


def _mended(found: Sequence[Checked], each: Sequence[Opened | Checked]) -> list[Checked]:
    """Write a mended copy of each file that has one. Nothing is written where any copy would replace another one."""
    mended = [
        _mend(made, one) if isinstance(one, Opened) and not one.is_table else (made, b"")
        for made, one in zip(found, each, strict=True)
    ]
    for made, content in mended:
        if made.mended and made.mended.exists() and reading.read_own(made.mended) != content:
            raise Refused(
                f"{made.mended.name} is there already, with other rows", where=made.mended, mend="move it away"
            )
    for made, content in mended:
        if made.mended:
            writing.write(made.mended, content)
    return [made for made, _ in mended]


def _mend(made: Checked, one: Opened) -> tuple[Checked, bytes]:
    """What a mended copy would hold, if there is anything that can be mended without knowing what was meant."""
    mends, kept = Counter[str](), list[str]()
    seen = set[tuple[str, str | None]]()
    mends["byte order mark taken out"] += one.content.startswith(MARK)
    for line, row in one.lines:
        plain = line.removesuffix("\r")
        mends["line ends made Unix's"] += plain != line
        if not isinstance(row, Row):
            mends["empty lines taken out"] += not plain.strip()
            kept += [plain] if plain.strip() else []
            continue
        pair, what = _spaced(row)
        if pair in seen:
            mends["repeated rows taken out"] += 1
            continue
        seen.add(pair)
        if what:
            mends[what] += 1
            plain = _with_texts(plain, {"prompt": pair[0], "completion": str(pair[1])})
        kept.append(plain)
    told = [f"{what} ({many})" for what, many in mends.items() if many]
    if not told or not kept:
        return made, b""
    copy = made.path.with_name(f"{made.path.name.removesuffix('.jsonl')}.mended.jsonl")
    return replace(made, mended=copy, mends=told), "".join(f"{line}\n" for line in kept).encode()


def _spaced(row: Row) -> tuple[tuple[str, str | None], str]:
    """Prompt and completion with one space between them, and what was done for it; nothing if they were well."""
    if row.form != TEXT:
        return (row.prompt, row.completion), ""
    if row.completion is not None and is_unspaced(row.prompt, row.completion):
        return (row.prompt, f" {row.completion}"), "spaces put before completions"
    if row.completion is not None and is_doubly_spaced(row.prompt, row.completion):
        return (row.prompt.rstrip(" "), f" {row.completion.lstrip(' ')}"), "spaces before completions made one"
    return (row.prompt, row.completion), ""


BETWEEN = re.compile(r"[ \t\r,:]*")
"""What stands between the keys and values of a JSON object on one line."""


def _with_texts(line: str, texts: Mapping[str, str]) -> str:
    """A row's line with these texts under their keys; all else stays to the letter."""
    decoder = json.JSONDecoder()
    start = end = line.index("{") + 1
    made = [line[:start]]
    while line[start := _after(line, end)] != "}":
        key, after = decoder.raw_decode(line, start)
        value = _after(line, after)
        _, last = decoder.raw_decode(line, value)
        told = json.dumps(texts[key], ensure_ascii=False) if key in texts else line[value:last]
        made.append(line[end:value] + told)
        end = last
    return "".join(made) + line[end:]


def _after(line: str, place: int) -> int:
    found = BETWEEN.match(line, place)
    return found.end() if found else place
