"""The updates of a round as rules read them: one client's after the other, or the same numbers of all side by side.

Neither holds them all in memory, and neither trusts a file twice: each byte that is used is hashed as it is read, and
each reading of a file must come to the digest in its manifest, or nothing is made of the updates.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from stages.artefacts.adapter_files import Tensors, is_as_written, layout_of, read_adapter
from stages.artefacts.reading import LEVELS, Artefact, read_file, read_manifest
from stages.artefacts.tensor_files import largest_bytes
from stages.files import reading
from stages.runtime.errors import NotReady, Problem
from stages.runtime.events import Event, Report
from stages.workspace.agreement import Lora
from stages.workspace.names import ADAPTER_WEIGHTS

BLOCK_BYTES = 16 << 20
"""Of numbers that lie side by side; a second block is read meanwhile."""
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
        """Where some numbers lie in an adapter, and those numbers of every client, float32 [K, n], the caller's to use.

        All numbers once, in the order of `flat`. What is made of them counts only once the last block was asked for
        the next: then every file has been read to its end, and has the digest that its manifest names.
        """
        columns = max(FEWEST_NUMBERS, BLOCK_BYTES // (4 * len(self.heads)))
        places = [slice(start, min(start + columns, self.size)) for start in range(0, self.size, columns)]
        sources = [self._source(number) for number in range(len(self.heads))]

        def read(place: slice) -> np.ndarray:
            block = np.empty((len(sources), place.stop - place.start), np.float32)
            for number, (row, source) in enumerate(zip(block, sources, strict=True)):
                # The square is finite only if all values are, and is quick.
                if not source.fill(row, place) or not (np.isfinite(np.vdot(row, row)) or np.isfinite(row).all()):
                    self._blame(number)
            return block

        blocks = _ahead(partial(read, place) for place in places)
        for done, (place, block) in enumerate(zip(places, blocks, strict=True), 1):
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

    def _source(self, number: int) -> _File | _Held:
        """Where a client's numbers are read bit by bit: its file, or, where they lie there in another order, memory."""
        head = self.heads[number]
        path, entry = head.path / ADAPTER_WEIGHTS, head.manifest.files[ADAPTER_WEIGHTS]
        start = entry.size_bytes - 4 * self.size
        if 8 <= start <= largest_bytes(0):
            content = bytearray(start)
            named_bytes = entry.size_bytes
            is_there = reading.read_into(path, memoryview(content), start=0, named_bytes=named_bytes, levels=LEVELS)
            if is_there and is_as_written(bytes(content), layout_of(self.theta), path):
                return _File(path, start, entry.size_bytes, entry.sha256, hashlib.sha256(content))
        return _Held(self.flat(self.adapter(number)))

    def _blame(self, number: int) -> NoReturn:
        """Raise what is wrong with a file, as who reads it whole would; if nothing is, it was another before."""
        self.adapter(number)
        raise _changed(self.heads[number])


@dataclass(frozen=True)
class _File:
    """A file whose numbers are read in their order. digest: of what was read so far."""

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
        self.digest.update(content)
        return True

    def is_whole(self) -> bool:
        """Whether what was read is what the manifest names."""
        return self.digest.hexdigest() == self.sha256


@dataclass(frozen=True)
class _Held:
    """Numbers that were checked when they were read, and are in memory."""

    numbers: np.ndarray

    def fill(self, row: np.ndarray, place: slice) -> bool:
        """Copy the next numbers."""
        row[:] = self.numbers[place]
        return True

    def is_whole(self) -> bool:
        """They are."""
        return True


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
