"""Workspaces derived from a workspace: another method, another seed, other settings, on the same models and data files.

A derived workspace is a whole one, in a folder of its own below the first: its fedcollm.toml is the first one's text
with a few keys changed, so that `diff` shows exactly what differs, and every command works inside it. Its machine.toml
says where it comes from (`home`): relative paths and tasks/ are meant from there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit

from stages.artefacts.reading import read_manifest
from stages.data.row_files import read_rows
from stages.data.rows import check_one_form, rows_bytes
from stages.data.split_file import decides_the_deal
from stages.files import reading, writing
from stages.files.seclusion import make_folder
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.study.of_fedavg import federation_of, part_of
from stages.study.taken_back import not_had_by
from stages.workspace.agreement import Agreement
from stages.workspace.budgets import Budget
from stages.workspace.changing import changed, set_key
from stages.workspace.commands import Command
from stages.workspace.methods import Compared
from stages.workspace.names import AGREEMENT, MACHINE
from stages.workspace.paths import Workspace
from stages.workspace.settings import parse

DERIVED = (
    "# Derived from another fedcollm.toml: `diff` shows the few keys that differ. Made again by the same command.\n"
)

Changes = Mapping[str, Any]
"""Settings by dotted key: {"federation.seed": 2}."""

WITHOUT: Mapping[Compared, Compared] = {
    "fedcollm": "fedavg-aux",
    "fedmkt": "standalone-public",
    "llm2slm": "standalone-public",
}
"""What a method is without distillation."""


class NotYetKnown(NotReady):
    """A baseline's settings hang on what the workspace's own federation has not found out yet."""


def baseline(workspace: Workspace, method: Compared) -> tuple[Path, Changes]:
    """Where another method on this workspace's data lives, and the settings that it changes.

    Raises NotReady or UsageProblem where this workspace cannot have it: centralized needs every party's data here, and
    a baseline has none of its own. Raises NotYetKnown where its own federation has to run before.
    """
    if workspace.is_baseline:
        there = Command("run", method=method, workspace=workspace.root.parents[1])
        raise UsageProblem("this is a baseline itself", where=workspace.root, mend=there)
    settings, federation = workspace.agreement.distillation, federation_of(method)
    if method in WITHOUT and not (settings.lambda_slm or settings.lambda_llm):
        mend = "set distillation.lambda_slm or lambda_llm in a study of its own, or leave it out with --methods"
        raise UsageProblem(f"{method} without distillation is {WITHOUT[method]}: both lambdas are 0 here", mend=mend)
    if federation.averages and (why := unlike(workspace.agreement)):
        mend = "leave it out; the methods for clients with models of their own are standalone, standalone-public, "
        message = f"{method} averages adapters of one model: {why}"
        raise UsageProblem(message, where=workspace.root / AGREEMENT, mend=f"{mend}llm2slm, fedmkt and centralized")
    alone = not federation.averages and workspace.agreement.aggregation.is_hidden
    changes: dict[str, Any] = {"federation.method": federation.method}
    changes |= {"aggregation.mode": "plain"} if alone else {}  # where nothing is averaged there is nothing to hide
    changes |= not_had_by(federation, workspace.agreement) | part_of(method, workspace.agreement)
    return workspace.baseline(method), changes | {
        "fedavg-aux": {"distillation.lambda_slm": 0.0, "distillation.lambda_llm": 0.0},
        "standalone-public": {"distillation.lambda_slm": 0.0, "distillation.lambda_llm": 0.0},
        "centralized": _centralized(workspace) if method == "centralized" else {},
    }.get(method, {})


def unlike(agreement: Agreement) -> str:
    """Why the clients' adapters cannot be averaged: whose model, or learning rate, is not that of all. Empty: they can.

    A client's table that says what holds for all makes no difference.
    """
    for client in range(1, agreement.federation.clients + 1):
        own = agreement.of_client(client)
        if str(client) in agreement.ranks:  # which the agreement says how to average
            own = own.model_copy(update={"slm": agreement.slm})
        if own.slm != agreement.slm:
            return f"client {client} has a model of its own, {own.slm.model}"
        if own != agreement:
            return f"client {client} has a learning rate of its own"
    return ""


def replica(workspace: Workspace, seed: int) -> tuple[Path, Changes]:
    """Where the same federation from another seed lives, and the setting that it changes."""
    return workspace.replica(seed), {"federation.seed": seed}


def _centralized(workspace: Workspace) -> dict[str, Any]:
    """One client that has everything and tunes the LLM, as long as co-distill would and with its settings.

    So all rows of the paper's Table 1 that train the LLM train it by equally many steps on equally large batches.
    """
    agreement = workspace.agreement
    settings = agreement.distillation
    for place in _all_data(workspace):
        if not place.exists():
            message = f"centralized needs every party's data on this machine; {workspace.shown(place)} is not here"
            raise UsageProblem(message, where=place, mend="leave it out: it simulates what the parties would not do")
    training = {key: getattr(settings, key) for key in Budget.model_fields} | {
        "epochs": None,
        "steps": _steps(workspace),
        "max_length": max(settings.max_length, agreement.client_training.max_length),
        "learning_rate": settings.llm_learning_rate,
        "max_grad_norm": settings.llm_max_grad_norm,
    }
    return {
        "federation.clients": 1,
        "aggregation.min_clients": None,
        "slm": agreement.llm.model_dump(),
        "clients": None,
    } | {f"client_training.{key}": value for key, value in training.items()}


def _steps(workspace: Workspace) -> int:
    """Optimiser steps of co-distill in one round. Raises NotYetKnown where only training can tell."""
    settings, federation = workspace.agreement.distillation, workspace.agreement.federation
    has_told = federation.clients_tell and workspace.llm(1).exists()
    if settings.epochs and (has_told or workspace.agreement.data.too_long == "skip"):
        if not workspace.llm(1).exists():
            message = 'how long centralized trains is known after round 1 alone: data.too_long = "skip" leaves rows out'
            mend = f"{Command('run')} first; or leave centralized out with --methods"
            raise NotYetKnown(message, where=workspace.llm(1), mend=mend)
        return read_manifest(workspace.llm(1))[0].steps  # how many rows are left only training knows
    rows, _ = read_rows(workspace.auxiliary_data, unlabelled=True)
    return settings.steps_for(sum(row.completion is not None or not federation.learns_in_public for row in rows))


def check_baseline(workspace: Workspace, method: Compared) -> None:
    """Raise what baseline does, or UsageProblem where its settings are no valid agreement."""
    check(workspace, baseline(workspace, method)[1])


def check(parent: Workspace, changes: Changes) -> None:
    """Raise UsageProblem, naming every mistake, unless the settings so changed are a valid agreement."""
    _agreement(parent, changes)


def open_variant(parent: Workspace, folder: Path, changes: Changes, *, made_by: Command) -> Workspace:
    """A derived workspace that is there. Raises NotReady if it is not, Refused if it is of other settings.

    made_by: the command that makes it, for the mend.
    """
    target = folder / AGREEMENT
    if not target.exists():
        raise NotReady(f"{parent.shown(folder)} is not there", where=folder, mend=made_by)
    if parse(Agreement, reading.read_own(target), target) != parse(Agreement, _agreement(parent, changes), target):
        message = f"{parent.shown(folder)} is of another agreement than {parent.shown(parent.root / AGREEMENT)} is now"
        mend = f"undo the edit of {AGREEMENT}, or {made_by.also(overwrite=True)}"
        raise Refused(message, where=target, mend=mend)
    return Workspace(folder, parent.flags)


def make_variant(
    parent: Workspace, folder: Path, changes: Changes, *, made_by: Command, overwrite: bool = False
) -> Workspace:
    """A derived workspace, made if it is not there, with the parent's data unless the changes deal it anew.

    Raises Refused rather than take one of other settings, unless overwrite says to set it anew; UsageProblem in a fork,
    where no run from round 1 under one agreement is beside it.
    """
    if (since := parent.agreement_of_all.federation.fork.round) is not None:
        message = f"this workspace is a fork, since round {since}: what begins at round 1 is no comparison with it"
        raise UsageProblem(message, where=parent.root / AGREEMENT, mend=f"in the study that was forked: {made_by}")
    target, agreement = folder / AGREEMENT, _agreement(parent, changes)
    is_there = target.exists() and not overwrite
    if is_there:
        open_variant(parent, folder, changes, made_by=made_by)
    writing.write(folder / MACHINE, _machine(parent, folder, changes))
    if not is_there:  # the same settings in another order of keys are the same agreement: its bytes stand in manifests
        writing.write(target, agreement)
    variant = Workspace(folder, parent.flags)
    if not deals_anew(parent, changes):
        _share_data(parent, variant)
    return variant


def deals_anew(parent: Workspace, changes: Changes) -> bool:
    """Whether the variant needs `prepare` of its own."""
    is_dealt = parent.split.exists() and "federation.method" not in changes
    return is_dealt and any(decides_the_deal(key) for key in changes)


def check_data(parent: Workspace, variant: Workspace, changes: Changes, *, made_by: Command) -> None:
    """Raise Refused unless the variant has the parent's rows, where it does not deal them anew."""
    if deals_anew(parent, changes):
        return
    shared = [*_all_data(parent), parent.held_out_data]
    expected = {variant.root / place.relative_to(parent.root): place for place in shared} | _public(parent, variant)
    is_pooled = variant.agreement.federation.method == "centralized"
    contents = (
        {variant.client_data(1): _pool(parent)}
        if is_pooled
        else {target: reading.read_own(place) for target, place in expected.items() if place.exists()}
    )
    for target, content in contents.items():
        if target.exists() and reading.read_own(target) != content:
            message = f"{parent.shown(target)} has other rows than {parent.shown(parent.private)} has now"
            raise Refused(message, where=target, mend=f"put those rows back, or {made_by.also(overwrite=True)}")


