"""What a party of FedMKT learns from in a round: the public rows, and what has arrived of others' knowledge of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.artefacts.reading import Artefact
from stages.artefacts.receiving import received
from stages.distillation.knowing import told_of
from stages.distillation.knowledge import Knowledge, parse_knowledge
from stages.distillation.lessons import Lesson, chosen, kind_of, lesson_of
from stages.distillation.pairs import Voice, pair_with, voice_of
from stages.distillation.public import Public
from stages.parties import names
from stages.parties.party import Party
from stages.runtime.errors import NotReady
from stages.runtime.events import Event, Report
from stages.workspace.commands import Command
from stages.workspace.names import KNOWLEDGE
from stages.workspace.paths import Workspace


class Taught(NamedTuple):
    """What others teach: a lesson from each, what it was made from, by name, and how the party itself reads."""

    lessons: list[Lesson]
    parents: dict[str, str]
    own: Voice


def told_by(party: Party, round: int, client: int | None, public: Public, voice: Voice) -> tuple[Knowledge, Artefact]:
    """What another party (None: the server) has told of the public rows in a round. Raises as received does."""
    name, folder = names.of(client), party.workspace.knowledge(round, client)
    share = Command("share-knowledge", client=client, server=client is None, round=round)
    where = f"{share}" + ("" if party.name == name else f", at {names.said(name)}; then carry exchange/ here")
    missing = f"what {names.said(name)} knows in round {round} is not there", where
    found = received(folder, by=party, stage="share-knowledge", round=round, client=client, missing=missing)
    expected = told_of(party.workspace, public, voice)
    return parse_knowledge(found.contents.pop(KNOWLEDGE), folder / KNOWLEDGE, voice.cuts, expected), found


def from_clients(server: Party, round: int, public: Public, report: Report) -> Taught:
    """A lesson from each client that has told what it knows. Raises NotReady where too few have."""
    here = sorted(server.workspace.sent_by_clients(round))
    _check_enough(server.workspace, here, round, report)
    own = voice_of(server, None, public)
    lessons: list[Lesson] = []
    parents: dict[str, str] = {}
    for client in here:
        pair = pair_with(server, client, public, report, own=own)
        knowledge, found = told_by(server, round, client, public, pair.other)
        kind = kind_of(server.workspace.agreement.distillation.divergence)
        lessons.append(lesson_of(names.client(client), knowledge, pair, kind))
        parents |= {names.client(client): found.sha256, f"vocabulary-{names.client(client)}": pair.other.sha256}
    return Taught(lessons, parents | {"vocabulary-server": own.sha256}, own)


def from_server(client: Party, round: int, public: Public, report: Report) -> Taught:
    """The lesson of the server's LLM; a fixed one told it in round 1."""
    pair = pair_with(client, client.number, public, report)
    knowledge, found = told_by(client, client.workspace.told_in(round), None, public, pair.other)
    kind = kind_of(client.workspace.agreement.distillation.divergence)
    lesson = lesson_of(names.SERVER, knowledge, pair, kind)
    vocabularies = {"vocabulary-server": pair.other.sha256, f"vocabulary-{client.name}": pair.own.sha256}
    return Taught([lesson], {names.SERVER: found.sha256, **vocabularies}, pair.own)


def _check_enough(workspace: Workspace, here: Sequence[int], round: int, report: Report) -> None:
    """Raise NotReady, naming the absent, unless enough clients have told what they know."""
    absent = [client for client in workspace.clients if client not in here]
    needed = workspace.agreement.aggregation.min_clients or len(workspace.clients)
    if len(here) < needed:
        who = f"client {', '.join(map(str, absent))}"
        message = f"{len(here)} of {len(workspace.clients)} clients have told what they know, {needed} are needed"
        share = Command("share-knowledge", client=absent[0], round=round)
        mend = f"{share}, at that client; then carry exchange/ here. aggregation.min_clients says how many are enough"
        raise NotReady(f"{message}; absent: {who}", where=workspace.knowledge(round, absent[0]), mend=mend)
    if absent:
        report(Event("warning", f"the LLM learns without client {', '.join(map(str, absent))}"))


def choose(
    workspace: Workspace, own: np.ndarray, lessons: Sequence[Lesson], student: str, report: Report
) -> tuple[list[np.ndarray], dict[str, float]]:
    """How much each lesson counts at each row, and in how many rows, told and for the manifest.

    own: the student's losses. Says aloud where a teacher teaches nothing, or nobody teaches.
    """
    select = workspace.agreement.distillation.select
    shares = chosen(own, {lesson.teacher: lesson.losses for lesson in lessons}, select)
    rows = int((~np.isnan(own)).sum())
    won = {teacher: int((share > 0).sum()) for teacher, share in shares.items()}
    told = ", ".join(f"{count} from {names.said(who)}" for who, count in won.items())
    report(Event("note", f"{student} learns of {rows} rows: {told}"))
    nothing = [who for who, count in won.items() if not count]
    if not any(won.values()) and won:
        report(Event("warning", f"nobody teaches {student} anything: it knows each row better; answers alone train it"))
    elif nothing and select == "min-ce":
        who = ", ".join(map(names.said, nothing))
        report(Event("warning", f"{who} knew no row best, and teaches {student} nothing in this round"))
    return list(shares.values()), {f"rows_from_{who}": float(count) for who, count in won.items()}
