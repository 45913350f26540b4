"""residual.safetensors: what is added to the frozen weights beneath an adapter, where combine = "residual".

It lies beside the adapter in a broadcast, in an aggregate, and in what co-distill makes of the SLM. It is of all rounds
so far, so that each broadcast stands alone. A client sends none: it trained on the one in its broadcast. Of each layer
it has an A, [rank, inputs], and a B, [outputs, rank], under the names of the adapter's, and alpha / r B A is added. A
layer of which nothing is added is not in it; in round 1 none is.
"""

from __future__ import annotations

from pathlib import Path

from stages.artefacts.adapter_files import (
    A,
    B,
    Layout,
    Tensors,
    check_finite,
    layers_of,
    layout_of,
    loaded,
    numbers_in,
    strict_layout,
    weights_bytes,
)
from stages.artefacts.reading import Artefact
from stages.artefacts.residual_sizes import is_agreed, most_rank
from stages.artefacts.tensor_files import bad, largest_bytes
from stages.files import reading
from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace.agreement import Agreement
from stages.workspace.names import RESIDUAL


def as_file(beneath: Tensors, agreement: Agreement) -> dict[str, bytes]:
    """The file of what lies beneath an SLM's adapter; none where none is agreed.

    Raises UsageProblem for a larger one than anybody would read.
    """
    if not is_agreed(agreement):
        return {}
    size_bytes = largest_bytes(numbers_in(layout_of(beneath)))
    if size_bytes > reading.LARGEST_ADAPTER_BYTES:
        most = f"at most {reading.LARGEST_ADAPTER_BYTES} are read"
        mend = 'merge what there is in an export, and go on with that as the base; or agree on combine = "product"'
        raise UsageProblem(f"{RESIDUAL} has grown to {size_bytes} bytes, {most}", mend=mend)
    return {RESIDUAL: weights_bytes(beneath)}


def read_residual(artefact: Artefact, layout: Layout, agreement: Agreement) -> Tensors:
    """What is added beneath an SLM's adapter of this layout, float32 and finite; nothing where none is agreed.

    Raises Damaged where it is missing, or anything but pairs of matrices of layers of the adapter, of no larger rank
    than so many rounds can bring; BadNumbers for NaN or infinity.
    """
    if not is_agreed(agreement):
        return {}
    if RESIDUAL not in artefact.contents:
        message = f"{RESIDUAL} is missing, without which this adapter is another model's"
        raise Damaged(message, where=artefact.path, mend=reading.FOLDER_AGAIN)
    path, content = artefact.path / RESIDUAL, artefact.contents[RESIDUAL]
    _check_layout(strict_layout(content, path), layout, path, most_rank(artefact.manifest, agreement))
    tensors = loaded(content, path)
    check_finite(tensors, path)
    return tensors


def _check_layout(found: Layout, layout: Layout, path: Path, most: int) -> None:
    layers = layers_of(found)
    if alone := sorted(found.keys() - {layer + end for layer in layers for end in (A, B)}):
        raise bad(path, f"has {alone[0]}, which is of no pair of matrices")
    for layer in layers:
        if layer + A not in layout or layer + B not in layout:
            raise bad(path, f"has {layer}, in which the adapter has no A and B")
        inputs, outputs = layout[layer + A][1], layout[layer + B][0]
        a, b = found[layer + A], found[layer + B]
        rank = a[0] if a else 0
        if (a, b) != ((rank, inputs), (outputs, rank)):
            shapes = f"A {list(a)} and B {list(b)}"
            raise bad(path, f"has {shapes} in {layer}; they are [rank, {inputs}] and [{outputs}, rank]")
        if not 1 <= rank <= min(inputs, outputs, most):
            raise bad(path, f"has rank {rank} in {layer}, where it can have {min(inputs, outputs, most)} at most")
