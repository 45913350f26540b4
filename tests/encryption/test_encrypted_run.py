"""Encrypted mode from end to end, by the commands: two clients, one key, and the mean that NumPy has in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import Once

from builders import Outcome, make_workspace
from federations import Machines, agreement, copied, with_keys
from stages.audit.verify import verify
from stages.federation.run import run
from stages.progress.status import status
from stages.workspace.paths import Workspace

ENCRYPTED = 'mode = "encrypted"\n'


def flat(folder: Path) -> np.ndarray:
    """All numbers of an adapter as float64, by name."""
    found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return np.concatenate([value.ravel().astype(np.float64) for _, value in sorted(found.items())])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def mean_of(folder: Path, weights: dict[int, float], round: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The mean update as the server has it, and as numpy.average has it of the clients' own adapters."""
    before = flat(folder / f"exchange/round-{round:04d}/broadcast")
    own = [flat(folder / f"private/client-{k}/round-{round:04d}/slm") - before for k in weights]
    found = flat(folder / f"private/server/round-{round:04d}/aggregate") - before
    return found, np.average(own, axis=0, weights=list(weights.values()))


@pytest.fixture(scope="session")
def encrypted_once(once: Once, base_models: Path) -> tuple[Path, Path]:
    """Two clients that have run both rounds, and the keys of all parties."""

    def fill(top: Path) -> None:
        folder = with_keys(make_workspace(top / "study", base_models), top / "keys")
        (folder / "fedcollm.toml").write_text(agreement(aggregation=ENCRYPTED, clients=2))
        run(Workspace(folder))

    top = once("encrypted", fill)
    return top / "study", top / "keys"


@pytest.fixture
def encrypted(encrypted_once: tuple[Path, Path], tmp_path: Path) -> Path:
    return copied(encrypted_once, tmp_path)


def test_run_does_both_rounds_and_what_is_opened_is_the_mean(encrypted: Path) -> None:
    assert all(round.is_done for round in status(Workspace(encrypted), verify=True).rounds)
    for round in (1, 2):
        found, expected = mean_of(encrypted, {1: 1, 2: 1}, round)
        assert relative_error(found, expected) < 1e-5  # adapters are float32: their own steps are most of it
    verify(Workspace(encrypted))


@pytest.fixture
def machines(tmp_path: Path, base_models: Path, fedcollm: Callable[..., Outcome]) -> Machines:
    """A server and two clients with a folder and keys each; nothing is done yet."""
    text = agreement(aggregation=ENCRYPTED, clients=2, rounds=1, method="fedavg")
    return Machines.set_up(tmp_path, base_models, fedcollm, text, (1, 2))
