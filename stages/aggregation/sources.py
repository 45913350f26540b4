"""Where the numbers of many clients are read, side by side: files bit by bit, in one order, and what is in memory.

Each byte that is used is hashed as it is read, if its file must come to a digest.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from stages.artefacts.adapter_files import A, B, Layout, Tensors, is_as_written, is_finite, numbers_in
from stages.artefacts.reading import LEVELS
from stages.artefacts.sparse_files import Sparse
from stages.artefacts.tensor_files import largest_bytes
from stages.files import reading

Read = TypeVar("Read")


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

    yield from zip(places, ahead(partial(read, place) for place in places), strict=True)


def ahead(reads: Iterable[Callable[[], Read]]) -> Iterator[Read]:
    """What each of them returns, the next being read while the last is used."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming: deque[Future[Read]] = deque()
        for read in reads:
            upcoming.append(reader.submit(read))
            if len(upcoming) > 1:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()


def as_written(path: Path, size_bytes: int, layout: Layout, *, sha256: str = "") -> Stored | None:
    """A file of so many bytes, to be read bit by bit, if it has its numbers as they are written here; None otherwise.

    sha256: what it must come to once all of it is read; without one that is not looked at. Raises Damaged.
    """
    start = size_bytes - 4 * numbers_in(layout)
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


@dataclass(frozen=True)
class Widened:
    """A file of a smaller rank, read whole layers at a time: its A has more rows here, and its B columns, of zeros."""

    stored: Stored
    narrow: Layout
    wide: Layout

    def fill(self, row: np.ndarray, place: slice) -> bool:
        """Read the next layers, of which the place must be a number. Returns whether they are there."""
        row[:] = 0
        start = before = 0
        for name in sorted(self.wide):
            size, count = math.prod(self.wide[name]), math.prod(self.narrow[name])
            if place.start <= start < place.stop:
                numbers = np.empty(self.narrow[name], np.float32)
                if not self.stored.fill(numbers.reshape(-1), slice(before, before + count)):
                    return False
                wide = row[start - place.start :][:size].reshape(self.wide[name])
                wide[tuple(map(slice, numbers.shape))] = numbers
            start, before = start + size, before + count
        return True

    def is_whole(self) -> bool:
        """Whether what was read is what the manifest names."""
        return self.stored.is_whole()


@dataclass(frozen=True)
class Added:
    """A broadcast, [numbers], and what a sparse update adds to some of its numbers."""

    start: np.ndarray
    sparse: Sparse

    def numbers(self) -> np.ndarray:
        """All of them, [numbers], float32."""
        found = np.empty(len(self.start), np.float32)
        self.fill(found, slice(0, len(found)))
        return found

    def fill(self, row: np.ndarray, place: slice) -> bool:
        """The numbers of a place. What is beyond float32 becomes infinite, and is for the caller to find."""
        row[:] = self.start[place]
        first, last = np.searchsorted(self.sparse.positions, (place.start, place.stop))
        with np.errstate(over="ignore"):
            row[self.sparse.positions[first:last].astype(np.int64) - place.start] += self.sparse.changes[first:last]
        return True

    def is_whole(self) -> bool:
        """It was checked when it was read."""
        return True


def at_rank(layout: Layout, rank: int) -> Layout:
    """The shapes of an adapter of this rank, of no more than it has there."""
    shapes = {A: lambda shape: (min(rank, shape[0]), shape[1]), B: lambda shape: (shape[0], min(rank, shape[1]))}
    return {name: shapes[end](shape) if (end := name[-len(A) :]) in shapes else shape for name, shape in layout.items()}


def widened(tensors: Tensors, layout: Layout) -> Tensors:
    """An adapter of a smaller rank as one of these shapes, with the same BA: the rest is zero."""
    made = Tensors()
    for name, tensor in tensors.items():
        made[name] = tensor
        if tensor.shape != layout[name]:
            made[name] = np.zeros(layout[name], tensor.dtype)
            made[name][tuple(map(slice, tensor.shape))] = tensor
    return made


Source = Stored | Widened | Added | Held
"""Where numbers of a client are read."""
