"""What aggregate will take: memory by part, for every way in which updates become one."""

from __future__ import annotations

from stages.artefacts.adapter_files import A, B, Layout, layers_of
from stages.planning.estimates import Here, StagePlan

COPIES = {
    "median": 0.0,
    "clipped-mean": 0.5,
    "trimmed-mean": 1.5,
    "krum": 0.5,
    "geometric-median": 0.5,
}
"""Of a block of all clients' numbers, beside the one that is used and the one that is read: in order, compared, in
float64."""


OF_MOMENT = 4
"""Adapters that one moment of the server's optimiser is in memory as: file and tensors, before and after a step."""


def aggregate(here: Here) -> StagePlan:
    """The broadcast and an update as bytes and parsed, one more and the result; sums in float64. Never all clients.

    Another rule than the mean, and the mean of BA, hold some numbers or layers of all clients, instead or before.
    """
    from stages.aggregation import updates
    from stages.models import shapes

    takes = {}
    if "slm" in here.shapes:
        values = shapes.FLOAT32_BYTES * here.shapes["slm"].adapter_parameters
        settings = here.workspace.agreement.aggregation
        count = here.workspace.agreement.federation.clients
        block = min(count * values, max(updates.BLOCK_BYTES, count * 4 * updates.FEWEST_NUMBERS))
        copies = COPIES.get(settings.rule)
        work = None if copies is None else int(copies * block)
        if settings.combine == "product":
            layout = here.shapes["slm"].layout
            layers = updates.whole_layers(layout, updates.columns_of(count))
            block = max(count * 4 * (place.stop - place.start) for place, _ in layers)
            work = of_products(count, layout)
        sums, blocks = 2 * values, 0 if work is None else min(2 * block, count * values) + work
        takes = {"adapters": 6 * values, "sums": max(sums, blocks)}
        if settings.server != "none":
            takes["optimizer"] = OF_MOMENT * values * (2 if "tau" in settings.server_keys else 1)
    return StagePlan("aggregate", "server", memory=takes)


def of_products(clients: int, layout: Layout) -> int:
    """Bytes that the mean of BA takes beside its block, in the layer where that is most; see aggregation.products.

    The factors of all clients side by side, and their QR and SVD, or BA and its SVD where that is smaller. float64.
    """
    most = 0
    for layer in layers_of(layout):
        (rank, inputs), outputs = layout[layer + A], layout[layer + B][0]
        joined, least, ends = clients * rank, min(inputs, outputs), inputs + outputs
        beside = least * ends + inputs * outputs if joined >= least else joined * ends + 5 * joined**2
        most = max(most, joined * ends + beside + 2 * rank * ends)
    return 8 * most
