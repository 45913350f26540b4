"""Results as people read them: tables and short texts made from what stages return."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from fedcollm_cli.console import duration
from fedcollm_cli.views import figures
from fedcollm_cli.views.sheets import Sheet, Tables
from fedcollm_cli.views.tables import comparison
from stages.parties.names import listed, number_of
from stages.runtime import texts
from stages.workspace.commands import Command

if TYPE_CHECKING:
    from stages.artefacts.records import Result, TaskScores
    from stages.data.split_file import Split
    from stages.demo.demo import Shown
    from stages.progress.status import Status
    from stages.progress.steps import Step

MOST_NAMED = 8
"""How many scores a line of `status` names before it counts the rest."""

LARGEST_IN_FULL = 1e4
"""From here on a score is shown with four digits and a power of ten."""

KINDS = {"client": "clients", "reveal": "reveals"}
KINDS |= {"vocabulary": "vocabularies", "trained": "trained", "knowledge": "knowledge", "slm": "slm"}
"""Steps of which each client takes one, and what their line of `status` is called."""

ELSEWHERE = "not on this machine"
CONDITIONS = ("done", "damaged", "stale", "missing", ELSEWHERE)
"""Of steps, in the order of a line of `status`."""

COLLECTING = {"aggregate", "llm"}
"""The steps that take what every client has sent."""


def split(summary: Split) -> Table:
    """What `prepare` dealt: rows, labels and sources per party."""
    dropped, in_test = summary["duplicates_dropped"], summary["also_in_test"]
    checked = "not compared with a test set" if in_test is None else f"{in_test} prompts are also in test"
    caption = f"{summary['rows']} rows, {dropped} duplicates dropped; {checked}"
    if unlabelled := summary["auxiliary"]["unlabelled"]:
        caption += f"; {unlabelled} of the server's rows are unlabelled"
    if "held_out" in summary:
        caption += f"; {summary['held_out']['rows']} more are held out for the gate"
    table = Table(title=f"split: {summary['split']}", caption=caption)
    for name in ("party", "rows", "answer labels", "sources"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for party, found in summary["parties"].items():
        table.add_row(party, str(found["rows"]), _counts(found["labels"]), _counts(found["sources"]))
    return table


def _counts(counts: dict[str, int]) -> str:
    return "  ".join(f"{name or '-'}: {count}" for name, count in counts.items())


def scores(results: list[Result]) -> Tables:
    """lm-eval's scores, a row for each model and task, a column for each metric."""
    rows = [(result, task, found) for result in results for task, found in result["tasks"].items()]
    metrics = [name for _, _, found in rows for name in found["metrics"] if not name.endswith("_stderr")]
    columns = ({"acc": "acc", "acc_stderr": "stderr"} if "acc" in metrics else {}) | {name: name for name in metrics}
    cells = [
        [
            result["subject"],
            task,
            "base" if result["round"] is None else str(result["round"]),
            asked(found),
            *map(_shown, map(found["metrics"].get, columns)),
        ]
        for result, task, found in rows
    ]
    sheet = Sheet("", ["model", "task", "round", "questions", *columns.values()], cells, named=2, left=2)
    return Tables([sheet], [], *figures.of_scores(results))


