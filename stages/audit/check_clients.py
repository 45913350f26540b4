"""A6, the clients: whose update is unlike the others', in length or direction, and whose is another's. Plain mode only.

What it finds is a reason to ask, not a proof: clients with data of their own kind go their own way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from stages.aggregation.means import Mean
from stages.aggregation.sources import Held, Source, as_written, side_by_side, stacked, whole_layers
from stages.aggregation.updates import columns_of, inner_products
from stages.artefacts.adapter_files import Tensors, flat, layout_of, part_of
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder
from stages.audit.foreign_adapters import read_weights, tensors_if_sound
from stages.runtime.errors import Damaged
from stages.workspace.averaging import Factors
from stages.workspace.layout import broadcast_in
from stages.workspace.names import ADAPTER_WEIGHTS

A6 = Check("A6", "clients")

LARGEST_Z = 3.5
"""Iglewicz and Hoaglin, 1993."""
FEWEST_FOR_Z = 5
LEAST_COSINE = -0.5


def clients_of(folders: Mapping[Path, tuple[Folder, Factors]], client: int | None) -> Iterator[Finding]:
    """Of every round of one workspace or exchange: each update against the others.

    folders: those whose adapter can be read, is finite and has the broadcast's layout, or that of A or B alone, and
    which of these. client: tell of this one alone.
    """
    compared, worst = 0, 0.0
    rounds: dict[tuple[Path, Factors], dict[int, Folder]] = {}
    for folder, factors in folders.values():
        if number := _client(folder):
            rounds.setdefault((folder.path.parent, factors), {})[number] = folder
    term = _term([folder for folder, _ in folders.values()])
    for (place, factors), updates in rounds.items():
        scope = next(iter(updates.values())).scope
        start = tensors_if_sound(broadcast_in(place), scope)
        if start is None or len(updates) < 2:
            continue
        compared += 1
        products, terms = compare(updates, part_of(start, factors))
        worst = max(worst, *terms.values(), 0.0)
        yield from _copies(updates, client)
        yield from _outliers(updates, products, client)
        text = f"{term} at most {100 * max(terms.values(), default=0.0):.1f} %"
        yield A6.ok(text, where=scope.shown(place), measured=terms)
    if compared:
        yield A6.ok(f"{number_of(compared, 'round')}: no copy, no outlier; {term} at most {100 * worst:.1f} %")
    else:
        yield A6.skip("a round with its broadcast and two updates or more")


def _term(folders: list[Folder]) -> str:
    """How the cross term is called: whether it is of the average that is made."""
    agreement = folders[0].scope.agreement if folders else None
    said = {"product": "cross term, if A and B were averaged apart,", "residual": "cross term, kept as the residual,"}
    return said.get(agreement.aggregation.combine if agreement else "", "cross term")


def _client(folder: Folder) -> int:
    return (folder.manifest.client or 0) if folder.manifest else 0


def _copies(updates: dict[int, Folder], client: int | None) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for k, folder in updates.items():
        same = first.setdefault(folder.weights_sha256, k)
        if same != k and client in (None, k, same):
            yield A6.warn(folder.shown, f"is client {same}'s update, byte for byte", "an update of its own")


def _outliers(updates: dict[int, Folder], products: np.ndarray, client: int | None) -> Iterator[Finding]:
    norms = np.sqrt(np.diag(products))
    cosines, others, z = pairwise(products), toward_the_rest(products), robust_z(norms)
    for number, (k, folder) in enumerate(updates.items()):
        if client not in (None, k):
            continue
        if norms[number] == 0:
            yield A6.warn(folder.shown, "is the broadcast, sent back", "an update")
            continue
        among = np.delete(cosines[number], number)
        said = f"norm {norms[number]:.3g}, cosine to the others {among.min():.2f} to {among.max():.2f}"
        said += f", to the mean of the rest {others[number]:.2f}"
        measured = {"norm": norms[number], "cosine_to_rest": others[number]}
        if z is not None:
            said, measured = f"{said}, z of the norm {z[number]:.1f}", measured | {"z": z[number]}
            if abs(z[number]) > LARGEST_Z:
                yield A6.warn(folder.shown, said, f"z from -{LARGEST_Z} to {LARGEST_Z}")
        if others[number] < LEAST_COSINE:
            yield A6.warn(folder.shown, said, f"not against the rest: cosine above {LEAST_COSINE}")
        yield A6.ok(said, where=folder.shown, measured={name: float(value) for name, value in measured.items()})


def compare(updates: dict[int, Folder], start: Tensors) -> tuple[np.ndarray, dict[str, float]]:
    """The inner products of all updates, and the cross term of each layer, every client weighing the same.

    That is ||mean(BA) - mean(B) mean(A)|| / ||mean(BA)||. Each file is read once, some whole layers of all clients at
    a time. Raises Damaged for a file that has changed since it was found to be sound.
    """
    layout, paths = layout_of(start), [folder.path for folder in updates.values()]
    sources = [_source(path, start) for path in paths]

    def blame(number: int) -> NoReturn:
        raise Damaged("it has other numbers than before", where=paths[number])

    places = whole_layers(layout, columns_of(len(paths)))
    blocks = side_by_side(sources, [place for place, _ in places], blame)
    products, mean = np.zeros((len(paths), len(paths))), Mean()
    for (_, names), (_, block) in zip(places, blocks, strict=True):
        products += inner_products(block, flat({name: start[name] for name in names}))
        mean.add_all(stacked(block, {name: layout[name] for name in names}))
    return products, mean.cross_terms()


def _source(path: Path, start: Tensors) -> Source:
    """Where the numbers of a folder's weights are read: bit by bit, or, if they lie in another order, from memory."""
    weights = path / ADAPTER_WEIGHTS
    with contextlib.suppress(Damaged):  # of another type than is exchanged: A3 says so
        if stored := as_written(weights, weights.stat().st_size, layout_of(start)):
            return stored
    found = read_weights(path).tensors
    return Held(flat({name: found[name] for name in start}))


def pairwise(products: np.ndarray) -> np.ndarray:
    """The cosine of every two updates, [K, K]; zero where one of them is none."""
    norms = np.sqrt(np.diag(products))
    lengths = np.outer(norms, norms)
    cosines: np.ndarray = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return cosines


def toward_the_rest(products: np.ndarray) -> np.ndarray:
    """The cosine of each update to the mean of all others, [K]; zero where either is none."""
    own = np.diag(products)
    to_all = products.sum(axis=1)
    rest = np.sqrt(np.maximum(products.sum() - 2 * to_all + own, 0))
    lengths = np.sqrt(own) * rest
    cosines: np.ndarray = np.divide(to_all - own, lengths, out=np.zeros(len(own)), where=lengths > 0)
    return cosines


def robust_z(norms: np.ndarray) -> np.ndarray | None:
    """0.6745 (log norm - median) / MAD of every update, [K]; None for fewer than five, or where MAD is zero."""
    if len(norms) < FEWEST_FOR_Z or not norms.all():
        return None
    logs = np.log(norms)
    distance = np.abs(logs - np.median(logs))
    spread = np.median(distance)
    return 0.6745 * (logs - np.median(logs)) / spread if spread > 0 else None
