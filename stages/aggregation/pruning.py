"""Few numbers of an update: those that changed most are sent, and what is not sent is not forgotten.

FedShield-LLM prunes by magnitude what clients send. Here with error feedback (Stich et al., 2018,
https://arxiv.org/abs/1809.07599): what a round leaves out is added to the change of the next.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy

from stages.artefacts.adapter_files import Tensors, flat, is_finite, loaded
from stages.artefacts.sparse_files import Sparse, count_kept, largest
from stages.artefacts.tensor_files import bad, largest_bytes, read_header
from stages.files import reading, writing
from stages.runtime.errors import BadNumbers, Damaged, NotReady
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

NAME = "unsent"


def pruned(workspace: Workspace, sent: Tensors, start: Tensors, *, round: int, client: int, share: float) -> Sparse:
    """What a client sends of a change, and, in private/client-k/round-t, what it keeps for its next round.

    sent, start: the adapter, or the part of it that is averaged, after the round and before it. What is sent is as
    short as agreed, with what was left out before; what is cut of it waits too. Raises as left_out, and BadNumbers
    where the sum leaves float32.
    """
    before, after = flat(start), flat(sent)
    with np.errstate(over="ignore"):
        change = after - before + left_out(workspace, round=round, client=client, numbers=len(after))
    if not is_finite(change):
        message = f"the change of round {round} and what was left out before come to a number beyond float32"
        mend = "lower the learning rate or set max_grad_norm, then train again with --overwrite"
        raise BadNumbers(message, where=workspace.client_adapter(round, client), mend=mend)
    sparse = _shortened(largest(change, count_kept(len(change), share)), workspace)
    change[sparse.positions] -= sparse.changes
    writing.write(workspace.unsent(round, client), safetensors.numpy.save({NAME: change}))
    return sparse


def _shortened(sparse: Sparse, workspace: Workspace) -> Sparse:
    most, norm = workspace.agreement.aggregation.max_update_norm, np.linalg.norm(sparse.changes.astype(np.float64))
    if most is None or norm <= most:
        return sparse
    return sparse._replace(changes=(sparse.changes * (most / norm)).astype(np.float32))


def left_out(workspace: Workspace, *, round: int, client: int, numbers: int) -> np.ndarray:
    """What the client's last round before this one left out, [numbers], float32; zero if there was none.

    The last that sent the same matrices: where A and B are sent in turns, what one leaves out waits for its next turn.
    Raises NotReady where that round's adapter is here without it, Damaged where it is no such file.
    """
    sent_in = workspace.agreement.sent_in
    for before in range(round - 1, 0, -1):
        if sent_in(before) != sent_in(round):
            continue
        place, adapter = workspace.unsent(before, client), workspace.client_adapter(before, client)
        if not place.exists() and not adapter.exists():
            continue
        mend = f"`{Command('client-train', client=client, round=before)}` makes it again from the adapter of that round"
        if not place.exists():
            message = f"what round {before} left out, for round {round} to add, is not there"
            raise NotReady(message, where=place, mend=mend)
        try:
            return _read(place, numbers)
        except Damaged as problem:
            problem.mend = mend
            raise
    return np.zeros(numbers, np.float32)


def _read(path: Path, numbers: int) -> np.ndarray:
    content = reading.read(path, limit_bytes=largest_bytes(numbers))
    header = read_header(content, path)
    found = {name: (entry.get("dtype"), entry.get("shape")) for name, entry in header.items()}
    if found != {NAME: ("F32", [numbers])}:
        raise bad(path, f"does not hold the {numbers} numbers that an earlier round left out")
    left = loaded(content, path)[NAME]
    if not is_finite(left):
        raise bad(path, "holds NaN or infinity")
    return left