def _shown(value: float | None) -> str:
    """A score; a perplexity may have 25 digits before the point, of which the first four tell enough."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < LARGEST_IN_FULL else f"{value:.4g}"


def asked(found: TaskScores) -> str:
    """How many questions were scored, of how many if of fewer, and how many of them without their beginning."""
    number, in_all, cut = found["questions"], found["questions_in_all"], found["cut"]
    return f"{number}{f' of {in_all}' if number < in_all else ''}{f', {cut} cut' if cut else ''}"


def status(found: Status, workspace: Path | None, *, seconds_left: float | None = None) -> str:
    """A line for each step of each round that has begun; what the clients of a round send on one line."""
    lines = []
    width = 2 + max([9, *(len(step.name) for round in found.rounds for step in round.steps)])
    begun = [round for round in found.rounds if any(step.condition != "missing" or step.reason for step in round.steps)]
    for round in begun:
        waiting = {kind: [step for step in round.steps if _kind(step) == kind] for kind in KINDS}
        lines.append(f"round {round.number}")
        is_collected = any(step.name in COLLECTING and step.here for step in round.steps)
        for step in round.steps:
            kind = _kind(step)
            if not kind:
                reason = f"  ({step.reason})" if step.reason else ""
                lines.append(f"  {step.name:<{width}}{_condition(step)}{reason}")
            # Of clients that are elsewhere some steps are not seen, so that a later one may come first.
            while kind in waiting:
                due = next(iter(waiting))
                lines += _of_clients(due, waiting.pop(due), width, is_collected)
        for clients, left_out in ((round.unheard, "not learned from by the LLM"), (round.late, "not in the aggregate")):
            if clients:
                lines.append(f"  late, {left_out}: client {', '.join(map(str, clients))}")
    if len(begun) < len(found.rounds):
        first, last = len(begun) + 1, len(found.rounds)
        lines.append(f"round{f's {first} to' if first < last else ''} {last}: nothing yet")
    lines += [one.in_words for one in found.unfinished]
    if seconds_left:
        lines.append(f"about {duration(seconds_left)} of training left here, by what each step took last")
    if found.scores:
        conditions = {score.name: score.condition for score in found.scores}
        lines.append(f"scores of round {found.rounds[-1].number}: {_summary(conditions)}")
    if found.edited:
        lines.append(found.edited)
    lines += [f"stale: {one}" for one in found.stale]
    lines += [f"training would refuse {one}" for one in found.refused]
    lines += [f"changed since it was written: {one}" for one in found.changed]
    if found.not_covered:
        lines.append(f"not covered: {found.not_covered}")
    if found.unfit:
        lines.append(f"cannot go on: {found.unfit}")
    elif found.next_command:
        only = ", only where all parties have agreed on the edit" if found.edited else ""
        lines.append(f"next{only}: {found.next_command.also(workspace=workspace)}")
    elif found.waiting_for:
        lines.append(f"waiting for {found.waiting_for}")
    else:
        is_done = all(round.is_done for round in found.rounds)
        lines.append(_everything(found, workspace) if is_done else "this machine's part is done")
    return texts.lines(lines)


def _everything(found: Status, workspace: Path | None) -> str:
    """That all rounds are done, and which scores are not."""
    if not found.scores:
        return "everything is done; nothing is scored: neither evaluation.tasks nor data.tasks names a task"
    absent = [score for score in found.scores if score.condition != "done"]
    if not absent:
        return "everything is done"
    names = [score.name for score in absent[:MOST_NAMED]]
    more = f" and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
    first = absent[0].command.also(workspace=workspace)
    return f"everything is done but scores: {', '.join(names)}{more}; `{first}`{' and so on' if absent[1:] else ''}"


def _kind(step: Step) -> str:
    """What each client takes one of; empty for a step of the server's."""
    return next((kind for kind in KINDS if re.fullmatch(rf"{kind}-\d+", step.name)), "")


def _of_clients(kind: str, steps: Sequence[Step], width: int, is_collected: bool) -> list[str]:
    """One line for all clients' steps of a kind; below it those that something is wrong with."""
    if not steps:
        return []
    by_condition: dict[str, list[int]] = {condition: [] for condition in CONDITIONS}
    for step in steps:
        by_condition[step.condition if is_collected else _condition(step)].append(number_of(step.party))
    parts = [f"{listed(numbers)} {condition}" for condition, numbers in by_condition.items() if numbers]
    summary = f"{len(steps)} done" if len(by_condition["done"]) == len(steps) else "; ".join(parts)
    wrong = [f"    {one.name:<{width}}{one.condition}  ({one.reason})" for one in steps if one.reason]
    return [f"  {KINDS[kind]:<{width}}{summary}", *wrong]


def _condition(step: Step) -> str:
    """Another party's folder that is not here is not said to be missing: it may never come here."""
    is_elsewhere = step.condition == "missing" and not (step.here or step.reason)
    return ELSEWHERE if is_elsewhere else step.condition


def _summary(conditions: Mapping[str, str]) -> str:
    """How many scores are in which condition; naming those not done."""
    parts = []
    for condition, count in Counter(conditions.values()).items():
        names = [name for name, its in conditions.items() if its == condition]
        shown = ", ".join(names[:MOST_NAMED]) + (f" and {count - MOST_NAMED} more" if count > MOST_NAMED else "")
        parts.append(f"{count} {condition}" if condition == "done" else f"{count} {condition}: {shown}")
    return "; ".join(parts)


def demo(measured: Shown) -> Group:
    """The comparison, and where to look on."""
    lines = (
        f"guessing gives 25.0, knowing every rule of this world {measured.rule_accuracy:.1f}",
        f"base models: {measured.models}; the study: {measured.workspace}, with baselines/",
        f"the report: {measured.report}",
        f"error bars: cd {measured.workspace} && {Command('compare', seeds='1,2,3')}",
        f"look inside: cd {measured.workspace} && {Command('status')}",
    )
    return Group(comparison(measured.comparison).drawn(), *lines)
