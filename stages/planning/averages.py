"""What aggregate will take: memory by part, for every way in which updates become one."""

from __future__ import annotations

from stages.planning.estimates import Here, StagePlan

COPIES = {
    "median": 0.0,
    "clipped-mean": 0.5,
    "trimmed-mean": 1.5,
    "krum": 0.5,
    "geometric-median": 0.5,
    "factors": 5.5,
    "product": 2.2,
}
"""Of a block of all clients' numbers, beside the one that is used and the one that is read: in order, compared, in
float64; of BA the factors side by side, with their QR, or without where BA is smaller."""


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
        count = settings.min_clients or here.workspace.agreement.federation.clients
        block = min(count * values, max(updates.BLOCK_BYTES, count * 4 * updates.FEWEST_NUMBERS))
        what: str = settings.rule
        if settings.combine == "product":
            layout = here.shapes["slm"].layout
            layers = updates.whole_layers(layout, updates.columns_of(count))
            block = max(count * 4 * (place.stop - place.start) for place, _ in layers)
            narrowest = min(shape[1 if name.endswith("lora_A.weight") else 0] for name, shape in layout.items())
            what = "factors" if count * here.workspace.agreement.slm.lora.r < narrowest else "product"
        copies, sums = COPIES.get(what), 2 * values
        blocks = 0 if copies is None else min(2 * block, count * values) + int(copies * block)
        takes = {"adapters": 6 * values, "sums": max(sums, blocks)}
    return StagePlan("aggregate", "server", memory=takes)
