"""A12, the server's optimiser: what it remembers is sound, and the adapter that a round goes on with follows from it.

Which average it was taken along is not known here: A12 looks from the broadcast and the state to the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stages.aggregation.optimizers import Keys, State, change_by
from stages.aggregation.server_state import read_state
from stages.artefacts.adapter_files import Tensors, layout_of
from stages.artefacts.publishing import keeps_old
from stages.audit.check_chain import parent_of
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder, Scope
from stages.audit.foreign_adapters import AnyAdapter
from stages.runtime.errors import Problem
from stages.workspace.names import ADAPTER_WEIGHTS, SERVER_STATE

A12 = Check("A12", "server")

FLOAT32 = np.finfo(np.float32)
ROUNDING, LEAST = 4 * float(FLOAT32.eps), float(FLOAT32.tiny)
"""Shares of theta and of the step, and what is near zero: they were cut to float32, and so was the state that the step
is computed from again."""


def state_of(folder: Folder, adapter: AnyAdapter | None, start: Tensors | None) -> Iterator[Finding]:
    """Of one aggregate. start: the broadcast of its round, if it is here."""
    manifest, agreement = folder.manifest, folder.scope.agreement
    if manifest is None or manifest.stage != "aggregate" or agreement is None:
        return
    settings, place = agreement.aggregation, folder.file(SERVER_STATE)
    if (SERVER_STATE in manifest.files) != (settings.server != "none"):
        has, expected = "no file", "one"
        if settings.server == "none":
            has, expected = expected, has
        yield A12.fail(place, f"{has} of what an optimiser remembers", f"{expected}, for server {settings.server}")
        return
    content = folder.contents.get(SERVER_STATE)
    if content is None or adapter is None or not adapter.is_finite:
        return  # A2, A3 and A4 say so
    try:
        state = read_state(content, Path(SERVER_STATE), settings.server, layout_of(adapter.tensors))
    except Problem as problem:
        yield A12.fail(place, problem.message, "what this optimiser remembers")
        return
    if start is None or layout_of(start) != layout_of(adapter.tensors):
        yield A12.skip("the broadcast of its round is not here, or not sound", where=folder.shown)
        return
    kept = keeps_old(manifest)
    if off := _off(start, adapter.tensors, None if kept else state, settings.server_keys):
        step = "the broadcast's, which is kept" if kept else f"a step of {settings.server} from the broadcast"
        yield A12.fail(folder.file(ADAPTER_WEIGHTS), f"{off} is another", step)
        return
    norms = {name: value for name, value in manifest.metrics.items() if name in ("delta_norm", "step_norm")}
    said = "no step: the old adapter is kept" if kept else f"a step of {settings.server}"
    yield A12.ok(said, where=folder.shown, measured=norms)


def _off(start: Tensors, found: Tensors, state: State | None, keys: Keys) -> str:
    """The first tensor that is not the broadcast's and the step, beyond rounding; without a state, there is no step."""
    for name, old in start.items():
        change = least = np.zeros(old.shape)
        if state:
            v = state.v[name].astype(np.float64) if name in state.v else None
            change = change_by(state.m[name].astype(np.float64), v, keys)
            least = change_by(np.full(old.shape, LEAST), v, keys) + LEAST
        if (np.abs(old + change - found[name]) > ROUNDING * (np.abs(old) + np.abs(change)) + least).any():
            return name
    return ""


def states_in_all(scopes: list[Scope], folders: list[Folder]) -> Iterator[Finding]:
    """That a round in which no step was taken remembers what the one before did; and how many were looked at."""
    ours = {folder.path: folder for folder in folders if folder.manifest}
    looked = [one for one in ours.values() if one.said.stage == "aggregate" and SERVER_STATE in one.said.files]
    for folder in looked:
        before = ours.get(parent_of(folder, "aggregate") or folder.path) if "aggregate" in folder.said.parents else None
        named = before.said.files.get(SERVER_STATE) if before else None
        if keeps_old(folder.said) and named and named.sha256 != folder.said.files[SERVER_STATE].sha256:
            yield A12.fail(folder.file(SERVER_STATE), "is another than that of the round before", "the same: no step")
    if not looked:
        if any(scope.agreement and scope.agreement.aggregation.server != "none" for scope in scopes):
            yield A12.skip("no aggregate is here")
        return
    yield A12.ok(f"{number_of(len(looked), 'aggregate')}: each is its broadcast and a step of what is remembered")
