"""The updates of a round as rules read them: one client's after the other, or the same numbers of all side by side.

Neither holds them all in memory, and neither trusts a file twice: each byte that is used is hashed as it is read, and
each reading of a file must come to the digest in its manifest, or nothing is made of the updates.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from stages.artefacts.adapter_files import Layout, Tensors, is_as_written, is_finite, layout_of, read_adapter
from stages.artefacts.reading import LEVELS, Artefact, read_file, read_manifest
from stages.artefacts.tensor_files import largest_bytes
from stages.files import reading
from stages.runtime.errors import NotReady, Problem
from stages.runtime.events import Event, Report
from stages.workspace.agreement import Lora
from stages.workspace.names import ADAPTER_WEIGHTS

BLOCK_BYTES = 16 << 20
"""Of numbers that lie side by side; a second block is read meanwhile."""
CACHED_NUMBERS = 1 << 16
"""Of float64 that stay in a processor's cache while they are used: half a megabyte."""
FEWEST_NUMBERS = 1 << 12
"""Of one client in a block: for less a file is not opened."""

Read = TypeVar("Read")


@dataclass(frozen=True)
class Updates:
    """The updates that are combined, in the order of their clients, and theta, the broadcast that they began with.

    heads: what was checked of each before its weights are read; its manifest names their digest.
    """

    heads: Sequence[Artefact]
    theta: Tensors
    lora: Lora
    report: Report

    @cached_property
    def size(self) -> int:
        """How many numbers an adapter has."""
        return sum(tensor.size for tensor in self.theta.values())

    @property
    def digests(self) -> list[str]:
        """The sha256 of the weights of each client."""
        return [head.manifest.files[ADAPTER_WEIGHTS].sha256 for head in self.heads]

    def adapters(self) -> Iterator[Tensors]:
        """Each client's, the next being read and hashed while the last is used: two in memory, however many."""
        for number, adapter in enumerate(_ahead(partial(self.adapter, k) for k in range(len(self.heads)))):
            yield adapter
            client = self.heads[number].manifest.client
            self.report(Event("step", f"client {client}", step=number + 1, total=len(self.heads)))

    def adapter(self, number: int) -> Tensors:
        """One client's. Raises NotReady if the folder was replaced since its head was read, else as read_adapter."""
        head = self.heads[number]
        limit_bytes = largest_bytes(self.size)
        try:
            content = read_file(head.path, head.manifest, ADAPTER_WEIGHTS, limit_bytes=limit_bytes)
        except Problem as error:
            if read_manifest(head.path)[1] != head.sha256:
                raise _changed(head) from error
            raise
        whole = replace(head, contents=head.contents | {ADAPTER_WEIGHTS: content})
        return read_adapter(whole, layout_of(self.theta), self.lora)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Where some numbers lie in an adapter, and those numbers of every client, float32 [K, n].

        They are the caller's to use until the next are asked for. All numbers once, in the order of `flat`. What is
        made of them counts only once the last block was asked for the next: then every file has been read to its end,
        and has the digest that its manifest names.
        """
        columns = columns_of(len(self.heads))
        yield from self._read([slice(start, min(start + columns, self.size)) for start in range(0, self.size, columns)])

    def layers(self) -> Iterator[Tensors]:
        """Some whole layers of every client, one after the other: each tensor as [K, ...], float32. As blocks."""
        layout = layout_of(self.theta)
        places, names = zip(*whole_layers(layout, columns_of(len(self.heads))), strict=True)
        for (_, block), some in zip(self._read(places), names, strict=True):
            yield stacked(block, {name: layout[name] for name in some})

    def _read(self, places: Sequence[slice]) -> Iterator[tuple[slice, np.ndarray]]:
        """These places, which are all numbers once, in order; raises once they are read what blocks raises."""
        sources = [self._source(number) for number in range(len(self.heads))]
        for done, (place, block) in enumerate(side_by_side(sources, places, self._blame), 1):
            yield place, block
            self.report(Event("step", "numbers of all clients", step=done, total=len(places)))
        for number, source in enumerate(sources):
            if not source.is_whole():
                self._blame(number)

    def flat(self, adapter: Tensors) -> np.ndarray:
        """An adapter's numbers one after the other, by the names of its tensors, as in its file: [size]."""
        return np.concatenate([adapter[name].ravel() for name in sorted(self.theta)])

    def tensors(self, flat: np.ndarray) -> Tensors:
        """The adapter of these numbers."""
        ends = np.cumsum([self.theta[name].size for name in sorted(self.theta)])
        parts = zip(sorted(self.theta), np.split(flat, ends[:-1]), strict=True)
        return {name: part.reshape(self.theta[name].shape) for name, part in parts}

    def _source(self, number: int) -> Source:
        """Where a client's numbers are read bit by bit: its file, or, where they lie there in another order, memory."""
        head = self.heads[number]
        path, entry = head.path / ADAPTER_WEIGHTS, head.manifest.files[ADAPTER_WEIGHTS]
        stored = as_written(path, entry.size_bytes, layout_of(self.theta), sha256=entry.sha256)
        return stored or Held(self.flat(self.adapter(number)))

    def _blame(self, number: int) -> NoReturn:
        """Raise what is wrong with a file, as who reads it whole would; if nothing is, it was another before."""
        self.adapter(number)
        raise _changed(self.heads[number])


