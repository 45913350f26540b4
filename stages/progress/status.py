"""status: what is done, missing, damaged or stale, from the files alone, and the next command on this machine.

Reads manifests and file sizes; with verify, every byte, and whatever else was written with a digest. Loads no model and
writes nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from stages.artefacts import records
from stages.artefacts.reading import Manifests
from stages.bases import one_tokenizer
from stages.files import reading
from stages.parties.enrolment import enrolment, only_party, other_tasks
from stages.parties.names import SERVER, number_of
from stages.progress import damage, in_public, staleness
from stages.progress.refused import refused_rows
from stages.progress.rounds import Reader
from stages.progress.staleness import PREPARE, dealt_before
from stages.progress.steps import Round, Step, awaited
from stages.progress.unfinished import Unfinished, unfinished
from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace import edits
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, MANIFEST
from stages.workspace.paths import Workspace

SIMULATES = "simulation = true in machine.toml, where one person plays all parties"


@dataclass(frozen=True)
class Score:
    """What lm-eval said of one model after the last round: of "slm", "llm", "aggregate" or "client 2"."""

    name: str
    condition: Literal["done", "missing"]
    command: Command


@dataclass(frozen=True)
class Status:
    """All rounds, and what to do next: a literal command, or what this machine waits for."""

    rounds: list[Round]
    next_command: Command | None
    waiting_for: str
    scores: list[Score] = field(default_factory=list)
    edited: str = ""
    """That the agreement is another than what is here was made under: which keys, and what to do first; or empty."""
    unfit: str = ""
    """Why the models here cannot be trained together, so that nothing comes next; or empty."""
    changed: list[str] = field(default_factory=list)
    """With verify: results, logs, rows, checkpoints, keys and secrets that are not as they were written."""
    stale: list[str] = field(default_factory=list)
    """Rows and results that are of other tasks, settings or adapters than lie here now, and parties with other public
    rows: why, and what mends it."""
    refused: list[str] = field(default_factory=list)
    """Files of rows that training would refuse: what is wrong first, and the mend."""
    unfinished: list[Unfinished] = field(default_factory=list)
    """Trainings that have begun and not ended."""
    not_covered: str = ""
    """With verify: what nothing was held against."""

    @property
    def is_damaged(self) -> bool:
        """Whether anything is not as it was written."""
        return bool(self.changed) or any(step.condition == "damaged" for one in self.rounds for step in one.steps)

    def as_json(self, workspace: Path | None) -> dict[str, Any]:
        """For JSON, with commands as lines to type. workspace: the folder that was asked for, if by its name."""
        command = self.next_command
        rounds = [asdict(round) | {"steps": [_with_line(step) for step in round.steps]} for round in self.rounds]
        return asdict(self) | {
            "next_command": str(command.also(workspace=workspace)) if command else "",
            "rounds": rounds,
            "scores": [_with_line(score) for score in self.scores],
        }


def _with_line(made: Step | Score) -> dict[str, Any]:
    return asdict(made) | {"command": str(made.command)}


def status(
    workspace: Workspace, *, verify: bool = False, party: str | None = None, manifests: Manifests | None = None
) -> Status:
    """The state of a workspace, as this machine sees it.

    party: whose next step is wanted, "server" or "client-2"; by default that of any party on this machine.
    manifests: those that this command has read.
    """
    reader = Reader(workspace, verify, manifests)
    rounds = [reader.round(number) for number in range(1, workspace.agreement.federation.rounds + 1)]
    of_others = list(staleness.stale(workspace))
    stale = [f"{workspace.shown(path)}: {why} ({mend})" for path, why, mend in of_others]
    if edited_since := reader.edited_since_dealt:
        said = dealt_before(edited_since)
        stale.insert(0, f"{workspace.shown(workspace.split)}: {said} ({PREPARE} tells whether the rows change)")
    stale += staleness.other_public_rows(workspace)
    scores = _scores(workspace, rounds[-1].number, [path for path, *_ in of_others])
    command, waiting_for = _next(workspace, rounds, party, edited_since, scores)
    if (others := other_tasks(workspace)) and others not in waiting_for:
        stale.append(others)
    is_done = all(round.is_done for round in rounds)
    unfit = "" if is_done else _unfit(workspace)
    refused = [] if is_done else list(refused_rows(workspace))
    command, waiting_for = (None, "") if unfit else (command, waiting_for)
    told = edited(workspace, reader.other_agreements)
    begun = unfinished(workspace)
    found = Status(rounds, command, waiting_for, scores, told, unfit, stale=stale, refused=refused, unfinished=begun)
    if not verify:
        return found
    faults = (*damage.faults(workspace), *damage.others(workspace))
    changed = [f"{workspace.shown(path)}: {what}" for path, what, _ in faults]
    return replace(found, changed=changed, not_covered=damage.NOT_COVERED)


def edited(workspace: Workspace, others: Counter[str]) -> str:
    """That fedcollm.toml was edited since these were made, counted by the digest of their agreement; "" if none."""
    if not others:
        return ""
    [(digest, _)] = others.most_common(1)
    count = "1 step" if others.total() == 1 else f"{others.total()} steps"
    which = edits.since(workspace, digest) or f"in what is not known here, compare its sha256 with {digest}"
    said = f"{AGREEMENT} was edited after {count} had been made under it: {which}"
    return f"{said}. Undo the edit first, or agree on it anew"


def _unfit(workspace: Workspace) -> str:
    """What one_tokenizer.check raises, in words; empty if nothing."""
    try:
        one_tokenizer.check(workspace)
    except UsageProblem as problem:
        return f"{problem.message}; {problem.mend}"
    return ""


def _next(
    workspace: Workspace, rounds: list[Round], party: str | None, edited_since: str, scores: list[Score]
) -> tuple[Command | None, str]:
    """The first command that this machine, or the party, can give now; or, where there is none, what it waits for."""
    parties = [workspace.client_data(k) for k in workspace.clients] + [workspace.auxiliary_data]
    if not any(path.exists() for path in parties):
        party = party or only_party(workspace)
        is_dealt = bool(workspace.agreement.data.tasks or workspace.agreement.data.files)
        if is_dealt and workspace.is_simulation and party is None:
            return PREPARE, ""
        return None, _rows_of(workspace, party) + (f", or {SIMULATES}" if is_dealt and party is None else "")
    if edited_since:
        return (PREPARE, "") if party is None else (None, f"{PREPARE}: {dealt_before(edited_since)}")
    before = enrolment(workspace, party)
    if any(before):
        return before
    for round in rounds:
        if round.is_done:
            continue
        is_closed = any(step.name == "close" and step.condition == "done" for step in round.steps)
        has_gone_on = os.path.lexists(workspace.broadcast(round.number + 1))
        for step in round.steps:
            is_asked = step.party == party if party else step.here
            is_over = has_gone_on or (is_closed and step.name == step.party)
            if step.condition == "done" or not is_asked or (is_over and step.condition == "missing" and _is_sent(step)):
                continue
            waiting_for = _missing_before(workspace, rounds, round, step) or _missing_rows(workspace, step)
            return (None, waiting_for) if waiting_for else (step.command, "")
    ended = [score for score in scores if score.name == _ended(workspace, rounds[-1].number).name]
    is_asked = party in (None, SERVER) and bool(ended) and ended[0].condition == "missing"
    return (ended[0].command if is_asked else None), ""


def _rows_of(workspace: Workspace, party: str | None) -> str:
    """Where a party's own rows belong; nobody else can bring them, and none are made up."""
    if party is None:
        return "data: private/client-k/train.jsonl at client k, private/server/auxiliary.jsonl at the server"
    place = workspace.auxiliary_data if party == SERVER else workspace.client_data(number_of(party))
    if place.is_symlink():
        return f"data of {party}: {reading.not_there(place).message}"
    return f"data of {party}: JSONL rows of its own, in {workspace.shown(place)}"


