"""init --agreement and init --invite: one party's own folder.

Writes fedcollm.toml, byte for byte, machine.toml, README.md, .gitignore, tasks/, evaluation.toml where there is one,
and an empty folder for the party's rows: in a folder aside that is renamed when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.exchange.invites import ANOTHER, Invite, read_invite
from stages.federation.party_readme import agreed, readme
from stages.files import reading, seclusion, writing
from stages.files.seen_places import Place
from stages.parties.names import of
from stages.planning.missing import Missing
from stages.runtime.errors import Problem, Refused, UsageProblem
from stages.workspace import shipped_tasks, task_files
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command
from stages.workspace.init import check_outside
from stages.workspace.names import AGREEMENT, EVALUATION, MACHINE, MODEL_CARD
from stages.workspace.party_files import IGNORE, IGNORED, machine_toml
from stages.workspace.paths import Workspace
from stages.workspace.settings import clipped, parse

MOST_UPDATES = 1_000_000
"""Clients times rounds: `status` looks at each, and an agreement that has more of them is a mistake, or malice."""
MOST_NAMED = 8
"""Files that one line names before it counts them."""


@dataclass(frozen=True)
class Joined:
    """A party's folder. fingerprint: of the invitation that it was made from; is_compared: with what was read out."""

    path: Path
    party: str
    agreement_sha256: str
    agreed: list[tuple[str, str]]
    next_command: Command
    rows: list[str]
    missing: list[Missing] = field(default_factory=list)
    fingerprint: str | None = None
    is_compared: bool = False

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        missing = [{"what": one.what, "mend": one.mend} for one in self.missing]
        return {
            "path": str(self.path),
            "party": self.party,
            "agreement_sha256": self.agreement_sha256,
            "agreed": dict(self.agreed),
            "rows": self.rows,
            "missing": missing,
            "next_command": str(self.next_command),
            "fingerprint": self.fingerprint,
            "is_compared": self.is_compared,
        }


@dataclass(frozen=True)
class _Given:
    """What a folder is made from. place: where it came from; tasks: files by their names below tasks/."""

    place: Path
    agreement: bytes
    tasks: Mapping[str, bytes]
    evaluation: bytes | None = None
    invite: Invite | None = None


def join_by_agreement(folder: Path, agreement: Path, client: int | None) -> Joined:
    """Make a party's folder from fedcollm.toml, and from tasks/ and evaluation.toml beside it.

    client: its number; None: the server. Raises NotReady for a file that is not there, UsageProblem for an agreement
    that is none or has no such client, Refused for a folder that is not empty, or lies in a workspace.
    """
    if not agreement.is_file():
        raise reading.not_there(agreement)
    content = reading.read_own(agreement)
    tasks = Workspace(agreement.parent).tasks
    reading.check_plain(tasks)
    found = task_files.own_files(tasks)
    if outside := [path for _, path in found if not path.is_relative_to(tasks)]:
        message = f"a task file includes {outside[0].name} from outside of tasks/"
        raise Refused(
            message, where=outside[0], mend="copy it into tasks/, and have the task file include it from there"
        )
    return _made(folder, _Given(agreement, content, {name: reading.read_own(path) for name, path in found}), client)


def join_by_invite(folder: Path, invite: Path, *, party: str | None = None, fingerprint: str | None = None) -> Joined:
    """Make the folder of the party that an invitation is for, if it is the one that the organiser has read out.

    party: for whom it must be, if that is said. Raises as join_by_agreement and read_invite do; Refused for task files
    that would run code.
    """
    opened = read_invite(invite, party=party, fingerprint=fingerprint)
    given = _Given(invite, opened.agreement, opened.tasks, opened.evaluation, opened.invite)
    made = _made(folder, given, opened.invite.client)
    return replace(made, fingerprint=opened.fingerprint, is_compared=fingerprint is not None)


def _made(folder: Path, given: _Given, client: int | None) -> Joined:
    agreement, sha256 = parse(Agreement, given.agreement, given.place), reading.sha256(given.agreement)
    if client is not None and client > agreement.federation.clients:
        message = f"there is no client {client}: the agreement has clients 1 to {agreement.federation.clients}"
        raise UsageProblem(message, where=given.place, mend="give one of those, or agree on more federation.clients")
    if (updates := agreement.federation.clients * agreement.federation.rounds) > MOST_UPDATES:
        message = f"the agreement has {clipped(str(updates))} updates of clients in all rounds, at most {MOST_UPDATES}"
        raise UsageProblem(f"{message} can be followed", where=given.place, mend="agree on fewer clients or rounds")
    check_outside(folder, received=given.place)
    _check_free(folder)
    with writing.publishing(folder, over=Place(folder), spares=_check_free) as draft:
        writing.write(draft / AGREEMENT, given.agreement)  # first: by it private/ is known, which others cannot read
        workspace = Workspace(draft)
        rows = _rows(workspace, client)
        for name, content in given.tasks.items():
            writing.write(workspace.tasks / name, content)
        if given.evaluation is not None:
            writing.write(draft / EVALUATION, given.evaluation)
        own = client is not None and agreement.of_client(client).slm != agreement.slm
        writing.write(draft / MACHINE, machine_toml(client, own_model=own))
        writing.write(draft / IGNORE, IGNORED.encode())
        shown = [workspace.shown(path) for path in rows]
        writing.write(draft / MODEL_CARD, readme(agreement, sha256, client, shown, given.invite))
        seclusion.make_folder(rows[0].parent)
        missing = list(_checked_tasks(workspace, given))
    next_command = Command("next", client=client, server=client is None)
    return Joined(folder, of(client), sha256, agreed(agreement, sha256, client), next_command, shown, missing)


def _check_free(folder: Path) -> None:
    """Raise Refused unless a folder can be made there."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise Refused(f"{folder.name} is there, and is no folder", where=folder, mend="choose another place")
    if any(folder.iterdir()):
        raise Refused(
            f"the folder {folder.name} is not empty", where=folder, mend="choose a folder that is not there yet"
        )


def _rows(workspace: Workspace, client: int | None) -> list[Path]:
    """Where a party's rows go."""
    if client is None:
        return [workspace.auxiliary_data]
    public = [workspace.public_data(client)] if workspace.agreement.federation.learns_in_public else []
    return [workspace.dealt_data(client), *public]


def _checked_tasks(workspace: Workspace, given: _Given) -> Iterator[Missing]:
    """What the agreement's tasks need that has not come. Raises Refused for what would run code, of an invitation.

    Task files that lie here already are refused where they are loaded, unless machine.toml trusts them.
    """
    if given.invite:
        try:
            task_files.check_are_data(workspace.tasks, workspace.root)
            others = {name for name, _ in task_files.own_files(workspace.tasks)} - {*given.tasks}
            if others:
                raise Refused(f"a task file includes {min(others)} from outside of tasks/", mend=ANOTHER)
        except Problem as problem:
            problem.where, problem.mend = given.place, ANOTHER
            raise
    names = [*workspace.agreement.data.tasks, *workspace.scored_tasks]
    for name in shipped_tasks.missing(workspace.tasks, names):
        mend = f"copy tasks/ from the organiser into this folder; it has {name}"
        yield Missing(f"tasks/: no file there defines {name}, nor does lm-eval", mend)
    if absent := task_files.absent_data(workspace.tasks, workspace.home):
        more = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
        files = ", ".join(name[:200] for name in absent[:MOST_NAMED])
        yield Missing(f"questions: {files}{more}", "only to score: have the organiser send them")