def _agreement(parent: Workspace, changes: Changes) -> bytes:
    path = parent.root / AGREEMENT
    content = (DERIVED + changed(reading.read_own(path).decode("utf-8-sig"), changes)).encode()
    parse(Agreement, content, path)
    return content


def _machine(parent: Workspace, folder: Path, changes: Changes) -> bytes:
    """The parent's settings of this machine, the same but for home, and for the LLM in the SLM's place."""
    path = parent.root / MACHINE
    document = tomlkit.parse(reading.read_own(path).decode("utf-8-sig") if path.exists() else "")
    document["home"] = os.path.relpath(parent.home, folder)
    document["home"].comment("derived from there: relative paths and tasks/ are meant from it")
    if "slm" in changes:
        set_key(document, ["models", "slm"], parent.machine.models.llm)
    return tomlkit.dumps(document).encode()


def _share_data(parent: Workspace, variant: Workspace) -> None:
    """Put the parent's rows where the variant's parties look for them; all of them at the one client of centralized."""
    if variant.agreement.federation.method == "centralized":
        writing.write(variant.client_data(1), _pool(parent))
        return
    for target, source in _public(parent, variant).items():
        _link(source, target)
    server = [parent.auxiliary_data, parent.held_out_data, parent.split]
    for place in [*map(parent.client_data, variant.clients), *server]:
        if place.exists():
            _link(place, variant.root / place.relative_to(parent.root))


