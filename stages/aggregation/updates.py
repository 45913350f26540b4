"""The updates of a round as rules read them: one client's after the other, or the same numbers of all side by side.

Neither holds them all in memory, and neither trusts a file twice: each byte that is used is hashed as it is read, and
each reading of a file must come to the digest in its manifest, or nothing is made of the updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NoReturn

import numpy as np

from stages.aggregation.sources import (
    Added,
    Held,
    Source,
    Widened,
    ahead,
    as_written,
    at_rank,
    side_by_side,
    stacked,
    whole_layers,
    widened,
)
from stages.artefacts.adapter_files import Tensors, check_config, check_finite, flat, layout_of, read_adapter
from stages.artefacts.reading import Artefact, read_file, read_manifest
from stages.artefacts.sparse_files import read_sparse
from stages.artefacts.tensor_files import largest_bytes
from stages.runtime.errors import NotReady, Problem
from stages.runtime.events import Event, Report
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SPARSE_UPDATE

BLOCK_BYTES = 16 << 20
"""Of numbers that lie side by side; a second block is read meanwhile."""
CACHED_NUMBERS = 1 << 16
"""Of float64 that stay in a processor's cache while they are used: half a megabyte."""
FEWEST_NUMBERS = 1 << 12
"""Of one client in a block: for less a file is not opened."""


@dataclass(frozen=True)
class Updates:
    """The updates that are combined, in the order of their clients, and theta, the broadcast that they began with.

    heads: what was checked of each before its weights are read; its manifest names their digest. keep: which share of
    its numbers an update has, where it is sparse; these are in memory while blocks are read.
    """

    heads: Sequence[Artefact]
    theta: Tensors
    report: Report
    keep: float | None = None

    @cached_property
    def size(self) -> int:
        """How many numbers an adapter has."""
        return sum(tensor.size for tensor in self.theta.values())

    @property
    def digests(self) -> list[str]:
        """The sha256 of what each client sent."""
        return [head.manifest.files[self._file].sha256 for head in self.heads]

    @property
    def _file(self) -> str:
        return ADAPTER_WEIGHTS if self.keep is None else SPARSE_UPDATE

    def adapters(self) -> Iterator[Tensors]:
        """Each client's, the next being read and hashed while the last is used: two in memory, however many."""
        for number, adapter in enumerate(ahead(partial(self.adapter, k) for k in range(len(self.heads)))):
            yield adapter
            client = self.heads[number].manifest.client
            self.report(Event("step", f"client {client}", step=number + 1, total=len(self.heads)))

    def adapter(self, number: int) -> Tensors:
        """One client's. Raises NotReady if the folder was replaced since its head was read, else as read_adapter."""
        head, layout = self.heads[number], layout_of(self.theta)
        if self.keep is not None:
            added = self.tensors(self._added(number).numbers())
            check_finite(added, head.path / SPARSE_UPDATE)
            return added
        whole = replace(head, contents=head.contents | {ADAPTER_WEIGHTS: self._content(number)})
        narrow = at_rank(layout, head.manifest.lora.r)
        return widened(read_adapter(whole, narrow, head.manifest.lora), layout)

    def _content(self, number: int) -> bytes:
        """The bytes of what one client sent, of which each reading comes to the digest in its manifest."""
        head = self.heads[number]
        try:
            return read_file(head.path, head.manifest, self._file, limit_bytes=largest_bytes(self.size))
        except Problem as error:
            if read_manifest(head.path)[1] != head.sha256:
                raise _changed(head) from error
            raise

    def _added(self, number: int) -> Added:
        """What a sparse update makes of the broadcast. Raises as read_sparse and check_config do."""
        assert self.keep is not None
        head = self.heads[number]
        check_config(head.contents[ADAPTER_CONFIG], head.path / ADAPTER_CONFIG, head.manifest.lora)
        path, layout = head.path / SPARSE_UPDATE, layout_of(self.theta)
        return Added(self._start, read_sparse(self._content(number), path, layout, self.keep))

    @cached_property
    def _start(self) -> np.ndarray:
        return flat(self.theta)

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

    def tensors(self, numbers: np.ndarray) -> Tensors:
        """The adapter of these numbers."""
        ends = np.cumsum([self.theta[name].size for name in sorted(self.theta)])
        parts = zip(sorted(self.theta), np.split(numbers, ends[:-1]), strict=True)
        return {name: part.reshape(self.theta[name].shape) for name, part in parts}

    def _source(self, number: int) -> Source:
        """Where a client's numbers are read bit by bit: its file, or, where they lie there in another order, memory."""
        head, layout = self.heads[number], layout_of(self.theta)
        if self.keep is not None:
            return self._added(number)
        path, entry = head.path / ADAPTER_WEIGHTS, head.manifest.files[ADAPTER_WEIGHTS]
        narrow = at_rank(layout, head.manifest.lora.r)
        stored = as_written(path, entry.size_bytes, narrow, sha256=entry.sha256)
        if stored is None:
            return Held(flat(self.adapter(number)))
        return stored if narrow == layout else Widened(stored, narrow, layout)

    def _blame(self, number: int) -> NoReturn:
        """Raise what is wrong with a file, as who reads it whole would; if nothing is, it was another before."""
        self.adapter(number)
        raise _changed(self.heads[number])


def columns_of(rows: int) -> int:
    """How many numbers of each of so many clients make a block."""
    return max(FEWEST_NUMBERS, BLOCK_BYTES // (4 * rows))


def inner_products(block: np.ndarray, start: np.ndarray) -> np.ndarray:
    """<u_j, u_k> of every two rows of block - start, [K, K], float64: some columns at a time, in the cache."""
    products, columns = np.zeros((len(block), len(block))), max(1, CACHED_NUMBERS // len(block))
    for first in range(0, block.shape[1], columns):
        some = slice(first, first + columns)
        moved = block[:, some].astype(np.float64)
        moved -= start[some].astype(np.float64)
        products += moved @ moved.T
    return products


def _changed(head: Artefact) -> NotReady:
    message = f"client {head.manifest.client}'s update was replaced while it was read"
    return NotReady(message, where=head.path, mend="wait until it is there, and give the same command again")
