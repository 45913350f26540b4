"""Which folders have a residual.safetensors, by the agreement, and how large it can be."""

from __future__ import annotations

from stages.artefacts.manifest import Manifest
from stages.workspace.agreement import Agreement


def is_agreed(agreement: Agreement) -> bool:
    """Whether what the means of A and B lose of the mean of BA is kept, beneath the SLM's adapter."""
    return agreement.federation.averages and agreement.aggregation.combine == "residual"


def most_rank(manifest: Manifest, agreement: Agreement) -> int:
    """The largest rank of a layer, whatever its shape: that of all clients' BA side by side, in each round averaged."""
    rounds = manifest.round - (manifest.stage in ("broadcast", "client-train"))
    return rounds * agreement.federation.clients * agreement.slm.lora.r
