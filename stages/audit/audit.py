"""audit: what an auditor asks of a workspace, an exchange or one adapter, and what was found.

Reads every file of what it is given, strictly, and nothing else; writes nothing and loads no model. A damaged file is
a finding, never an end.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.artefacts.adapter_files import Layout, Tensors, layout_of, part_of
from stages.audit.check_chain import chain, manifest_of
from stages.audit.check_clients import A6, clients_of
from stages.audit.check_encryption import hidden_of, sums_of
from stages.audit.check_files import files_between, files_of
from stages.audit.check_knowledge import knowledge_of, told_in_all
from stages.audit.check_layout import A3, layout_of_adapter, layout_of_capture, same_layout
from stages.audit.check_leaks import Words, leaks_between, leaks_of
from stages.audit.check_numbers import A5, drift_of, numbers_in_all, numbers_of
from stages.audit.check_optimizer import state_of, states_in_all
from stages.audit.check_privacy import privacy_of
from stages.audit.check_residual import residuals_in_all
from stages.audit.check_secagg import rounds_of
from stages.audit.check_secrets import secrets_in, secrets_of, vaults_of
from stages.audit.check_signatures import A1
from stages.audit.checks import Finding, count, told
from stages.audit.eras import in_eras
from stages.audit.folders import Folder, Scope, open_folder, scope_of
from stages.audit.foreign_adapters import AnyAdapter, parse_weights, tensors_if_sound
from stages.audit.heard import Heard
from stages.audit.parts import factors_of
from stages.files import reading
from stages.runtime.errors import NotReady, Problem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.averaging import Factors
from stages.workspace.commands import Command
from stages.workspace.layout import broadcast_in
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS


@dataclass
class Audit:
    """What is looked at, and what is remembered of each folder once its bytes are gone.

    folders: those that concern the client that was asked for, or all. beside: the others, to compare with.
    eras: the scopes, and those that were forked also as they were before.
    layouts: of each adapter that can be read; finite: those without NaN and infinity.
    start: the broadcast of the round that is being looked at. heard: what parties of FedMKT have told.
    """

    scopes: list[Scope]
    eras: list[Scope]
    client: int | None
    words: Words
    folders: list[Folder] = field(default_factory=list)
    beside: list[Folder] = field(default_factory=list)
    layouts: dict[Path, Layout] = field(default_factory=dict)
    finite: set[Path] = field(default_factory=set)
    start: tuple[Path, Tensors | None] | None = None
    heard: Heard = field(default_factory=Heard)


def audit(
    paths: Sequence[Path], *, client: int | None = None, canaries: Sequence[str] = (), report: Report = ignore
) -> list[Finding]:
    """Every finding of every check, in the order of the checks.

    paths: workspaces, exchanges, rounds or adapter folders. client: what concerns this one alone. canaries: strings
    that no byte that travels may hold. Raises UsageProblem for a path that is not there, and for a client that no
    federation among them has; NotReady for a workspace in which nothing was exchanged.
    """
    scopes = [scope_of(path) for path in paths]
    eras = list(in_eras(scopes))
    state = Audit(scopes, [scope for scope, _ in eras], client, words_of_this_machine(canaries))
    for scope in state.scopes:
        if client is not None and scope.agreement is not None and scope.workspace is not None:
            scope.workspace.check_client(client)
    found: dict[str, list[Finding]] = {id: [] for id in CHECKS}
    report(Event("stage", "audit"))
    for scope in state.eras:
        if scope.agreement is None and scope not in scopes:
            found["A1"].append(A1.skip("no copy is here of the agreement that held until the fork"))
    places = [(scope, path) for scope, paths in eras for path in paths]
    for number, (scope, path) in enumerate(places, 1):
        folder = open_folder(path, scope)
        if scope.concerns(path, client):
            _look(state, folder, found)
        else:
            state.beside.append(folder.closed())
            _adapter(state, folder)
        report(Event("step", folder.shown, step=number, total=len(places)))
    for id, check in CHECKS.items():
        found[id] += check.whole(state, found[id])
    findings = [finding for id in CHECKS for finding in told(found[id])]
    if not places and not any(count(findings, level) for level in ("FAIL", "WARN")):
        _check_exchanged(state.scopes)
    return findings


def _check_exchanged(scopes: Sequence[Scope]) -> None:
    """Raise NotReady for workspaces in which no file was exchanged, so that no check looked at anything."""
    exchanges = [scope.exchanged for scope in scopes if scope.is_workspace]
    if len(exchanges) == len(scopes) and not any(path.is_file() for top in exchanges for path in top.rglob("*")):
        message = "nothing has been exchanged yet: nothing was checked"
        mend = f"audit it after the first step; {Command('status')} names that"
        raise NotReady(message, where=exchanges[0], mend=mend)


def _look(state: Audit, folder: Folder, found: dict[str, list[Finding]]) -> None:
    """Every check of one folder, while its bytes are in memory."""
    adapter, problem = _adapter(state, folder)
    if problem:
        found["A3"].append(A3.fail(folder.shown, problem, "an adapter that can be read"))
    for id, check in CHECKS.items():
        found[id] += check.each(state, folder, adapter)
    state.folders.append(folder.closed())


def _adapter(state: Audit, folder: Folder) -> tuple[AnyAdapter | None, str]:
    """Its adapter, or why it cannot be read; neither where it is not there, which A2 says."""
    weights, settings = folder.contents.get(ADAPTER_WEIGHTS), folder.contents.get(ADAPTER_CONFIG)
    if weights is None:
        return None, ""
    try:
        adapter = parse_weights(weights, folder.path / ADAPTER_WEIGHTS)
    except Problem as problem:
        return None, problem.message
    broken = ""
    try:
        adapter = replace(adapter, config=reading.parse_json(settings) if settings is not None else {})
    except (ValueError, RecursionError) as error:
        broken = f"{ADAPTER_CONFIG} is not valid JSON: {error}"
    state.layouts[folder.path] = layout_of(adapter.tensors)
    if adapter.is_finite:
        state.finite.add(folder.path)
    return adapter, broken


def words_of_this_machine(canaries: Sequence[str] = ()) -> Words:
    """What no file that travels may hold: this user's and this machine's names, and the words that people gave."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user that the system has no name for
        user = ""
    return Words(user, socket.gethostname().partition(".")[0], tuple(canaries))


