"""A4 and A5, the numbers: what an adapter holds, how large it is, and whether rounds turn back on each other."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import numpy as np

from stages.aggregation.updates import CACHED_NUMBERS
from stages.artefacts.adapter_files import A, B, Tensors, layout_of
from stages.artefacts.publishing import keeps_old
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder
from stages.audit.foreign_adapters import (
    AnyAdapter,
    product_spectrum,
    rank_of,
    spectra_by_grams,
    tensors_if_sound,
)
from stages.workspace.names import ADAPTER_WEIGHTS

A4, A5 = Check("A4", "numbers"), Check("A5", "drift")

LEAST_COSINE, LARGEST_RATIO = -0.5, 3.0
"""An update that turns back on the one before it, or is so many times as long, is worth a look."""

AGO = {1: "", 2: " that trained the same matrices"}
"""How the update is called that is so many rounds before."""

Moves = dict[str, tuple[np.ndarray, np.ndarray]]
"""What was added to each tensor, or to each BA, as the product of two: [m, k] and [k, n], float64."""


def numbers_of(folder: Folder, adapter: AnyAdapter, start: Tensors | None) -> Iterator[Finding]:
    """Of one adapter. start: the broadcast of its round, if it is here."""
    weights = folder.file(ADAPTER_WEIGHTS)
    if not adapter.is_finite:
        yield from _without_numbers(adapter, weights)
        return
    zeros = [name for name, extent in adapter.extents.items() if extent == 0]
    second = [name for name in adapter.tensors if name.endswith(B)]
    begins = folder.manifest is not None and (folder.manifest.stage, folder.manifest.round) == ("broadcast", 1)
    begins |= _is_without_b(folder)
    is_untrained = bool(second) and set(second) <= set(zeros)
    if is_untrained and not begins:
        yield A4.warn(weights, "every B is zero: training did nothing", "some B that is not")
    for name in zeros:
        if not (is_untrained and name in second):
            yield A4.warn(weights, f"{name}: all {adapter.tensors[name].size} values are zero")
    measured = _measured(adapter, start)
    said = f"largest value {measured['largest']:.3g}, norm {measured['norm']:.3g}"
    said += f", update {measured['update_norm']:.3g}" if "update_norm" in measured else ""
    ranks = [value for name, value in measured.items() if name.startswith("effective_rank/")]
    said += f", effective rank {min(ranks):.2f} to {max(ranks):.2f}" if ranks else ""
    yield A4.ok(said + (", untrained, as it begins" if is_untrained else ""), where=folder.shown, measured=measured)


def _is_without_b(folder: Folder) -> bool:
    """Whether it is the server's, whose B is rightly zero yet: every B is a client's own, or a round was given up."""
    manifest, agreement = folder.manifest, folder.scope.agreement
    if manifest is None or manifest.stage not in ("broadcast", "aggregate"):
        return False
    is_personal = agreement is not None and agreement.personal and agreement.aggregation.personal == "B"
    return is_personal or keeps_old(manifest)


def _without_numbers(adapter: AnyAdapter, weights: str) -> Iterator[Finding]:
    """The tensors that hold NaN or infinity, and how often."""
    for name, tensor in adapter.tensors.items():
        nan, infinite = int(np.isnan(tensor).sum()), int(np.isinf(tensor).sum())
        kinds = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count]
        if kinds:
            yield A4.fail(weights, f"{name}: {' and '.join(kinds)} of {tensor.size}", "finite")


def _measured(adapter: AnyAdapter, start: Tensors | None) -> dict[str, float]:
    """largest: of all absolute values; norm: of all as one vector; update_norm: of the difference from start.

    product_norm/LAYER: the Frobenius norm of the scaled B A, what the adapter adds; effective_rank/LAYER: of B A.
    """
    tensors = adapter.tensors
    start = {name: start[name] for name in tensors if name in start} if start is not None else None
    if start is not None and layout_of(start) != layout_of(tensors):
        start = None
    squared, update_squared = 0.0, 0.0
    grams: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        for piece in _pieces(name, tensor):
            wide = tensor[piece].astype(np.float64)
            squared += float(np.vdot(wide, wide))
            if name.endswith((A, B)) and wide.ndim == 2:
                gram = wide @ wide.T if name.endswith(A) else wide.T @ wide
                grams[name] = grams[name] + gram if name in grams else gram
            if start is not None:
                wide -= start[name][piece]
                update_squared += float(np.vdot(wide, wide))
    found = {"largest": max(adapter.extents.values(), default=0.0), "norm": sqrt(squared)}
    if start is not None:
        found["update_norm"] = sqrt(update_squared)
    spectra = _spectra(adapter, grams)
    for module, *_ in adapter.modules():
        spectrum = spectra[module]
        if (scale := adapter.scale(module)) is not None:
            found[f"product_norm/{module}"] = abs(scale) * float(np.linalg.norm(spectrum))
        if spectrum.any():
            found[f"effective_rank/{module}"] = rank_of(spectrum)
    return found


def _pieces(name: str, tensor: np.ndarray) -> Iterator[Any]:
    """Indices of a tensor's parts that stay in the cache: of A some columns, of B and others some rows."""
    if tensor.size <= CACHED_NUMBERS or not tensor.ndim:
        yield ...
        return
    axis = 1 if name.endswith(A) and tensor.ndim == 2 else 0
    length = tensor.shape[axis]
    step = max(1, CACHED_NUMBERS * length // tensor.size)
    for first in range(0, length, step):
        yield (slice(None),) * axis + (slice(first, first + step),)


def _spectra(adapter: AnyAdapter, grams: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The singular values of each layer's B A; layers of one rank are looked at together."""
    of_rank: dict[int, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for module, a, b in adapter.modules():
        of_rank.setdefault(len(a), {})[module] = a, b
    found = {}
    for layers in of_rank.values():
        of_a, of_b = (np.stack([grams[module + which] for module in layers]) for which in (A, B))
        for (module, factors), spectrum in zip(layers.items(), spectra_by_grams(of_a, of_b), strict=True):
            found[module] = product_spectrum(*factors) if spectrum is None else spectrum
    return found


def numbers_in_all(found: list[Finding]) -> Iterator[Finding]:
    """A summary of what was measured of each."""
    sound = [finding.measured for finding in found if finding.level == "OK"]
    if not sound:
        yield A4.skip("no adapter that can be read is here")
        return
    ranges = []
    for key, name in (("largest", "largest value"), ("norm", "norm"), ("update_norm", "update")):
        values = [measured[key] for measured in sound if key in measured]
        ranges += [f"{name} {min(values):.3g} to {max(values):.3g}"] if values else []
    ranks = [value for one in sound for key, value in one.items() if key.startswith("effective_rank/")]
    ranges += [f"effective rank {min(ranks):.2f} to {max(ranks):.2f}"] if ranks else []
    yield A4.ok(f"{number_of(len(sound), 'adapter')}, every value finite; {', '.join(ranges)}")


def drift_of(folders: list[Folder]) -> Iterator[Finding]:
    """Each round's update of the global adapter against the one of the round before, of one workspace or exchange.

    Where clients train A and B in turns, against that of two rounds before, which is of the same matrices.
    The update is the average less the broadcast; where no average is here, the next broadcast less this one. It is of A
    and B, but where BA is averaged, or nobody says what is, of BA: there A and B are others after each round.
    """
    of_products = _of_products(folders)
    begins, averages = _by_round(folders, "broadcast"), _by_round(folders, "aggregate")
    ends = averages or {round - 1: folder for round, folder in begins.items()}
    compared, back, updates = 0, _is_in_turns(folders) + 1, dict[int, Moves | None]()
    for round in range(1, max(begins, default=0) + 1):
        update = _difference(begins[round], ends[round], of_products) if round in begins and round in ends else None
        before, updates[round] = updates.pop(round - back, None), update
        if update is not None and before is not None:
            compared += 1
            yield from _turn(before, update, round, back)
    if compared:
        yield A5.ok(f"{number_of(compared, 'round')} compared with the one before{AGO[back]}")
    else:
        rounds = ("two rounds one after the other", "two rounds that train the same matrices")[back - 1]
        yield A5.skip(f"{rounds}, each with its broadcast, and its average or the next broadcast")


def _by_round(folders: list[Folder], stage: str) -> dict[int, Folder]:
    return {one.manifest.round: one for one in folders if one.manifest and one.manifest.stage == stage}


def _of_products(folders: list[Folder]) -> bool:
    agreement = folders[0].scope.agreement if folders else None
    return agreement is None or agreement.aggregation.combine == "product"


def _is_in_turns(folders: list[Folder]) -> bool:
    agreement = folders[0].scope.agreement if folders else None
    return agreement is not None and agreement.trained_in(1) != agreement.trained_in(2)


def _turn(before: Moves, update: Moves, round: int, back: int) -> Iterator[Finding]:
    lengths = _norm(before), _norm(update)
    if not all(lengths) or not all(np.isfinite(lengths)) or before.keys() != update.keys():
        return
    cosine, ratio = _inner(before, update) / (lengths[0] * lengths[1]), lengths[1] / lengths[0]
    said, where = f"cosine to the update before{AGO[back]} {cosine:.2f}, norm ratio {ratio:.2f}", f"round {round:04d}"
    if cosine < LEAST_COSINE or ratio > LARGEST_RATIO:
        yield A5.warn(where, said, f"above {LEAST_COSINE}, below {LARGEST_RATIO}")
    yield A5.ok(said, where=where, measured={"cosine": cosine, "norm_ratio": ratio})


def _difference(before: Folder, after: Folder, of_products: bool) -> Moves | None:
    """What was added, float64; None unless both are sound adapters of one layout."""
    start, end = (tensors_if_sound(one.path, one.scope) for one in (before, after))
    if start is None or end is None or layout_of(start) != layout_of(end):
        return None
    wide = [{name: tensor.astype(np.float64) for name, tensor in one.items()} for one in (start, end)]
    moves, one = Moves(), np.ones((1, 1))
    for a in [name for name in start if of_products and name.endswith(A)]:
        (a_start, b_start), (a_end, b_end) = ((tensors.pop(a), tensors.pop(a.removesuffix(A) + B)) for tensors in wide)
        moves[a] = np.concatenate([b_end, -b_start], axis=1), np.concatenate([a_end, a_start])
    return moves | {name: ((wide[1][name] - wide[0][name]).reshape(-1, 1), one) for name in wide[0]}


def _inner(one: Moves, other: Moves) -> float:
    """The inner product of two updates, whose matrices are not formed."""
    return sum(
        float(np.vdot(one_left.T @ left, one_right @ right.T))
        for (one_left, one_right), (left, right) in ((one[name], other[name]) for name in one)
    )


def _norm(moves: Moves) -> float:
    return sqrt(max(_inner(moves, moves), 0.0))
