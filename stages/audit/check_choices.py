"""Who teaches each public row, chosen again from what was told (DualMinCE), against what each manifest says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.audit.checks import Check, Finding
from stages.audit.folders import Folder, Scope
from stages.audit.heard import Heard, Voice
from stages.distillation.lessons import Select, chosen
from stages.parties.names import SERVER
from stages.workspace.names import CLIENT
from stages.workspace.paths import Workspace

OFF = {"float32": 1e-4, None: 2e-2}
"""How far, relative, the loss that a model has told may be off the one it finds when asked again, in other batches."""


@dataclass(frozen=True)
class Range:
    """How many rows a teacher can have won. is_told: whether that follows from what was told alone, to the bit."""

    least: int
    most: int
    is_told: bool = True

    @property
    def said(self) -> str:
        """Beside a number that it does not tell alone."""
        return "" if self.least == self.most else f" ({self.least} to {self.most}, by what was told)"


def choices_of(check: Check, scope: Scope, folders: list[Folder], heard: Heard) -> Iterator[Finding]:
    """Of one workspace: each model that learned from others here. Without a workspace none is known."""
    if scope.workspace is None or scope.agreement is None:
        return
    for folder in folders:
        of_llm = folder.said.stage == "co-distill" and scope.agreement.federation.clients_tell
        if not of_llm and folder.said.stage != "client-distill":
            continue
        found = (_of_llm if of_llm else _of_client)(scope.workspace, folder, heard)
        if isinstance(found, str):
            yield check.skip(f"who taught it: {found}", where=folder.shown)
            continue
        wrong = list(_against(check, folder, found))
        yield from wrong
        if not wrong:
            won = {name: folder.said.metrics[_metric(name)] for name in found}
            said = ", ".join(f"{won[name]:.0f} rows from {name}{rows.said}" for name, rows in found.items())
            yield check.ok(f"chosen again: {said}", where=folder.shown, measured=won)


def _against(check: Check, folder: Folder, found: Mapping[str, Range]) -> Iterator[Finding]:
    """What the manifest says otherwise: a failure, or only a warning where a model's own losses are not told."""
    for name, rows in found.items():
        told = folder.said.metrics.get(_metric(name))
        if told is not None and rows.least <= told <= rows.most:
            continue
        said = f"tells {_metric(name)} {'not' if told is None else f'{told:g}'}"
        expected = f"{rows.least}" if rows.least == rows.most else f"{rows.least} to {rows.most}"
        is_sure = rows.is_told or told is None
        yield (check.fail if is_sure else check.warn)(folder.shown, said, f"{expected}, by what was told")


def _metric(teacher: str) -> str:
    return f"rows_from_{teacher}"


def _of_client(workspace: Workspace, folder: Folder, heard: Heard) -> dict[str, Range] | str:
    """A client's: S_0 against its own S_k. Or why that is not known."""
    agreement, client = workspace.agreement, folder.said.client
    select = agreement.distillation.select
    told = _losses(workspace.knowledge(workspace.told_in(folder.said.round), None), SERVER, folder, heard)
    if agreement.federation.clients_tell:
        own = _losses(workspace.knowledge(folder.said.round, client), folder.said.party, folder, heard)
    elif select == "min-ce":
        return "with llm2slm no client tells how well it knows a row itself"
    else:
        own = _reads(workspace.vocabulary(client), heard)
    if told is None or own is None or len(told) != len(own):
        return "what it learned from, or what it knew, is not here, or is not sound"
    return _exactly(own, {SERVER: told}, select)


def _of_llm(workspace: Workspace, folder: Folder, heard: Heard) -> dict[str, Range] | str:
    """The LLM's: which client knows a row best follows from what was told; whether the LLM knows it better still, not.

    Its own losses are those that it told at the end of the round before, to rounding; before round 1 it told none.
    """
    select, round = workspace.agreement.distillation.select, folder.said.round
    numbers = sorted(int(found[1]) for name in folder.said.parents if (found := re.fullmatch(CLIENT, name)))
    told: dict[str, np.ndarray] = {}
    for number in numbers:
        name = f"client-{number}"
        losses = _losses(workspace.knowledge(round, number), name, folder, heard)
        if losses is None:
            return f"what {name} told is not here, or is not sound"
        told[name] = losses
    reads = _reads(workspace.vocabulary(None), heard)
    if not told or reads is None or any(len(one) != len(reads) for one in told.values()):
        return "what it learned from, or how it reads, is not here, or is not sound"
    if select != "min-ce":
        return _exactly(reads, told, select)
    most = _exactly(np.where(np.isnan(reads), np.nan, np.inf), told, select)
    before = heard.said.get(workspace.knowledge(round - 1, None)) if round > 1 else None
    is_it = before and before.folder.said.parents.get("llm") == folder.said.parents.get("llm")
    outside = {name for name, rows in most.items() if folder.said.metrics.get(_metric(name), np.inf) > rows.most}
    if outside or before is None or not is_it or len(before.losses) != len(reads):
        return {name: Range(0, rows.most) for name, rows in most.items()}
    off = OFF.get(folder.said.dtype, OFF[None]) * (1 + before.losses)
    fewest, at_most = (_exactly(before.losses + sign * off, told, select) for sign in (-1, 1))
    return {name: Range(fewest[name].least, at_most[name].most, is_told=False) for name in told}


def _exactly(own: np.ndarray, told: Mapping[str, np.ndarray], select: Select) -> dict[str, Range]:
    won = {name: int((share > 0).sum()) for name, share in chosen(own, told, select).items()}
    return {name: Range(count, count) for name, count in won.items()}


def _losses(place: Path, name: str, folder: Folder, heard: Heard) -> np.ndarray | None:
    """What was told in a folder, if it is the one that this one was made from; else A1 says so."""
    said = heard.said.get(place)
    return said.losses if said and said.folder.sha256 == folder.said.parents.get(name) else None


def _reads(place: Path, heard: Heard) -> np.ndarray | None:
    """0 for each row that a party reads, NaN for one that it leaves out."""
    voice = heard.voices.get(place)
    return np.where(voice.cuts.positions > 0, 0.0, np.nan) if isinstance(voice, Voice) else None