def _start(state: Audit, folder: Folder) -> Tensors | None:
    """The broadcast of the round that an SLM's adapter is of, unless it is that itself; one is kept at a time."""
    manifest, workspace = folder.manifest, folder.scope.workspace
    if manifest is None or manifest.role != "slm" or folder.place is None or manifest.stage == "broadcast":
        return None
    path = workspace.broadcast(manifest.round) if workspace else broadcast_in(folder.path.parent)
    if state.start is None or state.start[0] != path:
        state.start = path, tensors_if_sound(path, folder.scope)
    return state.start[1]


def _numbers(state: Audit, folder: Folder, adapter: AnyAdapter | None) -> Iterable[Finding]:
    return numbers_of(folder, adapter, _start(state, folder)) if adapter else ()


def _drift(state: Audit, found: list[Finding]) -> Iterator[Finding]:
    for scope in state.eras:
        if scope.sends_no_adapter:
            yield A5.skip("nothing is averaged: every model is trained by itself")
            continue
        yield from drift_of([folder for folder in state.folders if folder.scope is scope])


def _clients(state: Audit, found: list[Finding]) -> Iterator[Finding]:
    for scope in state.eras:
        if scope.agreement and scope.agreement.aggregation.is_hidden:
            mode, holder = scope.agreement.aggregation.mode, scope.agreement.aggregation.key_holder
            nobody = f"nobody but client {holder}" if holder else "nobody"
            yield A6.skip(f"{mode} mode: {nobody} sees a single client's update")
            continue
        if scope.sends_no_adapter:
            yield A6.skip("no update travels: clients tell what they know of public rows, see A11")
            continue
        if scope.agreement and scope.agreement.keep:
            yield A6.skip("sparse updates, in which each client sends other numbers, are not compared")
            continue
        if scope.agreement and scope.agreement.ranks:
            others = ", ".join(scope.agreement.ranks)
            yield A6.skip(f"client {others}: of a smaller rank, whose A and B compare with nobody's")
        sound = [one for one in state.folders + state.beside if one.scope is scope and one.path in state.finite]
        try:
            yield from clients_of(_of_one_layout(state, sound), state.client)
        except Problem as problem:  # it was sound a moment ago
            yield A6.fail(scope.shown(Path(problem.where or "")), f"changed during the audit: {problem.message}")