def columns_of(rows: int) -> int:
    """How many numbers of each of so many clients make a block."""
    return max(FEWEST_NUMBERS, BLOCK_BYTES // (4 * rows))


def whole_layers(layout: Layout, columns: int) -> list[tuple[slice, list[str]]]:
    """Where one layer after the other lies in an adapter, as few as make so many numbers, and their tensors' names."""
    places, first, names = list[tuple[slice, list[str]]](), 0, list[str]()
    for _, layer in itertools.groupby(sorted(layout), lambda name: name.rpartition(".lora_")[0] or name):
        names += layer
        if (size := sum(math.prod(layout[name]) for name in names)) >= columns:
            places.append((slice(first, first + size), names))
            first, names = first + size, []
    rest = sum(math.prod(layout[name]) for name in names)
    return places + ([(slice(first, first + rest), names)] if names else [])


def stacked(block: np.ndarray, layout: Layout) -> Tensors:
    """The tensors of all clients in a block, [K, ...]."""
    ends = np.cumsum([math.prod(shape) for shape in layout.values()])
    parts = zip(layout.items(), np.split(block, ends[:-1], axis=1), strict=True)
    return {name: part.reshape(len(block), *shape) for (name, shape), part in parts}


def side_by_side(
    sources: Sequence[Source], places: Sequence[slice], blame: Callable[[int], NoReturn]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Each place with its numbers of every source, float32 [K, n], the next being read while the last is used.

    Two blocks of memory take turns: new memory costs more than what is read into it. blame: raises what is wrong with a
    source, by its position, that has no finite numbers there.
    """
    most = len(sources) * max((place.stop - place.start for place in places), default=0)
    turns = itertools.cycle([np.empty(most, np.float32) for _ in places[:2]])

    def read(place: slice) -> np.ndarray:
        columns = place.stop - place.start
        block = next(turns)[: len(sources) * columns].reshape(-1, columns)
        for number, (row, source) in enumerate(zip(block, sources, strict=True)):
            if not source.fill(row, place) or not is_finite(row):
                blame(number)
        return block

    yield from zip(places, _ahead(partial(read, place) for place in places), strict=True)


def inner_products(block: np.ndarray, start: np.ndarray) -> np.ndarray:
    """<u_j, u_k> of every two rows of block - start, [K, K], float64: some columns at a time, in the cache."""
    products, columns = np.zeros((len(block), len(block))), max(1, CACHED_NUMBERS // len(block))
    for first in range(0, block.shape[1], columns):
        some = slice(first, first + columns)
        moved = block[:, some].astype(np.float64)
        moved -= start[some].astype(np.float64)
        products += moved @ moved.T
    return products


def as_written(path: Path, size_bytes: int, layout: Layout, *, sha256: str = "") -> Stored | None:
    """A file of so many bytes, to be read bit by bit, if it has its numbers as they are written here; None otherwise.

    sha256: what it must come to once all of it is read; without one that is not looked at. Raises Damaged.
    """
    start = size_bytes - 4 * sum(map(math.prod, layout.values()))
    if 8 <= start <= largest_bytes(0):
        content = bytearray(start)
        is_there = reading.read_into(path, memoryview(content), start=0, named_bytes=size_bytes, levels=LEVELS)
        if is_there and is_as_written(bytes(content), layout, path):
            return Stored(path, start, size_bytes, sha256, hashlib.sha256(content))
    return None


@dataclass(frozen=True)
class Stored:
    """A file whose numbers are read in their order. digest: of what was read so far, if it is to come to a sha256."""

    path: Path
    start: int
    size_bytes: int
    sha256: str
    digest: hashlib._Hash = field(compare=False)

    def fill(self, row: np.ndarray, place: slice) -> bool:
        """Read the next numbers. Returns whether they are there."""
        content = row.data.cast("B")
        start = self.start + 4 * place.start
        if not reading.read_into(self.path, content, start=start, named_bytes=self.size_bytes, levels=LEVELS):
            return False
        if self.sha256:
            self.digest.update(content)
        return True

    def is_whole(self) -> bool:
        """Whether what was read is what the manifest names."""
        return self.digest.hexdigest() == self.sha256


@dataclass(frozen=True)
class Held:
    """Numbers that were checked when they were read, and are in memory."""

    numbers: np.ndarray

    def fill(self, row: np.ndarray, place: slice) -> bool:
        """Copy the next numbers."""
        row[:] = self.numbers[place]
        return True

    def is_whole(self) -> bool:
        """They are."""
        return True


Source = Stored | Held
"""Where numbers of a client are read."""


def _changed(head: Artefact) -> NotReady:
    message = f"client {head.manifest.client}'s update was replaced while it was read"
    return NotReady(message, where=head.path, mend="wait until it is there, and give the same command again")


def _ahead(reads: Iterable[Callable[[], Read]]) -> Iterator[Read]:
    """What each of them returns, the next being read while the last is used."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming: deque[Future[Read]] = deque()
        for read in reads:
            upcoming.append(reader.submit(read))
            if len(upcoming) > 1:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()
