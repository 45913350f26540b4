"""What the server's optimiser remembers, as a file: server_state.safetensors in the aggregate's folder; never travels.

It holds m and, for an optimiser that has one, v: float32, under the adapter's names after `m/` and `v/`.
"""

from __future__ import annotations

from pathlib import Path

from stages.aggregation.optimizers import SECOND, State
from stages.artefacts.adapter_files import Layout, check_finite, loaded, strict_layout, weights_bytes
from stages.artefacts.tensor_files import bad
from stages.workspace.averaging import Server

M, V = "m/", "v/"


def state_bytes(state: State) -> bytes:
    """The file: one way to write each state."""
    named = {M + name: tensor for name, tensor in state.m.items()}
    return weights_bytes(named | {V + name: tensor for name, tensor in state.v.items()})


def read_state(content: bytes, path: Path, server: Server, adapter: Layout) -> State:
    """What this optimiser remembered of an adapter of this layout.

    Raises Damaged for any other file, and where some v is below zero, BadNumbers for NaN or infinity.
    """
    kinds = (M, V) if server in SECOND else (M,)
    expected = {kind + name: shape for kind in kinds for name, shape in adapter.items()}
    found = strict_layout(content, path)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            here, there = ("no tensor" if one is None else str([*one]) for one in (found.get(name), expected.get(name)))
            raise bad(path, f"is not of {server} and this adapter: {name} is {here}, expected {there}")
    tensors = loaded(content, path)
    check_finite(tensors, path)
    first, second = ({name: tensors[kind + name] for name in adapter if kind in kinds} for kind in (M, V))
    for name, tensor in second.items():
        if tensor.size and tensor.min() < 0:
            raise bad(path, f"has a sum of squares below zero in {V}{name}")
    return State(first, second)