def _of_one_layout(state: Audit, folders: list[Folder]) -> dict[Path, tuple[Folder, Factors]]:
    """Those with the layout of their broadcast, or the part of it that is sent; A3 tells of the others."""
    trained = ("client-train", "client-distill")  # of FedMKT the second alone lies beside a broadcast
    found = {}
    for folder in folders:
        layout, start = state.layouts[folder.path], state.layouts.get(broadcast_in(folder.path.parent), {})
        factors = factors_of(folder, layout)
        if folder.manifest and folder.manifest.stage in trained and layout == part_of(start, factors):
            found[folder.path] = folder, factors
    return found


def _rounds(state: Audit, found: list[Finding]) -> Iterator[Finding]:
    for scope in state.eras:
        every = [folder for folder in state.folders + state.beside if folder.scope is scope]
        is_encrypted = scope.agreement is not None and scope.agreement.aggregation.key_holder is not None
        yield from (sums_of if is_encrypted else rounds_of)(scope, every)


def _privacy(state: Audit, found: list[Finding]) -> Iterator[Finding]:
    for scope in state.eras:
        yield from privacy_of(scope, [one for one in state.folders if one.scope is scope], state.client)


def _told(state: Audit, found: list[Finding]) -> Iterator[Finding]:
    for scope in state.eras:
        ours = [folder for folder in state.folders if folder.scope is scope and folder.manifest]
        yield from told_in_all(scope, ours, state.heard)


def _secrets(state: Audit, found: list[Finding]) -> Iterator[Finding]:
    for scope in state.scopes:
        yield from secrets_in(scope, [folder for folder in state.folders if folder.scope is scope])
        if scope.workspace and scope.agreement and scope.is_workspace:
            yield from vaults_of(scope.workspace)


Each = Callable[[Audit, Folder, AnyAdapter | None], Iterable[Finding]]
Whole = Callable[[Audit, list[Finding]], Iterable[Finding]]


def _nothing(state: Audit, folder: Folder, adapter: AnyAdapter | None) -> Iterable[Finding]:
    return ()


@dataclass(frozen=True)
class Looks:
    """How one check looks. whole: at all together, given what was found of each. each: at one folder."""

    whole: Whole
    each: Each = _nothing


CHECKS: dict[str, Looks] = {
    "A1": Looks(
        lambda state, found: chain(state.folders, state.scopes, state.client),
        lambda state, folder, _: manifest_of(folder),
    ),
    "A2": Looks(
        lambda state, found: files_between(state.folders, state.scopes, state.client),
        lambda state, folder, _: files_of(folder),
    ),
    "A3": Looks(
        lambda state, found: same_layout(state.layouts, state.folders),
        lambda state, folder, adapter: layout_of_adapter(folder, adapter) if adapter else layout_of_capture(folder),
    ),
    "A4": Looks(lambda state, found: numbers_in_all(found), _numbers),
    "A5": Looks(_drift),
    "A6": Looks(_clients),
    "A7": Looks(
        lambda state, found: leaks_between(state.folders, state.scopes, state.client, state.words),
        lambda state, folder, _: leaks_of(folder, state.words),
    ),
    "A8": Looks(_secrets, lambda state, folder, _: secrets_of(folder)),
    "A9": Looks(_rounds, lambda state, folder, _: hidden_of(folder)),
    "A10": Looks(_privacy),
    "A11": Looks(_told, lambda state, folder, _: knowledge_of(folder, state.heard)),
    "A12": Looks(
        lambda state, found: states_in_all(state.scopes, state.folders),
        lambda state, folder, adapter: state_of(folder, adapter, _start(state, folder)),
    ),
    "A13": Looks(lambda state, found: residuals_in_all(state.scopes, state.folders)),
}
"""Every check by its number; another one is another line."""
