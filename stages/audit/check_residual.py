"""A13, the residual: each is sound and handed on as it is, and average and residual are what the updates make."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from stages.aggregation.residuals import largest_rank, residual
from stages.aggregation.rules import WEIGHTINGS, combine
from stages.aggregation.updates import Updates
from stages.artefacts.adapter_files import A, B, Tensors, layers_of, layout_of, read_adapter
from stages.artefacts.lineage import parent_place
from stages.artefacts.publishing import keeps_old
from stages.artefacts.reading import Artefact, carries_residual
from stages.artefacts.receiving import read_sound
from stages.artefacts.residual_files import read_residual
from stages.artefacts.residual_sizes import is_agreed
from stages.audit.check_chain import parent_of
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder, Scope
from stages.audit.foreign_adapters import product_spectrum
from stages.parties.party import Onlooker
from stages.runtime.errors import Problem
from stages.runtime.events import ignore
from stages.workspace.agreement import Agreement
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RESIDUAL
from stages.workspace.paths import Workspace

A13 = Check("A13", "residual")

ROUNDING = 1e-5
"""A share of the largest number, and of what is added to a layer: float32 on another machine rounds otherwise."""

AS_MADE = ", as the updates make it"
"""How it is said of an average."""

HANDED_ON = {"broadcast": ("slm", "aggregate"), "co-distill": ("aggregate",)}
"""Whose residual a folder has, byte for byte."""


def residuals_in_all(scopes: list[Scope], folders: list[Folder]) -> Iterator[Finding]:
    """Of every folder that has a residual, or should."""
    ours = {folder.path: folder for folder in folders if folder.manifest}
    looked = remade = 0
    for folder in ours.values():
        workspace, agreement = folder.scope.workspace, folder.scope.agreement
        if not carries_residual(folder.said):
            continue
        if workspace is None or agreement is None:
            if RESIDUAL in folder.said.files:
                yield A13.skip("the agreement is not here", where=folder.shown)
            continue
        if (RESIDUAL in folder.said.files) != is_agreed(agreement):
            has, expected = ("no such file", "one") if is_agreed(agreement) else ("is there", "none")
            yield A13.fail(folder.file(RESIDUAL), has, f"{expected}, by combine {agreement.aggregation.combine}")
        elif is_agreed(agreement):
            looked += 1
            yield from _handed_on(folder, ours)
            try:
                found = list(_sound(folder, workspace, agreement))
            except Problem as problem:
                yield A13.fail(folder.file(RESIDUAL), problem.message)
                continue
            remade += any(finding.found.endswith(AS_MADE) for finding in found)
            yield from found
    if looked:
        again = f"; {number_of(remade, 'average')} made again from the updates" if remade else ""
        yield A13.ok(f"{number_of(looked, 'residual')}{again}")
    elif any(scope.agreement and is_agreed(scope.agreement) for scope in scopes):
        yield A13.skip("no broadcast, and no average, is here")


def _handed_on(folder: Folder, ours: dict[Path, Folder]) -> Iterator[Finding]:
    """That it is that of the folder this one was made from, wherever no round was averaged in between."""
    names = ("broadcast",) if keeps_old(folder.said) else HANDED_ON.get(folder.said.stage, ())
    for name in names:
        place = parent_of(folder, name) if name in folder.said.parents else None
        parent = ours.get(place) if place else None
        named = parent.said.files.get(RESIDUAL) if parent else None
        if parent and named and named.sha256 != folder.said.files[RESIDUAL].sha256:
            yield A13.fail(folder.file(RESIDUAL), "is another", f"that of {parent.shown}, on which it was trained")


def _sound(folder: Folder, workspace: Workspace, agreement: Agreement) -> Iterator[Finding]:
    """Of one folder; of an average too, whether the updates that are here make it. Raises what is wrong with it."""
    who, manifest = Onlooker(workspace), folder.said
    artefact = read_sound(folder.path, by=who, only=[ADAPTER_CONFIG, ADAPTER_WEIGHTS, RESIDUAL])
    adapter = read_adapter(artefact, None, agreement.slm.lora)
    beneath = read_residual(artefact, layout_of(adapter), agreement)
    measured = {"rank": float(largest_rank(beneath)), "bytes": float(manifest.files[RESIDUAL].size_bytes)}
    said = f"rank {largest_rank(beneath)} at most"
    if manifest.stage == "aggregate" and not keeps_old(manifest):
        made = _made_again(artefact, workspace, agreement)
        if made is None:
            yield A13.skip("an update of its round, or its broadcast, is not here", where=folder.shown)
        elif off := _off(adapter, made[0]):
            yield A13.fail(folder.file(ADAPTER_WEIGHTS), f"{off} is another", "the mean of the updates")
        elif off := _product_off(beneath, *made):
            yield A13.fail(folder.file(RESIDUAL), f"{off} is another", "what the means lose of the mean of BA")
        else:
            said += AS_MADE
    yield A13.ok(said, where=folder.shown, measured=measured)


def _made_again(average: Artefact, workspace: Workspace, agreement: Agreement) -> tuple[Tensors, Tensors] | None:
    """The adapter and the residual of a round; None where what it was made from is not here as it was."""
    who, manifest, heads = Onlooker(workspace), average.manifest, []
    for name, digest in manifest.parents.items():
        place = parent_place(workspace, manifest, name)
        if not place.exists():
            return None
        found = read_sound(place, by=who, only=None if name == "broadcast" else [ADAPTER_CONFIG])
        if found.sha256 != digest:
            return None  # A1 says so
        heads.append(found)
    [theta] = [head for head in heads if head.manifest.stage == "broadcast"]
    heads = sorted((head for head in heads if head is not theta), key=lambda head: head.manifest.client or 0)
    old = read_adapter(theta, None, agreement.slm.lora)
    weights = [WEIGHTINGS[agreement.aggregation.weighting](head.manifest.examples) for head in heads]
    with threadpool_limits(1, "blas"):
        updates = Updates(heads, old, ignore)
        tensors, _ = combine(agreement.aggregation, updates, weights)
        before = read_residual(theta, layout_of(old), agreement)
        return tensors, residual(updates, weights, tensors, before)


def _off(found: Tensors, expected: Tensors) -> str:
    """The first tensor that is another, beyond rounding."""
    for name, tensor in expected.items():
        least = ROUNDING * np.abs(tensor).max(initial=0.0)
        if name not in found or found[name].shape != tensor.shape or (np.abs(found[name] - tensor) > least).any():
            return name
    return ""


def _product_off(found: Tensors, average: Tensors, expected: Tensors) -> str:
    """The first layer to which another BA is added, beyond rounding of what is added to it in all."""
    for layer in layers_of(average):
        sides = [(one[layer + A], one[layer + B]) for one in (found, expected) if layer + A in one]
        signs = [1, -1] if len(sides) == 2 else [1]
        if not sides:
            continue
        whole = [*sides[-1:], (average[layer + A], average[layer + B])]
        most = ROUNDING * sum(float(np.linalg.norm(_spectrum([side], [1]))) for side in whole)
        if float(np.linalg.norm(_spectrum(sides, signs))) > most:
            return layer
    return ""


def _spectrum(sides: list[tuple[np.ndarray, np.ndarray]], signs: list[int]) -> np.ndarray:
    """The singular values of a sum of products BA, each with its sign."""
    a = np.concatenate([a for a, _ in sides]).astype(np.float64)
    b = np.concatenate([sign * b.astype(np.float64) for (_, b), sign in zip(sides, signs, strict=True)], axis=1)
    return product_spectrum(a, b)
