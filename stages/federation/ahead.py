"""run --dry-run: the commands that `run` stands for, in their order, each as a line to paste. Does nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.federation.jobs import check_sound
from stages.federation.run import bases_scored, check_edits, scored_after
from stages.parties import names
from stages.parties.enrolment import enrolment
from stages.progress.rounds import Reader
from stages.progress.steps import Round, Step
from stages.runtime.errors import NotReady
from stages.workspace.commands import Command
from stages.workspace.methods import Compared
from stages.workspace.paths import Workspace

CLOSES = " || [ $? = 3 ]"
"""Behind the aggregate that closes a round: it ends with 3, since clients have to reveal."""


def ahead(
    workspace: Workspace,
    *,
    folder: Path | None = None,
    method: Compared | None = None,
    rounds: range | None = None,
    scores: bool = True,
    each_round: bool = True,
    client_scores: bool = True,
    overwrite: bool = False,
) -> list[str]:
    """What is not done yet, or with overwrite all, as run has its options; each line ends well where run would.

    folder: the workspace as the command named it, if it did; then each line names it. Raises Refused for what is
    damaged or stale, which run would not replace either, and NotReady for a method whose workspace is not there yet.
    """
    is_derived = workspace.home != workspace.root
    if method and method != workspace.agreement.federation.method:
        workspace, is_derived = _derived(workspace, method), True
        folder = workspace.root
    rounds = rounds or range(1, workspace.agreement.federation.rounds + 1)
    for number in (rounds[0], rounds[-1]):
        workspace.check_round(number)
    if not overwrite:
        check_edits(workspace, rounds[-1])
    lines = _Lines(workspace, folder, overwrite)
    found = list(lines.enrolled()) if workspace.agreement.aggregation.is_hidden else []
    scores = scores and bool(workspace.scored_tasks)
    if scores and not is_derived:
        found += lines.scored(None, bases_scored(workspace))
    reader = Reader(workspace, verify=False)
    for round in [reader.round(number) for number in range(1, rounds[-1] + 1)][rounds[0] - 1 :]:
        made = lines.made(round)
        found += made
        is_last = round.number == rounds[-1]
        if scores and (each_round or is_last):
            are_asked = (client_scores and is_last) or not workspace.agreement.averages
            clients = lines.trained(round) if are_asked else []
            found += lines.scored(round.number, scored_after(workspace, clients), anew=bool(made))
    return found


def _derived(workspace: Workspace, method: Compared) -> Workspace:
    from stages.study import variants

    folder, changes = variants.baseline(workspace, method)
    made_by = Command("run", method=method)
    try:
        return variants.open_variant(workspace, folder, changes, made_by=made_by)
    except NotReady as problem:
        problem.mend = f"{made_by} makes it; then --dry-run tells what is left"
        raise


@dataclass(frozen=True)
class _Lines:
    """Lines for one workspace. folder: see ahead. again: whether all is made again."""

    workspace: Workspace
    folder: Path | None
    again: bool

    def enrolled(self) -> Iterator[str]:
        """Keys of each client here, the roster, and joining it by the fingerprint that enroll prints."""
        here = [k for k in self.workspace.clients if self.workspace.client_data(k).exists()]
        waiting = {k: enrolment(self.workspace, names.client(k)) for k in here}
        for k, (command, _) in waiting.items():
            if self.again or command:
                yield self._line(Command("keys", client=k, renew=self.again))
        if self.again or any(enrolment(self.workspace, names.SERVER)):
            yield self._line(Command("enroll", renew=self.again))
        fingerprint = f'"$({self._line(Command("enroll"))})"'
        for k in here:
            if self.again or any(waiting[k]):
                yield f"{self._line(Command('join', client=k))} --fingerprint {fingerprint}"

    def made(self, round: Round) -> list[str]:
        """The steps of a round that are to be taken, each command once where it makes two folders."""
        if not self.again:
            check_sound(self.workspace, round)
        due = [step for step in round.steps if (self.again or step.condition != "done") and self._is_taken(step)]
        lines: list[str] = []
        for step in due:
            is_again = self.again and step.command.verb != "reveal"
            command = Command(step.command.verb, **{**step.command.options, "overwrite": is_again})
            line = self._line(command) + (CLOSES if step.name == "close" else "")
            if line not in lines[-1:]:
                lines.append(line)
        if told := [step for step in due if step.name.startswith("vocabulary-")]:
            lines.insert(len(told), self._line(Command("align", server=True)))  # it has met all clients then
        return lines

    def trained(self, round: Round) -> list[int]:
        """The clients whose own models there are after a round."""
        here = [k for k in self.workspace.clients if self.workspace.client_data(k).exists()]
        return sorted({*here, *self.workspace.client_adapters(round.number)})

    def scored(self, round: int | None, what: Sequence[dict[str, Any]], *, anew: bool = False) -> list[str]:
        """The scores that are missing; all, of adapters that are to be made anew."""
        of: dict[str, Any] = {"zero_shot": True} if round is None else {"round": round}
        return [
            self._line(Command("evaluate", **of, **one, overwrite=self.again))
            for one in what
            if self.again or anew or not self.workspace.result(round, _subject(one)).exists()
        ]

    def _is_taken(self, step: Step) -> bool:
        """Not what a client elsewhere has sent, nor, where a quorum is enough, what it has not."""
        return step.here or (step.condition == "missing" and self.workspace.agreement.aggregation.min_clients is None)

    def _line(self, command: Command) -> str:
        return str(command.also(workspace=self.folder))


def _subject(one: dict[str, Any]) -> str:
    return str(one["model"]) if "model" in one else names.client(one["client"])