def _missing_rows(workspace: Workspace, step: Step) -> str:
    """Of a client's training, the rows, where they are not here."""
    is_training = step.party != SERVER and (step.name == step.party or step.name.startswith("trained-"))
    return "" if step.here or not is_training else _rows_of(workspace, step.party)


def _is_sent(step: Step) -> bool:
    """Whether it is what a client sends in a round: once the next has begun, that comes too late."""
    return step.party != SERVER and not step.name.startswith("vocabulary-")


def _missing_before(workspace: Workspace, rounds: list[Round], round: Round, step: Step) -> str:
    """What a step needs that is not there yet, in words; empty if it can be taken."""
    if workspace.agreement.federation.learns_in_public:
        return in_public.waits_for(workspace, rounds, round.number, step)
    by_name = {other.name: other for other in round.steps}
    updates = [other for other in round.steps if other.name == other.party]
    needed = ["broadcast", "close"] if step.name.startswith("reveal-") else ["broadcast"] if step in updates else []
    for before in [by_name[name] for name in needed if name in by_name]:
        if before.condition != "done":
            why = f": {before.reason}" if before.reason else ""
            return f"the {before.name} of round {round.number}, in exchange/{why}"
    is_hidden = "close" in by_name
    if step.name == ("close" if is_hidden else "aggregate"):
        return _missing_updates(workspace, round.number, updates)
    if step.name == "aggregate":
        reveals = [other for other in round.steps if other.name.startswith("reveal-")]
        asked = workspace.agreement.aggregation.reveals_needed(len(updates))
        missing = asked - sum(reveal.condition == "done" for reveal in reveals)
        absent = [number_of(reveal.party) for reveal in reveals if reveal.condition != "done"]
        if missing > 0:
            place = workspace.shown(workspace.reveal(round.number, absent[0]))
            return awaited("reveal", absent, missing, round.number, place)
    return ""


