"""How large what lies beneath an adapter grows, round by round, where combine = "residual"."""

from __future__ import annotations

from stages.artefacts.adapter_files import A, B, Layout, layers_of, numbers_in
from stages.artefacts.residual_sizes import is_agreed
from stages.workspace.agreement import Agreement


def layout_after(rounds: int, agreement: Agreement, layout: Layout) -> Layout:
    """Its tensors after so many rounds, beneath an SLM's adapter of this layout; none where none is agreed.

    K clients add (K - 1) r to the rank of a layer, up to its smaller side.
    """
    found = Layout()
    for layer in layers_of(layout) if is_agreed(agreement) else ():
        inputs, outputs = layout[layer + A][1], layout[layer + B][0]
        rank = min(rounds * (agreement.federation.clients - 1) * agreement.slm.lora.r, inputs, outputs)
        if rank:
            found |= {layer + A: (rank, inputs), layer + B: (outputs, rank)}
    return found


def bytes_of(agreement: Agreement, layout: Layout) -> list[int]:
    """Of its file after each round, and first before any: the broadcast of round t has the one at t - 1.

    All zero where none is agreed.
    """
    from stages.models import shapes

    if not is_agreed(agreement):
        return [0] * (agreement.federation.rounds + 1)
    rounds = range(agreement.federation.rounds + 1)
    return [shapes.file_bytes(layout_after(round, agreement, layout)) for round in rounds]


def numbers_beneath(agreement: Agreement, layout: Layout) -> int:
    """How many numbers of it the model holds in the last round, on which all train."""
    return numbers_in(layout_after(agreement.federation.rounds - 1, agreement, layout))


def work_of(agreement: Agreement, layout: Layout) -> int:
    """Bytes that the server takes in the last round beside its blocks, in the layer where that is most.

    All factors side by side, and their QR and SVD, or their product and its SVD where that is smaller. float64.
    """
    clients, most, before = agreement.federation.clients, 0, agreement.federation.rounds - 1
    beneath = layout_after(before, agreement, layout)
    for layer in layers_of(layout) if is_agreed(agreement) else ():
        (rank, inputs), outputs = layout[layer + A], layout[layer + B][0]
        joined = clients * rank + (beneath[layer + A][0] if layer + A in beneath else 0)
        least, ends = min(inputs, outputs), inputs + outputs
        beside = least * ends + inputs * outputs if joined >= least else joined * ends + 5 * joined**2
        most = max(most, 2 * joined * ends + beside)
    return 8 * most
