"""audit_clients: cosines and outliers from inner products alone, against vectors written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from stages.aggregation import updates as sources
from stages.aggregation.means import Mean
from stages.artefacts.adapter_files import Tensors
from stages.audit.check_clients import compare, pairwise, robust_z, toward_the_rest
from stages.audit.folders import Folder, Scope

SHAPES = {"A": (2, 30), "B": (7, 2)}
UPDATES = np.array([[3.0, 4.0], [4.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])


def test_cosines_are_those_of_the_vectors_and_zero_where_there_is_none() -> None:
    found = pairwise(UPDATES @ UPDATES.T)
    assert found[0, 1] == pytest.approx(24 / 25)
    assert found[0, 2] == pytest.approx(-3 / 5)
    assert found[3].tolist() == [0, 0, 0, 0]


def test_the_rest_is_everyone_else() -> None:
    found = toward_the_rest(UPDATES @ UPDATES.T)
    # The rest of the first is (3, 3); that of the third is (7, 7), and -7 / (1 * 7 sqrt 2).
    assert found[0] == pytest.approx(21 / (5 * np.sqrt(18)))
    assert found[2] == pytest.approx(-1 / np.sqrt(2))
    assert found[3] == 0


def test_two_that_cancel_leave_no_rest() -> None:
    updates = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert toward_the_rest(updates @ updates.T)[0] == 0


def test_z_is_robust_and_needs_five_that_differ() -> None:
    norms = np.exp([0.0, 1.0, 2.0, 3.0, 100.0])
    found = robust_z(norms)  # median 2, distances 2, 1, 0, 1, 98: their median is 1
    assert found is not None
    assert found.tolist() == pytest.approx([-2 * 0.6745, -0.6745, 0, 0.6745, 98 * 0.6745])
    assert robust_z(norms[:4]) is None
    assert robust_z(np.ones(5)) is None
    assert robust_z(np.array([0.0, 1, 2, 3, 4])) is None


@pytest.mark.parametrize("columns", [1, 40, 1000])
@pytest.mark.parametrize("half", [False, True])
def test_updates_are_compared_as_whole_vectors_are_however_few_layers_lie_side_by_side(
    tmp_path: Path, columns: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "FEWEST_NUMBERS", columns)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 0)
    draw = np.random.default_rng(1)
    shapes = {f"{layer}.lora_{which}.weight": shape for layer in "xy" for which, shape in SHAPES.items()}

    def adapter() -> Tensors:
        return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    start, adapters, folders = adapter(), [adapter() for _ in range(5)], {}
    for client, tensors in enumerate(adapters, 1):
        folders[client] = Folder(tmp_path / str(client), Scope(tmp_path, tmp_path, None))
        folders[client].path.mkdir()
        if half and client == 2:
            tensors |= {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(tensors, folders[client].path / "adapter_model.safetensors")
    vectors = np.stack([np.concatenate([(one[name] - start[name]).ravel() for name in start]) for one in adapters])
    products, terms = compare(folders, start)
    assert products == pytest.approx(vectors @ vectors.T, rel=1e-5, abs=1e-5)
    mean = Mean()
    for tensors in adapters:
        mean.add({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, 1)
    assert terms == pytest.approx(mean.cross_terms(), rel=1e-9)
