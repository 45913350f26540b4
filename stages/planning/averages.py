"""What aggregate will take: memory by part, for every way in which updates become one."""

from __future__ import annotations

from collections import Counter

import numpy as np

from stages.artefacts.adapter_files import A, B, Layout, layers_of, numbers_in, part_of
from stages.artefacts.residual_sizes import is_agreed
from stages.artefacts.sizes import encrypted_bytes
from stages.artefacts.sparse_files import Sparse, count_kept, sparse_bytes
from stages.planning import residuals
from stages.planning.estimates import Here, StagePlan
from stages.workspace.agreement import Agreement

COPIES = {
    "median": 0.0,
    "clipped-mean": 0.5,
    "trimmed-mean": 1.5,
    "krum": 0.5,
    "geometric-median": 0.5,
}
"""Of a block of all clients' numbers, beside the one that is used and the one that is read: in order, compared, in
float64."""


OF_CIPHERTEXTS = 7
"""Times that an encrypted update is in memory as aggregate adds it: the sum, one more as file, cut and loaded, and the
sum as it is written."""
OF_MOMENT = 4
"""Adapters that one moment of the server's optimiser is in memory as: file and tensors, before and after a step."""


def aggregate(here: Here) -> StagePlan:
    """The broadcast and an update as bytes and parsed, one more and the result; sums in float64. Never all clients.

    Another rule than the mean, the mean of BA and a residual hold some numbers or layers of all clients too.
    """
    from stages.aggregation import sources, updates
    from stages.models import shapes

    takes = {}
    if "slm" in here.shapes:
        agreement, layout = here.workspace.agreement, here.shapes["slm"].layout
        whole, settings = shapes.FLOAT32_BYTES * here.shapes["slm"].adapter_parameters, agreement.aggregation
        values = shapes.FLOAT32_BYTES * max(numbers_in(part_of(layout, agreement.sent_in(round))) for round in (1, 2))
        count = here.workspace.agreement.federation.clients
        block = min(count * values, max(updates.BLOCK_BYTES, count * 4 * updates.FEWEST_NUMBERS))
        copies = COPIES.get(settings.rule)
        work = None if copies is None else int(copies * block)
        if settings.combine == "product":
            layers = sources.whole_layers(layout, updates.columns_of(count))
            block = max(count * 4 * (place.stop - place.start) for place, _ in layers)
            work = of_products(count, layout)
        elif is_agreed(agreement):
            layers = sources.whole_layers(layout, updates.columns_of(count))
            block = max(count * 4 * (place.stop - place.start) for place, _ in layers)
            work = residuals.work_of(agreement, layout)
        sums, blocks = 2 * values, 0 if work is None else min(2 * block, count * values) + work
        kept = count * updates_of(agreement, layout)[1] if agreement.keep and blocks else 0
        takes = {"adapters": 3 * whole + 3 * values + kept, "sums": max(sums, blocks)}
        if is_agreed(agreement):  # as bytes and parsed, before and after the round
            takes["residual"] = 2 * sum(residuals.bytes_of(agreement, layout)[-2:])
        if settings.key_holder:
            takes["ciphertexts"] = OF_CIPHERTEXTS * encrypted_bytes(values // shapes.FLOAT32_BYTES)
        if settings.server != "none":
            takes["optimizer"] = OF_MOMENT * whole * (2 if "tau" in settings.server_keys else 1)
    return StagePlan("aggregate", "server", memory=takes)


def updates_of(agreement: Agreement, layout: Layout) -> tuple[int, int]:
    """What a client sends of an adapter in a round: numbers, and bytes of its file.

    Means of all clients, whose ranks may differ, and of two rounds, in which A and B may take turns.
    """
    from stages.aggregation.sources import at_rank
    from stages.models import shapes

    ranks, rounds = Counter(agreement.ranks.values()), range(1, 1 + min(2, agreement.federation.rounds))
    ranks[agreement.slm.lora.r] = agreement.federation.clients - ranks.total()
    sent = np.zeros(2, int)
    for rank, clients in ranks.items():
        parts = [part_of(at_rank(layout, rank), agreement.sent_in(round)) for round in rounds]
        numbers = list(map(numbers_in, parts))
        sizes = list(map(shapes.file_bytes, parts))
        if agreement.keep:
            numbers = [count_kept(number, agreement.keep) for number in numbers]
            sizes = [len(sparse_bytes(Sparse(np.zeros(n, np.uint32), np.zeros(n, np.float32)))) for n in numbers]
        if agreement.aggregation.key_holder:
            sizes = list(map(encrypted_bytes, numbers))
        sent += clients * np.array([sum(numbers), sum(sizes)])
    mean_numbers, mean_bytes = map(int, sent // (agreement.federation.clients * len(rounds)))
    return mean_numbers, mean_bytes


def of_products(clients: int, layout: Layout) -> int:
    """Bytes that the mean of BA takes beside its block, in the layer where that is most; see aggregation.products.

    The factors of all clients side by side, and their QR and SVD, or BA and its SVD where that is smaller, with what
    LAPACK works in: a copy of what it takes apart, its results once more, and the SVD's own. float64.
    """
    most = 0
    for layer in layers_of(layout):
        (rank, inputs), outputs = layout[layer + A], layout[layer + B][0]
        joined, least, ends = clients * rank, min(inputs, outputs), inputs + outputs
        if joined >= least:
            beside = 2 * (inputs * outputs + least * ends) + 4 * least**2
        else:
            of_b, of_a = 4 * joined * outputs, joined * (outputs + 4 * inputs)
            beside = max(of_b, of_a, joined * ends + 11 * joined**2)
        most = max(most, joined * ends + beside + rank * ends)
    return 8 * most
