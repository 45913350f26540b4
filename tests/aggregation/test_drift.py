"""drift: norms and cosines of the clients' updates, against one long vector."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import sign
from stages.aggregation.drift import drift
from stages.runtime.errors import NotReady
from stages.workspace.paths import Workspace


def vector(folder: Path) -> np.ndarray:
    """An adapter as one vector."""
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def test_norm_and_cosine_are_those_of_the_difference_from_the_broadcast(finished_once: Path) -> None:
    workspace = Workspace(finished_once)
    updates = {k: vector(workspace.client_update(2, k)) - vector(workspace.broadcast(2)) for k in (1, 2, 3)}
    mean = sum(updates.values()) / 3
    found = drift(workspace, 2)
    assert [one.client for one in found] == [1, 2, 3]
    for one in found:
        update = updates[one.client]
        assert one.norm == pytest.approx(np.linalg.norm(update))
        assert one.cosine == pytest.approx(update @ mean / np.linalg.norm(update) / np.linalg.norm(mean))


def test_a_client_that_sent_the_broadcast_back_has_no_direction(finished: Path) -> None:
    workspace = Workspace(finished)
    update = workspace.client_update(1, 2)
    shutil.copy(workspace.broadcast(1) / "adapter_model.safetensors", update / "adapter_model.safetensors")
    sign(update)
    found = {one.client: one for one in drift(workspace, 1)}
    assert found[2].norm == 0
    assert found[2].cosine is None
    assert found[1].cosine is not None


def test_only_the_clients_that_are_here_are_counted(finished: Path) -> None:
    workspace = Workspace(finished)
    for client in (1, 3):
        shutil.rmtree(workspace.client_update(1, client))
    [alone] = drift(workspace, 1)
    assert alone.cosine == pytest.approx(1)


def test_without_the_broadcast_there_is_no_drift(finished: Path) -> None:
    workspace = Workspace(finished)
    shutil.rmtree(workspace.broadcast(1))
    assert drift(workspace, 1) == []


def test_a_damaged_update_is_named_and_how_to_mend_it(finished: Path) -> None:
    workspace = Workspace(finished)
    weights = workspace.client_update(1, 3) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(NotReady, match=r"adapter_model\.safetensors has \d+ bytes") as caught:
        drift(workspace, 1)
    assert "copy the folder again" in str(caught.value.mend)
