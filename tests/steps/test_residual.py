"""combine = "residual": what clients load is the mean of what they learned, exactly, round after round."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import edit, make_workspace
from stages.federation.run import run
from stages.workspace.paths import Workspace

Tensors = dict[str, np.ndarray]
Once = Callable[[str, Callable[[Path], None]], Path]
RESIDUAL = "residual.safetensors"
SCALE = 2.0
"""alpha / r of the tests' workspace."""


def tensors(folder: Path, name: str = "adapter_model.safetensors") -> Tensors:
    return safetensors.numpy.load((folder / name).read_bytes())


def product(found: Tensors) -> np.ndarray:
    """BA of the one layer, float64; zero where it has none."""
    if not found:
        return np.zeros((48, 16))
    a, b = (next(one for name, one in found.items() if f".lora_{which}." in name) for which in "AB")
    return b.astype(np.float64) @ a


def beneath(folder: Path) -> np.ndarray:
    return product(tensors(folder, RESIDUAL))


def agreed(folder: Path, *, method: str = "fedavg") -> Path:
    edit(folder / "fedcollm.toml", "[distillation]", '[aggregation]\ncombine = "residual"\n\n[distillation]')
    edit(folder / "fedcollm.toml", "[federation]", f'[federation]\nmethod = "{method}"')
    return folder


def fill(folder: Path, base_models: Path, method: str) -> None:
    run(Workspace(agreed(make_workspace(folder, base_models), method=method)), scores=False)


@pytest.fixture(scope="session", params=["fedavg", "fedcollm"])
def ran_once(once: Once, base_models: Path, request: pytest.FixtureRequest) -> Path:
    """Two rounds of three clients, without scores; to be read only."""
    method = str(request.param)
    return once(f"residual-{method}", lambda top: fill(top / "study", base_models, method)) / "study"


@pytest.fixture
def ran(ran_once: Path, tmp_path: Path) -> Path:
    """Such a workspace of one's own."""
    return shutil.copytree(ran_once, tmp_path / "study", symlinks=True)


@pytest.mark.parametrize("round", [1, 2])
def test_average_and_residual_are_the_mean_of_what_clients_have_merged(ran_once: Path, round: int) -> None:
    place, average = ran_once / f"exchange/round-000{round}", ran_once / f"private/server/round-000{round}/aggregate"
    before = beneath(place / "broadcast")  # a client's model is base + before + its BA
    expected = np.mean([before + product(tensors(place / f"client-{k}")) for k in (1, 2, 3)], axis=0)
    found = beneath(average) + product(tensors(average))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())
    lost = np.linalg.norm(product(tensors(average)) - expected) / np.linalg.norm(expected)
    assert lost > 1e-3  # without it