def _missing_updates(workspace: Workspace, number: int, updates: list[Step]) -> str:
    unsound = [update for update in updates if update.condition in ("damaged", "stale")]
    if unsound:
        first = unsound[0]
        return f"a sound update: {first.name} of round {number} is {first.condition}, {first.reason}"
    needed = min(workspace.agreement.aggregation.min_clients or len(updates), len(updates))
    missing = needed - sum(update.condition == "done" for update in updates)
    absent = [number_of(update.party) for update in updates if update.condition != "done"]
    if missing <= 0:
        return ""
    return awaited("update", absent, missing, number, workspace.shown(workspace.sent_by(number, absent[0])))


def _ended(workspace: Workspace, last: int) -> Path:
    """What the last round ends with at the server: the SLM, the average, or with FedMKT the LLM."""
    tunes_llm_alone = workspace.agreement.federation.clients_tell
    return workspace.llm(last) if tunes_llm_alone else workspace.round_result(last)


def _scores(workspace: Workspace, last: int, stale: list[Path]) -> list[Score]:
    """The scores of what the last round left on this machine: the server's models, and its own clients' SLMs."""
    agreement = workspace.agreement
    if not workspace.scored_tasks:
        return []
    federation, ended = agreement.federation, _ended(workspace, last)
    score = Command("evaluate", round=last)
    made = {ended.name: (ended, score.also(model=ended.name))}
    made |= {"llm": (workspace.llm(last), score.also(model="llm"))} if federation.distils else {}
    average = workspace.aggregate(last), score.also(model="aggregate")
    made |= {"aggregate": average} if agreement.averages and federation.clients_tell else {}
    own = [k for k in workspace.clients if workspace.client_data(k).exists()]
    made |= {f"client {k}": (workspace.client_adapter(last, k), score.also(client=k)) for k in own}
    return [
        _scored(workspace, name, last, stale, command)
        for name, (adapter, command) in made.items()
        if (adapter / MANIFEST).exists()
    ]


def _scored(workspace: Workspace, name: str, last: int, stale: list[Path], command: Command) -> Score:
    """Missing where it is not there, is damaged, or is another adapter's, another agreement's or of other questions."""
    result = workspace.result(last, name.replace(" ", "-"))
    if not result.exists():
        return Score(name, "missing", command)
    try:
        is_its = bool(records.read_result(result).get("tasks")) and result not in stale
    except Damaged:
        is_its = False
    return Score(name, "done", command) if is_its else Score(name, "missing", command.also(overwrite=True))
