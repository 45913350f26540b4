"""Rows that were dealt from tasks or files which have been edited since, and public rows that others have not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from stages.artefacts.public_rows import of_other_rows, told_sha256
from stages.artefacts.records import own_evaluation, read_result
from stages.artefacts.subjects import is_of_another, is_subject, scored_by
from stages.data.split_file import Split, decides_the_deal, read_split
from stages.files import reading
from stages.runtime.errors import Problem
from stages.runtime.events import Event, Report
from stages.workspace import edits, listing
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, ZERO_SHOT, round_of
from stages.workspace.paths import Workspace

PREPARE = Command("prepare")


def dealt(workspace: Workspace) -> Split | None:
    """What `prepare` says of its dealing; None where it dealt nothing."""
    try:
        return read_split(workspace)
    except Problem:
        return None


def edited_since_dealt(workspace: Workspace, split: Split | None) -> str:
    """What was edited since `prepare` dealt the rows, in words: its tasks or files, or settings of the deal; or "".

    Of an earlier version's deal, or where no copy of its agreement is here, that is not known.
    """
    if split is None:
        return ""
    agreed = split.get("agreement_sha256", workspace.agreement_sha256)
    keys = "" if agreed == workspace.agreement_sha256 else edits.among(workspace, agreed, decides_the_deal)
    if keys:
        return f"{AGREEMENT} was edited ({keys})"
    return "its tasks, or files, were edited" if _are_sources_edited(workspace, split) else ""


def dealt_before(edited: str) -> str:
    """That in a sentence."""
    return f"prepare dealt the rows before {edited}"


def _are_sources_edited(workspace: Workspace, split: Split) -> bool:
    named = split.get("sources_sha256")
    if not named:
        return False
    try:
        names = workspace.agreement.data.tasks
        return not (named == workspace.sources_sha256() or (names and workspace.has_tasks(named, names)))
    except FileNotFoundError:  # rows need their source no more
        return False
    except (Problem, OSError):
        return True


def warn_of_stale_rows(workspace: Workspace, report: Report) -> None:
    """Tell of training on rows that `prepare` dealt from what was edited since."""
    if edited := edited_since_dealt(workspace, dealt(workspace)):
        report(Event("warning", f"{dealt_before(edited)}: {PREPARE} tells whether the rows change"))


def stale(workspace: Workspace) -> Iterator[tuple[Path, str, Command]]:
    """Each result that is of other questions, settings or adapters than lie here now: its path, why, and the mend.

    Damaged ones are left to `faults`; of an adapter that is not here nothing is said.
    """
    has_tasks = functools.cache(functools.partial(_has_tasks, workspace))
    for path in listing.results(workspace):
        name = path.parent.name
        round = round_of(name)
        if (round is None and name != ZERO_SHOT) or not is_subject(path.stem):
            continue
        try:
            result = read_result(path)
        except (Problem, OSError):
            continue
        why = []
        if not has_tasks(result.get("tasks_sha256")):
            why.append("tasks/, or data that it names, was edited since")
        if result.get("agreement_sha256") != workspace.agreed_in(round):
            why.append(f"{AGREEMENT} was edited since")
        elif result.get("evaluation") != own_evaluation(workspace):
            why.append("it was scored by other settings of evaluation")
        if is_of_another(workspace, round, path.stem, result.get("manifest_sha256")):
            why.append("the adapter is another one now")
        if why:
            yield path, "; ".join(why), scored_by(round, path.stem)


def other_public_rows(workspace: Workspace) -> Iterator[str]:
    """Each party that has told how it reads other public rows than its copy here, or else any copy here, holds.

    At a client no other client is looked at, since it learns from none.
    """
    copies = {k: place for k in (None, *workspace.clients) if (place := workspace.public_data(k)).exists()}
    if not (copies and workspace.agreement.federation.server_tells):
        return
    digests: dict[Path, str] = {}
    for k in (None, *(workspace.clients if None in copies else copies)):
        place = copies.get(k) or next(iter(copies.values()))
        try:
            told = told_sha256(workspace.vocabulary(k))
            here = digests.get(place) or reading.sha256(reading.read_own(place))
        except (Problem, OSError):  # it is not there; or whoever reads it says what is wrong with it
            continue
        digests[place] = here
        if told and told != here:
            problem = of_other_rows(workspace, k, place, told, here)
            yield f"{problem.message}: {problem.mend}"


def _has_tasks(workspace: Workspace, sha256: str) -> bool:
    try:
        return workspace.has_tasks(sha256, workspace.scored_tasks)
    except (Problem, OSError):
        return False