def _public(parent: Workspace, variant: Workspace) -> dict[Path, Path]:
    """Where each of the variant's clients looks for the public rows, if its method has them, and the parent's copy."""
    found: dict[Path, Path] = {}
    for client in variant.clients if variant.agreement.federation.learns_in_public else ():
        copy = parent.public_data(client)  # a parent of another method has the server's alone
        source = copy if copy.exists() else parent.auxiliary_data
        if source.exists() and parent.client_data(client).exists():
            found[variant.public_data(client)] = source
    return found


def _pool(parent: Workspace) -> bytes:
    """Every party's rows with an answer: unlabelled ones serve distillation alone."""
    rows = [row for place in _all_data(parent) for row in read_rows(place, unlabelled=True)[0]]
    check_one_form(rows, "the parties' rows")
    return rows_bytes(row for row in rows if row.completion is not None)


def _all_data(workspace: Workspace) -> list[Path]:
    return [*map(workspace.client_data, workspace.clients), workspace.auxiliary_data]


def _link(source: Path, target: Path) -> None:
    """The same bytes at target, without a second copy where the file system allows that."""
    if target.exists() and (target.samefile(source) or reading.read_own(target) == reading.read_own(source)):
        return
    make_folder(target.parent)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source.resolve())  # of a link, what it leads to
    except OSError:  # another file system, or one without hard links
        writing.write(target, reading.read_own(source))
